"""Files with delimiters: dialects of public data and of programs, given or detected."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path
from typing import Any

import pytest

from bert_fast.tasks.io.columns import describe_columns
from bert_fast.tasks.io.sources import read_table
from bert_fast.tasks.settings import FormatSettings

ROWS = [['she said "no", twice', "bad"], ["schön; 好 | 🙂", "good"], ["'tab' \\ and, more", "bad"], ["x", "good"]]


def written(delimiter: str, **settings: Any) -> str:
    """The rows as the csv module writes them."""
    file = io.StringIO()
    csv.writer(file, delimiter=delimiter, lineterminator="\n", **settings).writerows([["text", "label"], *ROWS])
    return file.getvalue()


def read(path: Path, content: str | bytes, names: list[str] | None = None, **settings: Any) -> Any:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_table(path, names, FormatSettings(**settings))


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL], ids=["some quoted", "all quoted"])
def test_delimiters_are_detected_and_noted(suffix: str, delimiter: str, quoting: int, tmp_path: Path) -> None:
    table = read(tmp_path / f"a{suffix}", written(delimiter, quoting=quoting))
    assert [[text, label] for text, label in zip(table["text"], table["label"], strict=True)] == ROWS
    usual = {".csv": ",", ".tsv": "\t"}[suffix]
    note = "delimiter tab detected" if delimiter == "\t" else f"delimiter {delimiter!r} detected"
    assert any(note in line for line in table.notes) == (delimiter != usual)
    for line in table.notes:
        assert line in describe_columns(table, {"text": "text"})


@pytest.mark.parametrize("delimiter", [",", ";"])
def test_backslashes_before_quotes_are_detected(delimiter: str, tmp_path: Path) -> None:
    content = written(delimiter, escapechar="\\", doublequote=False, quoting=csv.QUOTE_ALL)
    table = read(tmp_path / "a.csv", content)
    assert [list(row) for row in zip(table["text"], table["label"], strict=True)] == ROWS
    assert "escapes by backslash detected (format.escape)" in table.notes
    table = read(tmp_path / "c.csv", f"text{delimiter}label\na\\{delimiter} b{delimiter}1\nc{delimiter}0\n")
    assert table["text"] == [f"a{delimiter} b", "c"]
    # Backslashes that escape nothing are text.
    table = read(tmp_path / "b.csv", 'path,label\n"C:\\dir\\",1\n"D:\\n",0\n')
    assert table["path"] == ["C:\\dir\\", "D:\\n"]
    assert table.notes == ()


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        # QNLI, MNLI, QQP: quotation marks are text, also unbalanced and at both ends.
        ("q.tsv", 'question\tlabel\n"Why?" he said\t1\n"Why?"\t0\n"open\t0\n', ['"Why?" he said', '"Why?"', '"open']),
        # pandas' to_csv(sep="\t"): quoted where needed, quotation marks doubled.
        ("p.tsv", '\tquestion\tlabel\n0\t"she said ""no"""\tyes\n1\tplain\tno\n', ['she said "no"', "plain"]),
        ("r.tsv", '"question"\t"label"\n"Why?"\t1\n"a\tb"\t0\n', ["Why?", "a\tb"]),
        ("n.tsv", 'question\tlabel\n"two\nlines"\t1\nb\t0\n', ["two\nlines", "b"]),
        ("e.csv", 'sep=;\nquestion;label\n"a;b";1\nc;0\n', ["a;b", "c"]),
        ("w.csv", "question,label\r\n\"two\r\nlines\",1\r\nb,0\r\n", ["two\nlines", "b"]),
        ("s.csv", " question , label\na,1\n b,0\n", ["a", " b"]),
        ("u.csv", "question,label\na\u2028b\u0085c\x0bd\x0ce\x1cf,1\ng,0\n", ["a\u2028b\u0085c\x0bd\x0ce\x1cf", "g"]),
        ("i.csv", 'question,label\n5" disk,1\nsaid "x" twice,0\n', ['5" disk', 'said "x" twice']),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value and len(value) < 8 else "",
)  # fmt: skip
def test_quoting_of_public_files(name: str, content: str, rows: list[str], tmp_path: Path) -> None:
    assert read(tmp_path / name, content)["question"] == rows


@pytest.mark.parametrize(
    ("content", "text", "label"),
    [
        ('text, label\n"a, b", "x"\n"c", "y"\n', ["a, b", "c"], ["x", "y"]),
        ('"label", "text"\n"x", "a, b"\n"y", "c, ""d"" e"\n', ["a, b", 'c, "d" e'], ["x", "y"]),
        ('label,text\nx, "a" he said\ny, "b" she said\n', [' "a" he said', ' "b" she said'], ["x", "y"]),
        ('label,text\n"x,1", "a" he said\ny, "b" she said\n', [' "a" he said', ' "b" she said'], ["x,1", "y"]),
    ],
)
def test_spaces_before_quotation_marks(content: str, text: list[str], label: list[str], tmp_path: Path) -> None:
    table = read(tmp_path / "a.csv", content)
    assert (table["text"], table["label"]) == (text, label)
    assert any("spaces before quotation marks" in note for note in table.notes) == (text[0][0] != " ")


def test_files_without_a_header_and_columns_without_a_name(tmp_path: Path) -> None:
    cola = 'gj04\t1\t\tOur friends "won\'t" buy it.\ngj04\t0\t*\tThey drank the pub.\n'
    table = read(tmp_path / "cola.tsv", cola, ["source", "label", "mark", "text"])
    assert table["text"] == ['Our friends "won\'t" buy it.', "They drank the pub."]
    assert table["label"] == ["1", "0"]
    table = read(tmp_path / "index.csv", ",text,,label\n0,a,x,1\n1,b,y,0\n")
    assert list(table.columns) == ["column1", "text", "column3", "label"]
    with pytest.raises(ValueError, match=r"duplicate columns in the header: text; expected distinct names"):
        read(tmp_path / "twice.csv", "text,text,label\na,b,1\n")


def test_what_is_given_is_not_detected(tmp_path: Path) -> None:
    table = read(tmp_path / "a.csv", "text;label,x\na;1,5\nb;0,5\n", delimiter=";")
    assert table.columns == {"text": ["a", "b"], "label,x": ["1,5", "0,5"]}
    table = read(tmp_path / "b.csv", "text::label\na, b::1\nc::0\n", delimiter="::")
    assert table.columns == {"text": ["a, b", "c"], "label": ["1", "0"]}
    table = read(tmp_path / "c.csv", "text,label\n'a, b',1\nc,0\n", quote="'")
    assert table["text"] == ["a, b", "c"]
    table = read(tmp_path / "d.csv", 'text,label\n"a",1\n', quote="")
    assert table["text"] == ['"a"']
    table = read(tmp_path / "e.tsv", 'text\tlabel\n"a"\t1\n', quote='"')
    assert table["text"] == ["a"]
    assert FormatSettings("tab") == FormatSettings("\\t") == FormatSettings("\t")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delimiter": ""}, "format.delimiter is empty"),
        ({"delimiter": "\n"}, r"format.delimiter is '\\n', a line end or the quote"),
        ({"delimiter": "::", "quote": '"'}, "format.delimiter is '::'; quoting needs one character"),
        ({"quote": "''"}, "format.quote is \"''\"; expected one character"),
        ({"encoding": "utf-99"}, "format.encoding is 'utf-99'; expected a codec"),
        ({"encoding": "rot13"}, "format.encoding is 'rot13'; expected a codec"),
    ],
)
def test_settings_that_can_not_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FormatSettings(**settings)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\n"a",1\n"b" c,0\n"d",1\n', "line 3: not CSV"),
        ('text,label\n"a",1\n"b,0\n"d",1\n', "not CSV"),
        ("text;label\na;1\nb\nc;0\n", "line 2: 1 fields"),
        ("text,label\na,1\nb,2,3\n", "line 3: 3 fields; expected 2 as in the header"),
        ("text,label\ra,1\rb,0\r", "lines end in carriage returns; expected line feeds"),
    ],
)
def test_a_broken_line_is_named_and_does_not_change_how_others_are_read(
    content: str, message: str, tmp_path: Path
) -> None:
    if "1 fields" in message:  # no delimiter fits every line: the one of the suffix is taken
        assert read(tmp_path / "a.csv", content).columns == {"text;label": ["a;1", "b", "c;0"]}
        return
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "a.csv", content)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_encodings_of_unicode_are_detected(encoding: str, packed: bool, tmp_path: Path) -> None:
    content = written(",").encode(encoding)
    table = read(tmp_path / ("a.csv.gz" if packed else "a.csv"), gzip.compress(content) if packed else content)
    assert [list(row) for row in zip(table["text"], table["label"], strict=True)] == ROWS
    assert list(table.columns) == ["text", "label"]
    assert table.notes == (() if encoding.startswith("utf-8") else (f"encoding {encoding.upper()} detected",))


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "conll", "txt"])
def test_an_encoding_is_given_or_the_error_names_the_line_and_the_setting(suffix: str, tmp_path: Path) -> None:
    line = {"jsonl": '{"a": "naïve"}', "json": '[{"a":\n "naïve"}]', "conll": "naïve O"}.get(suffix, "naïve")
    path = tmp_path / f"a.{suffix}"
    path.write_bytes((line + "\n").encode("cp1252"))
    with pytest.raises(ValueError, match=rf"a.{suffix}, line \d: not UTF-8 .*set format.encoding .*valid cp1252"):
        read_table(path)
    table = read_table(path, ["a"] if suffix in ("csv", "tsv") else None, FormatSettings(encoding="cp1252"))
    assert "naïve" in str(table.columns)
    with pytest.raises(ValueError, match=rf"a.{suffix}, line \d: not gb2312"):
        read_table(path, None, FormatSettings(encoding="gb2312"))
