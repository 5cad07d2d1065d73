"""CoNLL files: one word a line with its columns, blank lines between sentences; and CoNLL-U."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from bert_fast.tasks.io.table import Table

SUFFIXES = (".conll", ".conllu", ".iob", ".iob2", ".bio", ".bioes", ".bmes")
CONLLU = ("id", "tokens", "lemma", "upos", "xpos", "feats", "head", "deprel", "deps", "misc")
_BLANKS = re.compile(r"[ \t]+")
_ID = re.compile(r"\d{1,9}(?:[-.]\d{1,9})?", re.ASCII)


class _Line(NamedTuple):
    """A line of a word: its number, its fields, and whether it is the first of its sentence."""

    number: int
    fields: list[str]
    first: bool


def read_conll(lines: Iterable[tuple[int, str]], source: str) -> Table:
    """One row a sentence, one list a column: `tokens` and `tags`, the first and the last column of the file.

    Columns are separated by tabs where most lines have one, else by spaces and tabs. Columns in between are column2,
    column3 ...; a first column that counts the words of each sentence is not the words. A file of ten columns that
    counts its words is CoNLL-U, with the names of `CONLLU`; the lines of multiword tokens (1-2) and empty nodes (1.1)
    are skipped. So are -DOCSTART- lines and comments: lines that begin with # and have another number of columns than
    the others, or that have a # alone and a tag that no other line has.

    Args:
        lines: their numbers and texts.
        source: the name of the file, for messages.

    Raises:
        ValueError: a line has another number of columns than most, or no word or tag; the message names the line.
    """
    words, comments = _word_lines(list(lines), source)
    if not words:
        return Table({"tokens": [], "tags": []}, source, unit="line")
    width = len(words[0].fields)
    counts_words = width > 2 and _first_column_counts(words)
    notes = [f"{comments} lines of comments"] if comments else []
    if width == len(CONLLU) and counts_words:
        names = list(CONLLU)
        notes.append("CoNLL-U")
    else:
        names = [f"column{number + 1}" for number in range(width)]
        names[1 if counts_words else 0], names[-1] = "tokens", "tags"
        if counts_words:
            names[0] = "id"
    if counts_words:
        syntactic = [line for line in words if line.fields[0].isdecimal()]
        if len(syntactic) < len(words):
            notes.append(f"{len(words) - len(syntactic)} lines of multiword tokens or empty nodes skipped")
        words = _restart(words, syntactic)
    return _sentences(words, names, source, notes)


def _word_lines(lines: list[tuple[int, str]], source: str) -> tuple[list[_Line], int]:
    """The lines of words, with equal numbers of fields, and the number of comments."""
    stripped = [(number, line.strip("\r").rstrip(" \t\r")) for number, line in lines]
    content = [(number, line) for number, line in stripped if line.strip(" \t")]
    tabs = sum("\t" in line for _, line in content) * 2 > len(content)
    split = {number: _fields(line, tabs) for number, line in content if not line.startswith("-DOCSTART-")}
    sure = [fields for fields in split.values() if not fields[0].startswith("#")]
    sizes = Counter(map(len, sure or split.values()))
    width = max(sizes, key=lambda size: (sizes[size], size), default=2)
    tags = {fields[-1] for fields in sure if len(fields) == width}
    words: list[_Line] = []
    first, comments = True, 0
    for number, line in stripped:
        if number not in split:  # blank, or -DOCSTART-
            first = True
            continue
        fields = split[number]
        if line.startswith("#begin document"):
            raise ValueError(f"{source}, line {number}: the coreference format of CoNLL-2012; expected words and tags")
        unlike_words = len(fields) != width or (
            fields[0].split(" ")[0] == "#" and bool(sure) and fields[-1] not in tags
        )
        if line.startswith("#") and unlike_words:
            comments += 1
            continue
        if len(fields) < 2 or not fields[0] or not fields[-1]:
            raise ValueError(f"{source}, line {number}: {line!r}; expected a token and its tag, or a blank line")
        if len(fields) != width:
            separator = "tab-separated columns" if tabs else "columns"
            raise ValueError(
                f"{source}, line {number}: {line!r} has {len(fields)} {separator}; expected {width} as on most lines"
            )
        words.append(_Line(number, fields, first))
        first = False
    return words, comments


def _fields(line: str, tabs: bool) -> list[str]:
    return [field.strip(" ") for field in line.split("\t")] if tabs else _BLANKS.split(line.strip(" \t"))


def _first_column_counts(words: list[_Line]) -> bool:
    """Whether the first column numbers the words of each sentence, from 0 or 1."""
    if not all(_ID.fullmatch(line.fields[0]) for line in words):
        return False
    expected, longer = 0, False
    for line in words:
        if line.first:
            expected = 0 if line.fields[0] == "0" else 1
        if line.fields[0].isdecimal():
            if int(line.fields[0]) != expected:
                return False
            longer |= not line.first
            expected += 1
    return longer or len(words[0].fields) == len(CONLLU)


def _restart(words: list[_Line], kept: list[_Line]) -> list[_Line]:
    """`kept`, lines out of `words`, the first of each sentence marked as such."""
    sentence, of_line = 0, {}
    for line in words:
        sentence += line.first
        of_line[line.number] = sentence
    before = 0
    marked = []
    for line in kept:
        marked.append(line._replace(first=of_line[line.number] != before))
        before = of_line[line.number]
    return marked


def _sentences(words: list[_Line], names: list[str], source: str, notes: list[str]) -> Table:
    columns: dict[str, list[list[str]]] = {name: [] for name in names if name != "id"}
    numbers = []
    for line in words:
        if line.first:
            numbers.append(line.number)
            for values in columns.values():
                values.append([])
        for name, field in zip(names, line.fields, strict=True):
            if name != "id":
                columns[name][-1].append(field)
    return Table(columns, source, numbers, "line", tuple(notes))
