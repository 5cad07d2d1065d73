"""Documents of users: formats, compression, patterns, ranges of files, and error messages."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from bert_fast.data import PrepareConfig
from bert_fast.data.cleaning import clean, splitter
from bert_fast.data.files import read_piece
from bert_fast.data.sources import Piece, plan_parts

TWO = [["One is first.", "Two is second."], ["Three stands alone."]]
TWO_TXT = "One is first.\nTwo is second.\n\nThree stands alone.\n"


def settings(*sources: Path | str, **changes: object) -> PrepareConfig:
    values = {"output": "unused", "sources": [str(source) for source in sources], "min_characters": 1}
    return PrepareConfig(**{**values, **changes})


def read(*sources: Path | str, **changes: object) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """The documents, and (problem, "where: detail") of the dropped ones."""
    config = settings(*sources, **changes)
    documents, problems = [], []
    for pieces in plan_parts(config):
        for piece in pieces:
            mode = "lines" if piece.kind == ".txt" and config.boundary == "blank_line" else "split"
            mode = mode if config.sentences == "auto" else config.sentences
            for raw in read_piece(piece, config):
                document, raw = clean(raw, splitter(mode, config.language), config.min_characters)
                if document:
                    documents.append(document)
                else:
                    problems.append((raw.problem, f"{raw.where}: {raw.detail}"))
    return documents, problems


def test_txt_with_a_sentence_a_line(tmp_path):
    (tmp_path / "a.txt").write_text(
        "\ufeffOne is first.\r\nTwo  is\tsecond.\n\n \n\nThree stands alone.", encoding="utf-8"
    )
    assert read(tmp_path / "a.txt") == (TWO, [])


def test_txt_with_a_document_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("One is first. Two is second.\n\nThree stands alone.\n")
    assert read(tmp_path / "a.txt", boundary="line") == (TWO, [])


def test_txt_with_a_document_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("One is first. Two is\nsecond.\n\n\nThree stands alone.\n")
    sentences = ["One is first.", "Two is second.", "Three stands alone."]
    assert read(tmp_path / "a.txt", boundary="file", sentences="split_wrapped") == ([sentences], [])
    lines = ["One is first.", "Two is", "second.", "Three stands alone."]
    assert read(tmp_path / "a.txt", boundary="file") == ([lines], []), "a line break ends a sentence"


def test_jsonl(tmp_path):
    rows = [{"id": 1, "text": "One is first. Two is second."}, {"id": 2, "text": "Three stands alone."}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert read(tmp_path / "a.jsonl") == (TWO, [])


@pytest.mark.parametrize("words", [False, True], ids=["sentences", "words"])
def test_jsonl_with_lists(tmp_path, words):
    documents = [[sentence.split() for sentence in document] for document in TWO] if words else TWO
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"parts": document}) for document in documents))
    assert read(tmp_path / "a.jsonl", text_column="parts") == (TWO, [])


def test_csv_with_quotes_and_line_breaks(tmp_path):
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["title", "body"], ["a", "One is first.\nTwo is second."], ["b", "Three stands alone."]])
    assert read(tmp_path / "a.csv", text_column="body") == (TWO, [])
    assert read(tmp_path / "a.csv") == (TWO, []), "body is a usual name of the text column"


def test_csv_with_a_very_long_field(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "word " * 100_000 + "\n")
    assert len(read(tmp_path / "a.csv", sentences="lines")[0][0][0]) == 499_999
    assert csv.field_size_limit() == 131072


@pytest.mark.parametrize("column", ["text", "sentences"])
def test_parquet_in_row_groups(tmp_path, column):
    values = [" ".join(document) for document in TWO] if column == "text" else TWO
    table = pa.table({"n": list(range(12)), column: values * 6})
    pa.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path / "a.parquet") == (TWO * 6, [])
    assert read(tmp_path / "a.parquet", part_bytes=1) == (TWO * 6, [])
    assert len(plan_parts(settings(tmp_path / "a.parquet", part_bytes=1))) == 6


@pytest.mark.parametrize(
    "kind",
    [
        pa.dictionary(pa.int32(), pa.string()),
        pa.large_string(),
        pa.string_view(),
        pa.list_(pa.string()),
        pa.list_(pa.dictionary(pa.int32(), pa.string())),
    ],
    ids=str,
)
def test_parquet_of_every_kind_of_text(tmp_path, kind):
    texts = [" ".join(document) for document in TWO] if "list" not in str(kind) else TWO
    pa.parquet.write_table(pa.table({"n": [1, 2], "text": pa.array(texts).cast(kind)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == (TWO, [])


def test_parquet_that_repeats_a_long_text(tmp_path):
    """28 GB of text in 2 kB: each row is read, with a few copies of the text in memory."""
    text = "a bird flies. " * 2**20
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array([text]))
    pa.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    rows = read_piece(Piece(".parquet", str(tmp_path / "a.parquet")), settings(tmp_path))
    tracemalloc.start()
    values = [next(rows).value == text for _ in range(50)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert all(values)
    assert peak < 4 * len(text)


def test_parquet_with_a_text_that_is_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr("bert_fast.data.files._MAX_LINE", 100)
    pa.parquet.write_table(pa.table({"text": ["One is short.", "x" * 101]}), tmp_path / "a.parquet")
    assert [raw.problem for raw in read_piece(Piece(".parquet", str(tmp_path / "a.parquet")), settings(tmp_path))] == [
        "",
        "malformed",
    ]


def zstandard_frames(data: bytes) -> bytes:
    """Two frames, as tools that compress in parallel write them."""
    return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (data[:20], data[20:]))


@pytest.mark.parametrize(
    ("ending", "compress"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zst", zstandard_frames)],
    ids=["gz", "bz2", "xz", "zst"],
)
def test_compressed_files(tmp_path, ending, compress):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compress(TWO_TXT.encode()))
    assert read(path, part_bytes=5) == (TWO, []), "a compressed file is one part"
    path.write_bytes(path.read_bytes()[:-9])
    _, [(problem, detail)] = read(path)
    assert problem == "damaged"
    assert f"a.txt{ending}: can't be read to its end (" in detail


def test_folders_patterns_and_several_sources_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("Bee.")
    (tmp_path / "sub" / "a.txt.gz").write_bytes(gzip.compress(b"Ay."))
    (tmp_path / "sub" / "notes.md").write_text("no")
    (tmp_path / "c.txt").write_text("Sea.\n\nDee.")
    assert read(tmp_path / "c.txt", tmp_path / "sub")[0] == [["Sea."], ["Dee."], ["Ay."], ["Bee."]]
    assert read(tmp_path / "**" / "*.txt")[0] == [["Sea."], ["Dee."], ["Bee."]]
    assert len(plan_parts(settings(tmp_path))) == 1, "small files share a part"


@pytest.mark.parametrize("boundary", ["blank_line", "line"])
@pytest.mark.parametrize("ending", [".txt", ".jsonl"])
def test_ranges_of_a_file_have_each_document_once(tmp_path, ending, boundary):
    """For any size of the parts, so wherever they are cut: in a line, at its end, between blank lines."""
    documents = [[f"Sentence {i} {'x' * (i * 7 % 23)}." for i in range(n)] for n in (1, 3, 1, 2, 5, 1)]
    if ending == ".jsonl":
        text = "\n".join(json.dumps({"text": document}) for document in documents)
    elif boundary == "line":
        documents = [[sentence] for document in documents for sentence in document]
        text = "\n".join(sentence for document in documents for sentence in document)
    else:
        text = "\n\n \r\n".join("\n".join(document) for document in documents)
    path = tmp_path / f"a{ending}"
    path.write_text(text, newline="")
    for part_bytes in [*range(1, 40), len(text) - 1, len(text)]:
        options = {"boundary": boundary, "part_bytes": part_bytes, "sentences": "lines"}
        assert read(path, **options) == (documents, []), part_bytes


def test_a_long_document_is_cut_and_a_long_line_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr("bert_fast.data.files._MAX_DOCUMENT", 20)
    monkeypatch.setattr("bert_fast.data.files._MAX_LINE", 30)
    (tmp_path / "a.txt").write_text("Line one.\nLine two.\nLine three.\n\n" + "x" * 100 + "\n\nShort again.\n")
    documents, problems = read(tmp_path / "a.txt")
    assert documents == [["Line one.", "Line two."], ["Line three."], ["Short again."]]
    assert [problem for problem, _ in problems] == ["malformed"]


@pytest.mark.parametrize(
    ("name", "content", "problem", "message"),
    [
        ("a.txt", b"fine\n\nb\xe9t\n", "undecodable", "a.txt, line 3: not UTF-8 (invalid continuation byte at byte 1"),
        ("a.txt", b"fine\n\n\0\1\2\3\4 x\n", "control_characters", "line 3: 5 of 7 characters are control characters"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "malformed", "a.jsonl, line 2: not JSON (Expecting value at column"),
        ("a.jsonl", b'{"text": "x"}\n"just text"\n', "malformed", "a.jsonl, line 2: a JSON str; expected an object"),
        ("a.jsonl", b'{"text": "x"}\n{"other": "y"}\n', "missing", "line 2: no column 'text'; it has 'other'"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": 3}\n',
            "missing",
            "line 2: the value is int; expected text or",
        ),
        ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "missing", "line 2: the value is null; expected text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": " "}\n', "near_empty", "line 2: 0 characters"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}\n', "undecodable", "line 2: not Unicode (surrogates"),
        ("a.csv", b"text,n\nhello,1\nhello\n", "malformed", "a.csv, line 3: 1 fields; expected 2 as in the header"),
        ("a.csv", b"text\nfine\nb\xe9t\n", "undecodable", "a.csv, line 3: not Unicode (surrogates"),
    ],
    ids=lambda value: value.decode("latin-1")[:20] if isinstance(value, bytes) else "",
)
def test_a_broken_document_is_dropped_and_named(tmp_path, name, content, problem, message):
    (tmp_path / name).write_bytes(content)
    documents, problems = read(tmp_path / name)
    assert len(documents) == 1
    [(dropped, text)] = problems
    assert dropped == problem
    assert message in text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"p": "x", "q": "y"}\n', r"line 1: can't infer the text column from 'p', 'q'; set text_column"),
        ("a.docx", b"", r"a\.docx ends in '\.docx'; expected one of \.txt, \.jsonl, \.csv, \.parquet"),
        ("a.parquet.gz", b"", r"a\.parquet\.gz ends in '\.parquet\.gz'; expected one of"),
        ("README", b"", r"README ends in 'nothing'; expected one of"),
    ],
    ids=["column", "docx", "parquet-gz", "no-ending"],
)
def test_a_broken_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path / name)


def test_a_missing_text_column_is_refused(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: no column 'prose'; it has 'text'"):
        read(tmp_path / "a.parquet", text_column="prose")
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: no row has the column 'prose'; .* line 1 has 'text'"):
        read(tmp_path / "a.jsonl", text_column="prose")


def test_missing_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"is no file or folder; expected a path, a pattern, a URL, 'builtin' or"):
        read(tmp_path / "none.txt")
    with pytest.raises(ValueError, match=r"has no file that ends in \.txt, \.jsonl"):
        read(*[tmp_path] if (tmp_path / "x.md").write_text("x") else [])
    with pytest.raises(ValueError, match=r"the source .*\*\.txt has no file"):
        read(tmp_path / "*.txt")
    with pytest.raises(ValueError, match=r"nosuch://x/a\.txt can't be opened: .*pip install 'bert_fast\[data\]'"):
        read("nosuch://x/a.txt")


def test_datasets_is_optional_and_the_error_has_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"source 'datasets:imdb' needs the package datasets: pip install"):
        read("datasets:imdb")


def test_datasets_are_streamed_shard_by_shard(monkeypatch):
    class FakeStream(list):
        num_shards = 2

        def shard(self, num_shards: int, index: int) -> list[dict[str, object]]:
            assert num_shards == 2
            return self[index::2]

    class FakeDatasets:
        @staticmethod
        def load_dataset(name: str, configuration: str | None, split: str, streaming: bool) -> FakeStream:
            assert (name, configuration, split, streaming) == ("wiki", "en", "train", True)
            return FakeStream({"id": 7, "text": " ".join(document)} for document in TWO)

    monkeypatch.setitem(sys.modules, "datasets", FakeDatasets)
    assert read("datasets:wiki:en") == (TWO, [])
    assert len(plan_parts(settings("datasets:wiki:en"))) == 2
