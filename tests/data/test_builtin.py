"""The built-in corpus: prose of docstrings."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from bert_fast.data.builtin import builtin_documents, file_documents, package_folder, source_files
from bert_fast.data.docstrings import docstring_sentences, is_prose, split_prose


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
def test_split_prose(text, expected):
    assert split_prose(text) == expected


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
    monkeypatch.setattr(
        "bert_fast.data.builtin.source_files", lambda _: [folder / "argparse.py", folder / "ast.py"] * 2
    )
    documents = list(builtin_documents([]))
    sentences = [sentence for document in documents for sentence in document]
    assert len(sentences) > 1500
    assert len({sentence.lower() for sentence in sentences}) == len(sentences)
    assert all(len(document) >= 2 for document in documents)
    assert all(is_prose(sentence) for sentence in sentences)
    assert "Assert statements are a convenient way to insert debugging assertions into a program:" in sentences
    assert any("the command line" in sentence for sentence in sentences)
    assert documents == list(builtin_documents([]))
