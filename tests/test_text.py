"""The reader of lines: line feeds alone end a line, and errors name the line."""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_fast._text import read_lines

INNER = ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\r"]


def lines_of(data: bytes) -> list[str]:
    return [line for _, line in read_lines(io.BytesIO(data))]


@pytest.mark.parametrize("separator", INNER, ids=lambda character: f"U+{ord(character):04X}")
def test_no_other_separator_ends_a_line(separator):
    assert lines_of(f"a{separator}b\r\n{separator}c\nd".encode()) == [f"a{separator}b", f"{separator}c", "d"]


@given(st.lists(st.text(st.characters(exclude_characters="\n", codec="utf-8"), max_size=8), max_size=6))
def test_lines_written_with_line_feeds_are_read_back(lines):
    lines = [line.removesuffix("\r") for line in lines]
    data = "".join(line + "\n" for line in lines).encode()
    expected = lines[:1] and [lines[0].removeprefix("\ufeff"), *lines[1:]]
    assert lines_of(data) == expected
    assert lines_of(data.replace(b"\n", b"\r\n")) == expected


def test_the_byte_order_mark_of_the_first_line_alone_is_dropped():
    assert lines_of("\ufeffa\n\ufeffb".encode()) == ["a", "\ufeffb"]
    assert list(read_lines(io.StringIO("\ufeffa\r\nb\n\n"))) == [(1, "a"), (2, "b"), (3, "")]


def test_the_last_line_needs_no_line_end_and_an_empty_text_has_no_lines():
    assert lines_of(b"a\n\nb") == ["a", "", "b"]
    assert lines_of(b"a\n\n") == ["a", ""]
    assert lines_of(b"") == []


def test_a_file_a_gzip_file_and_stdin_read_alike(tmp_path, monkeypatch):
    data = "\ufeffé\u2028x\r\nz\n".encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(data))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="latin-1"))
    for source in (tmp_path / "a.txt", str(tmp_path / "a.txt.gz"), sys.stdin):
        assert list(read_lines(source)) == [(1, "é\u2028x"), (2, "z")]


@pytest.mark.parametrize("bad", [b"ab\xff", b"ab\xed\xa0\x80", b"ab\xc3"], ids=["byte", "surrogate", "cut"])
def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path, bad):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" + bad + b"\n")
    with pytest.raises(ValueError, match=r"a\.txt, line 2: not UTF-8 \(.* at byte 2\)"):
        list(read_lines(path))
    with pytest.raises(ValueError, match=r"^stdin, line 2: not UTF-8"):
        list(read_lines(io.BytesIO(path.read_bytes()), "stdin"))


@pytest.mark.parametrize("damage", [slice(None, -6), slice(None, 12)], ids=["cut", "header"])
def test_a_damaged_gzip_file_is_named(tmp_path, damage):
    path: Path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"some text\n" * 99)[damage])
    with pytest.raises(ValueError, match=r"a\.gz: not a valid gzip file"):
        list(read_lines(path))
