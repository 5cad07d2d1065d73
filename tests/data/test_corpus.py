"""Sources of documents: the built-in corpus, the user's files, and what the errors say."""

from __future__ import annotations

import csv
import json
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from bert_fast.data import Corpus
from bert_fast.data.corpus import builtin_documents, file_documents, package_folder, source_files
from bert_fast.data.sentences import docstring_sentences, is_prose, split_sentences

TWO = [["One is first.", "Two is second."], ["Three stands alone."]]


def read(path: Path, **changes: object) -> list[list[str]]:
    return list(Corpus([str(path)], **changes))


def test_txt_with_a_sentence_a_line(tmp_path):
    (tmp_path / "a.txt").write_text(
        "\ufeffOne is first.\r\nTwo  is\tsecond.\n\n \n\nThree stands alone.", encoding="utf-8"
    )
    assert read(tmp_path / "a.txt") == TWO


def test_txt_with_a_document_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("One is first. Two is second.\n\nThree stands alone.\n")
    assert read(tmp_path / "a.txt", one_document_per_line=True) == TWO


def test_jsonl(tmp_path):
    rows = [{"id": 1, "text": "One is first. Two is second."}, {"id": 2, "text": "Three stands alone."}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "a.jsonl") == TWO


def test_jsonl_with_lists_of_sentences(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"parts": document}) for document in TWO))
    assert read(tmp_path / "a.jsonl", text_column="parts") == TWO


def test_csv_with_quotes_and_line_breaks(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["title", "body"], ["a", "One is first.\nTwo is second."], ["b", "Three stands alone."]])
    assert read(tmp_path / "a.csv", text_column="body") == TWO
    assert read(tmp_path / "a.csv") == TWO, "of two columns of text, body is the usual one"


def test_csv_with_a_very_long_field(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "word " * 100_000 + "\n")
    assert len(read(tmp_path / "a.csv")[0][0]) == 499_999
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize("column", ["text", "sentences"])
def test_parquet(tmp_path, column):
    values = [" ".join(document) for document in TWO] if column == "text" else TWO
    pa.parquet.write_table(pa.table({"n": [1, 2], column: values}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == TWO


def test_a_folder_and_several_sources_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("Bee.")
    (tmp_path / "sub" / "a.txt").write_text("Ay.")
    (tmp_path / "sub" / "notes.md").write_text("no")
    (tmp_path / "c.txt").write_text("Sea.\n\nDee.")
    corpus = Corpus([str(tmp_path / "c.txt"), str(tmp_path / "sub")])
    assert list(corpus) == [["Sea."], ["Dee."], ["Ay."], ["Bee."]]
    assert list(corpus) == list(corpus)
    assert list(Corpus([str(tmp_path)], max_documents=2)) == [["Sea."], ["Dee."]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nb\xe9t\n", r"a\.txt, line 2: not UTF-8 \(.* at byte 1\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON \(Expecting value at column"),
        ("a.jsonl", b'"just text"\n', r"a\.jsonl, line 1: a JSON str; expected an object"),
        ("a.jsonl", b'{"text": "x"}\n{"other": "y"}\n', r"a\.jsonl, line 2: no column 'text'; it has 'other'"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 3}\n', r"line 2: column 'text' holds int; expected a text or a list"),
        ("a.jsonl", b'{"p": "x", "q": "y"}\n', r"line 1: which column has the text\? It has 'p', 'q'; name one"),
        ("a.csv", b"text,n\nhello,1\nhello\n", r"a\.csv, line 3: 1 fields; expected 2 as in the header"),
        ("a.csv", b'text\n"never closed\n', r"a\.csv, line 2: not CSV \("),
        ("a.csv", b"text\nb\xe9t\n", r"a\.csv, line 2: not UTF-8"),
        ("a.parquet", b"PAR1 but not really", r"a\.parquet: not a Parquet file that can be read"),
        ("a.docx", b"", r"a\.docx ends in '\.docx'; expected one of \.txt, \.jsonl, \.csv, \.parquet"),
        ("README", b"", r"README ends in 'nothing'; expected one of"),
    ],
    ids=lambda value: value.decode("latin-1")[:20] if isinstance(value, bytes) else "",
)
def test_broken_input_is_named_with_file_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_the_column_that_was_asked_for_must_be_there(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 0: no column 'prose'; it has 'text'"):
        read(tmp_path / "a.parquet", text_column="prose")


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ValueError, match=r"is no file or folder; expected a path, 'builtin' or 'datasets:NAME'"):
        Corpus([str(tmp_path / "none.txt")])
    with pytest.raises(ValueError, match=r"has no file that ends in \.txt, \.jsonl"):
        Corpus([str(tmp_path)])
    with pytest.raises(ValueError, match=r"sources is \[\]; expected a list"):
        Corpus([])
    with pytest.raises(ValueError, match="sources is 'builtin'; expected a list"):
        Corpus("builtin")
    with pytest.raises(ValueError, match="max_documents is 0; expected 1 or more"):
        Corpus(["builtin"], max_documents=0)


def test_datasets_is_optional_and_its_absence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"source 'datasets:imdb' needs the package datasets: pip install"):
        list(Corpus(["datasets:imdb"]))


def test_datasets_rows_are_documents(monkeypatch):
    class FakeDatasets:
        @staticmethod
        def load_dataset(name: str, configuration: str | None, split: str) -> list[dict[str, object]]:
            assert (name, configuration, split) == ("wiki", "en", "train")
            return [{"id": 7, "text": " ".join(document)} for document in TWO]

    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    assert list(Corpus(["datasets:wiki:en"])) == TWO


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("See e.g. Smith et al. Then stop. 3 remain.", ["See e.g. Smith et al. Then stop.", "3 remain."]),
        ('He said "Go." Then J. Doe went.', ['He said "Go."', "Then J. Doe went."]),
        ("Version 3.5 of a.b is\n  here.", ["Version 3.5 of a.b is here."]),
        ("", []),
    ],
    ids=["plain", "abbreviations", "quotes-and-initials", "inner-dots", "empty"],
)
def test_split_sentences(text, expected):
    assert split_sentences(text) == expected


DOCSTRING = """Compute the sum of all values.

    The result of :func:`~numpy.add` is a new array, see `the guide <http://x>`_. It is
    never a view of the input array.

    Parameters
    ----------
    values : array_like, optional
        The values that are to be added up.
    :param int axis: the axis along which they are added
    :rtype: int

    .. note:: The order of the additions is not defined.

    .. code-block:: python

        the code must not be part of the prose

    >>> total([1, 2])
    the output of an example is not prose either

    An example follows here::

        this is code and must go as well

    +------+------+
    | this | is a |
    +------+------+
    The formula :math:`a^2` leaves the whole sentence out.
    """


def test_docstring_sentences_are_prose():
    assert docstring_sentences(DOCSTRING) == [
        "Compute the sum of all values.",
        "The result of numpy.add is a new array, see the guide.",
        "It is never a view of the input array.",
        "The values that are to be added up.",
        "the axis along which they are added",
        "The order of the additions is not defined.",
        "An example follows here:",
    ]


@pytest.mark.parametrize(
    ("sentence", "prose"),
    [
        ("The quick brown fox jumps over the lazy dog.", True),
        ("Returns x.", False),
        ("x = f(y, z) for all y in [1, 2, 3]", False),
        ("a b c d 1 2 3 4 5 6 7 8 9 10", False),
        (r"Here \alpha is a letter of the formula.", False),
    ],
    ids=["english", "too-short", "code", "numbers", "latex"],
)
def test_is_prose(sentence, prose):
    assert is_prose(sentence) is prose


def test_documents_of_a_source_file(tmp_path):
    def sentences(name: str, count: int) -> str:
        return " ".join(f"This is sentence {'x' * i} about the {name}." for i in range(1, count + 1))

    (tmp_path / "m.py").write_text(
        f'"""{sentences("module", 2)}"""\n'
        f'def f():\n    """{sentences("function", 7)}"""\n'
        f'    def inner():\n        """A function inside is not part of this."""\n'
        f'class C:\n    """{sentences("class", 1)}"""\n    def g(self):\n        """{sentences("method", 1)}"""\n'
    )
    documents = file_documents(tmp_path / "m.py")
    assert [len(document) for document in documents] == [9, 2]
    assert documents[1] == ["This is sentence x about the class.", "This is sentence x about the method."]
    (tmp_path / "broken.py").write_text('"""A template is no Python."""\n{{ x }} = ??\n')
    assert file_documents(tmp_path / "broken.py") == []


def test_files_of_a_package_are_sorted_and_tests_are_left_out(tmp_path):
    for name in ("z.py", "a.py", "tests/t.py", "sub/b.py", "site-packages/other/x.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [path.relative_to(tmp_path).as_posix() for path in source_files(tmp_path)] == ["a.py", "sub/b.py", "z.py"]


def test_packages_are_found_and_not_imported():
    assert package_folder("json") == Path(sysconfig.get_path("stdlib")) / "json"
    assert package_folder("no_such_package") is None
    assert package_folder("os.path") is None
    with pytest.raises(ValueError, match="package 'no_such_package' is not installed"):
        list(builtin_documents(["no_such_package"]))


def test_the_builtin_corpus_is_prose_without_repeats(monkeypatch):
    """Of a few modules of the standard library, to be quick."""
    folder = Path(sysconfig.get_path("stdlib"))
    monkeypatch.setattr("bert_fast.data.corpus.source_files", lambda _: [folder / "argparse.py", folder / "ast.py"] * 2)
    documents = list(builtin_documents([]))
    sentences = [sentence for document in documents for sentence in document]
    assert len(sentences) > 1500
    assert len({sentence.lower() for sentence in sentences}) == len(sentences)
    assert all(len(document) >= 2 for document in documents)
    assert all(is_prose(sentence) for sentence in sentences)
    assert "Assert statements are a convenient way to insert debugging assertions into a program:" in sentences
    assert any("the command line" in sentence for sentence in sentences)
    assert documents == list(Corpus(["builtin"], packages=[]))
