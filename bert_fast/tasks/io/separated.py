"""Comma- and tab-separated files: their delimiter, quoting and header, given or detected."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import Any, NamedTuple

from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import FormatSettings

_DELIMITERS = (",", "\t", ";", "|")
_NAMES = {"\t": "tab"}
_SPACED_QUOTE = re.compile(' +"')
_QUOTED = re.compile(r'"(?:[^"]|"")*"', re.DOTALL)


class _Dialect(NamedTuple):
    """How fields are separated and quoted; quote and escape are "" if there is none."""

    delimiter: str
    quote: str
    escape: str
    spaced: bool = False  # whether spaces after a delimiter belong to it


class _Record(NamedTuple):
    """The fields of a row, and the number of its first line."""

    line: int
    fields: list[str]


class _Malformed(NamedTuple):
    """Why and where a file can't be parsed in a dialect."""

    line: int
    reason: str


def read_separated(
    lines: Iterable[tuple[int, str]], source: str, suffix: str, names: Sequence[str] | None, settings: FormatSettings
) -> Table:
    """The table of a .csv or .tsv file.

    What `settings` leaves open is detected. The delimiter is the one of the suffix unless only another of comma, tab,
    semicolon and bar gives all rows the fields of the header. In .csv files fields are quoted as in RFC 4180, or with
    backslashes where only that fits; in .tsv files quotation marks are ordinary characters, as in GLUE, unless they
    are doubled inside quoted fields, or the file can't be read without. What differs from the suffix is in the table's
    notes.

    Args:
        lines: their numbers and texts.
        source: the name of the file, for messages.
        suffix: .csv or .tsv.
        names: the column names of a file without a header.
        settings: delimiter, quote and escape, each None to detect it.

    Raises:
        ValueError: the file is malformed; the message names the line.
    """
    texts = list(lines)
    if len(texts) == 1 and "\r" in texts[0][1]:
        raise ValueError(f"{source}: lines end in carriage returns; expected line feeds")
    usual = "," if suffix == ".csv" else "\t"
    if settings.delimiter is None and texts and (hint := re.fullmatch(r"sep=(.)", texts[0][1])):  # by Excel
        settings, texts = replace(settings, delimiter=hint[1]), texts[1:]
    limit = csv.field_size_limit(2**31 - 1)  # a field may hold a document
    try:
        dialect, records = _detect(texts, usual, names, settings)
    finally:
        csv.field_size_limit(limit)
    if isinstance(records, _Malformed):
        raise ValueError(f"{source}, line {records.line}: not CSV ({records.reason})")
    header = list(names) if names else _header(records, source)
    rows = records if names else records[1:]
    for line, fields in rows:
        if len(fields) != len(header):
            origin = "names" if names else "the header"
            raise ValueError(
                f"{source}, line {line}: {len(fields)} fields; expected {len(header)} as in {origin}; "
                "set format.quote, format.escape or format.delimiter if fields are quoted or separated otherwise"
            )
    columns: dict[str, list[Any]] = {name: [row.fields[i] for row in rows] for i, name in enumerate(header)}
    return Table(columns, source, [row.line for row in rows], "line", tuple(_notes(dialect, usual, settings)))


def _header(records: Sequence[_Record], source: str) -> list[str]:
    """The names in the first record; unnamed columns, as of an index that pandas writes, are column1, column2 ..."""
    names = [name.strip() or f"column{i + 1}" for i, name in enumerate(records[0].fields)] if records else []
    if repeated := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{source}: duplicate columns in the header: {', '.join(repeated)}; expected distinct names")
    return names


def _notes(dialect: _Dialect, usual: str, settings: FormatSettings) -> list[str]:
    """What was detected and differs from what the suffix says."""
    notes = []
    if settings.delimiter is None and dialect.delimiter != usual:
        notes.append(f"delimiter {_NAMES.get(dialect.delimiter, repr(dialect.delimiter))} detected (format.delimiter)")
    if settings.quote is None and bool(dialect.quote) != (usual == ","):
        how = "quoted fields" if dialect.quote else "quotation marks as ordinary characters"
        notes.append(f"{how} detected (format.quote)")
    if dialect.spaced:
        notes.append("spaces before quotation marks ignored (format.quote)")
    if settings.escape is None and dialect.escape:
        notes.append("escapes by backslash detected (format.escape)")
    return notes


def _detect(
    lines: Sequence[tuple[int, str]], usual: str, names: Sequence[str] | None, settings: FormatSettings
) -> tuple[_Dialect, list[_Record] | _Malformed]:
    """The dialect, and the records in it."""
    others = [delimiter for delimiter in _DELIMITERS if delimiter != usual]
    delimiters = [usual, *others] if settings.delimiter is None else [settings.delimiter]
    default: tuple[_Dialect, list[_Record] | _Malformed] | None = None
    for delimiter in delimiters:
        for dialect in _quotings(delimiter, usual, settings):
            escaped = ('\\"', f"\\{delimiter}")
            if settings.escape is None and dialect.escape and not any(x in line for _, line in lines for x in escaped):
                continue
            records = _records(lines, dialect)
            if settings.quote is None and dialect.quote and _has_spaced_quotes(records):
                spaced = dialect._replace(spaced=True)
                if _consistent(parsed := _records(lines, spaced), names):
                    dialect, records = spaced, parsed
            default = default or (dialect, records)
            if not _consistent(records, names):
                continue
            if settings.quote is None and usual == "," and not dialect.quote and _has_quoted_fields(records):
                continue  # of a quoted file with a broken line, which shall be named
            if settings.quote is None and usual == "\t" and not dialect.quote:
                quoted = _Dialect(delimiter, '"', settings.escape or "")
                parsed = _records(lines, quoted)
                if _consistent(parsed, names) and _shows_quoting(records):
                    return quoted, parsed
            return dialect, records
    assert default is not None
    return default


def _quotings(delimiter: str, usual: str, settings: FormatSettings) -> list[_Dialect]:
    """The dialects with this delimiter to try, the most likely first."""
    if settings.quote is not None or len(delimiter) > 1:
        escapes = ["", "\\"] if settings.escape is None and settings.quote else [settings.escape or ""]
        return [_Dialect(delimiter, settings.quote or "", escape) for escape in escapes]
    if settings.escape is not None:
        quotes = ['"', ""] if usual == "," else ["", '"']
        return [_Dialect(delimiter, quote, settings.escape) for quote in quotes]
    quoted, escaped, plain = (_Dialect(delimiter, *x) for x in (('"', ""), ('"', "\\"), ("", "")))
    return [quoted, escaped, plain] if usual == "," else [plain, quoted, escaped]


def _records(lines: Sequence[tuple[int, str]], dialect: _Dialect) -> list[_Record] | _Malformed:
    """The records in a dialect, without empty lines; or where it does not fit."""
    if not dialect.quote and not dialect.escape:
        return [_Record(number, line.split(dialect.delimiter)) for number, line in lines if line]
    offset = lines[0][0] - 1 if lines else 0
    reader = csv.reader(
        (line + "\n" for _, line in lines),
        delimiter=dialect.delimiter,
        quotechar=dialect.quote or None,
        quoting=csv.QUOTE_MINIMAL if dialect.quote else csv.QUOTE_NONE,
        escapechar=dialect.escape or None,
        doublequote=not dialect.escape,
        skipinitialspace=dialect.spaced,
        strict=True,
    )
    return _read_all(reader, offset)


def _read_all(reader: Any, offset: int) -> list[_Record] | _Malformed:
    records: list[_Record] = []
    rows: Iterator[list[str]] = iter(reader)
    while True:
        line = offset + reader.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return records
        except csv.Error as error:
            return _Malformed(offset + reader.line_num, str(error))
        if row:
            records.append(_Record(line, row))


def _consistent(records: list[_Record] | _Malformed, names: Sequence[str] | None) -> bool:
    """Whether all records have as many fields as the header or `names`, at least two."""
    if isinstance(records, _Malformed) or not records:
        return False
    width = len(names) if names else len(records[0].fields)
    return width > 1 and all(len(record.fields) == width for record in records)


def _has_spaced_quotes(records: list[_Record] | _Malformed) -> bool:
    """Whether fields begin with spaces and a quotation mark, all of them in the columns where one does: "a", "b"."""
    if isinstance(records, _Malformed) or not records:
        return False
    columns = zip_longest(*(record.fields for record in records[1:]), fillvalue="")
    return any(all(map(_SPACED_QUOTE.match, column)) for column in columns)


def _has_quoted_fields(records: list[_Record] | _Malformed) -> bool:
    assert not isinstance(records, _Malformed)
    return any(_QUOTED.fullmatch(field) for record in records for field in record.fields)


def _shows_quoting(records: list[_Record] | _Malformed) -> bool:
    """Whether fields, read without quoting, are quoted: all that begin with a quotation mark are quoted in full, and
    some have doubled ones inside, or the whole header is quoted."""
    assert not isinstance(records, _Malformed)
    fields = [field for record in records for field in record.fields if field.startswith('"')]
    if not fields or not all(_QUOTED.fullmatch(field) for field in fields):
        return False
    return any('""' in field[1:-1] for field in fields) or all(x.startswith('"') for x in records[0].fields)
