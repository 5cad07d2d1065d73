"""Reads the raw documents of a piece of a source, one at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from bert_fast.data.builtin import builtin_documents
from bert_fast.data.cleaning import Raw, is_text
from bert_fast.data.prepare_config import PrepareConfig
from bert_fast.data.sources import DamagedFileError, Piece, open_dataset, open_file, open_parquet

_USUAL_COLUMNS = ("text", "content", "document", "body", "sentences")
_MAX_LINE = 2**26  # bytes; a longer line is not text and is skipped without being read into memory
_MAX_DOCUMENT = 2**24  # bytes; a longer document of a .txt file is cut after a line


def read_piece(piece: Piece, config: PrepareConfig) -> Iterator[Raw]:
    """The documents of a piece, in order.

    A row that can't be read is a `Raw` with its problem, and so is the rest of a damaged file. A byte range contains
    the documents that begin in it: in a .txt file with blank lines, those after the first blank line that begins in it.

    Raises:
        ValueError: the disk or the network fails, or no row has the requested column; the message names the file.
    """
    try:
        yield from _read(piece, config)
    except DamagedFileError as error:
        yield Raw(piece.name, None, "damaged", str(error).removeprefix(f"{piece.name}: "))


def _read(piece: Piece, config: PrepareConfig) -> Iterator[Raw]:
    if piece.kind == "builtin":
        return (Raw("builtin", document) for document in builtin_documents(config.packages))
    if piece.kind == ".txt":
        return _read_txt(piece, config.boundary)
    if piece.kind == ".jsonl":
        rows = _read_jsonl(piece)
    elif piece.kind == ".csv":
        rows = _read_csv(piece)
    elif piece.kind == ".parquet":
        return _read_parquet(piece, config.text_column)
    else:
        shards = open_dataset(piece.name)
        shard = shards.shard(num_shards=shards.num_shards, index=piece.start)
        rows = ((f"{piece.name}, shard {piece.start}, row {i}", row) for i, row in enumerate(shard))
    return _column(rows, piece.name, config.text_column)


def _lines(piece: Piece, *, beyond: bool = False) -> Iterator[tuple[int, str, bytes | None]]:
    """The lines that begin in the piece, or also `beyond` it: position in the file, description of it, and bytes.

    The bytes are None if the line is longer than `_MAX_LINE`.
    """
    with open_file(piece.name) as file:
        if piece.start:
            file.seek(piece.start - 1)
            _skip_line(file)
        position, number = file.tell() if piece.start else 0, 0
        while beyond or piece.end < 0 or position < piece.end:
            line = file.readline(_MAX_LINE)
            if not line:
                return
            number += 1
            where = f"{piece.name}, line at byte {position}" if piece.start else f"{piece.name}, line {number}"
            begin = position
            position += len(line)
            if len(line) == _MAX_LINE and not line.endswith(b"\n"):
                position += _skip_line(file)
                yield begin, where, None
            else:
                yield begin, where, line.removeprefix(b"\xef\xbb\xbf") if begin == 0 else line


def _skip_line(file: IO[bytes]) -> int:
    """Skip to the end of the line; returns the number of bytes."""
    skipped = 0
    while part := file.readline(2**20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


def _read_txt(piece: Piece, boundary: str) -> Iterator[Raw]:
    if boundary == "line":
        for _, where, line in _lines(piece):
            if line is None or line.strip():
                yield _decoded([(where, line)])
        return
    size = 0
    lines: list[tuple[str, bytes | None]] = []
    started = piece.start == 0
    for position, where, line in _lines(piece, beyond=True):
        blank = line is not None and not line.strip()
        if blank and boundary == "blank_line":
            if started and lines:
                yield _decoded(lines)
            lines, size, started = [], 0, True
            if 0 <= piece.end <= position:
                return
        elif not started and 0 <= piece.end <= position:
            return
        elif started:
            if lines and size + len(line or b"") > _MAX_DOCUMENT:
                yield _decoded(lines)
                lines, size = [], 0
            lines.append((where, line))
            size += len(line or b"")
    if lines:
        yield _decoded(lines)


def _decoded(lines: list[tuple[str, bytes | None]]) -> Raw:
    """The document of some lines, each with its place; the place of a problem is that of its line."""
    texts = []
    for where, line in lines:
        if line is None:
            return Raw(where, None, "malformed", f"a line of more than {_MAX_LINE >> 20} MiB")
        try:
            texts.append(line.decode())
        except UnicodeDecodeError as error:
            return Raw(where, None, "undecodable", f"not UTF-8 ({error.reason} at byte {error.start})")
    return Raw(lines[0][0], "".join(texts))


def _read_jsonl(piece: Piece) -> Iterator[tuple[str, Mapping[str, Any] | Raw]]:
    for _, where, line in _lines(piece):
        if line is not None and not line.strip():
            continue
        raw = _decoded([(where, line)])
        if raw.problem:
            yield where, raw
            continue
        try:
            row = json.loads(str(raw.value))
        except (ValueError, RecursionError) as error:  # of an integer of more than 4300 digits, a bare ValueError
            detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield where, raw._replace(problem="malformed", detail=f"not JSON ({detail})")
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            detail = f"a JSON {type(row).__name__}; expected an object with a column of text"
            yield where, raw._replace(problem="malformed", detail=detail)


def _read_csv(piece: Piece) -> Iterator[tuple[str, Mapping[str, Any] | Raw]]:
    # Bytes that are not UTF-8 become surrogates, which cleaning detects in their field.
    limit = csv.field_size_limit(_MAX_LINE)  # a field may be a document
    reader = csv.reader(_CsvLines(piece), strict=True)
    header: list[str] | None = None
    try:
        while True:
            try:
                row = next(reader, None)
            except csv.Error as error:  # the reader goes on with the next line
                where = f"{piece.name}, line {reader.line_num}"
                yield where, Raw(where, None, "malformed", f"not CSV ({error})")
                continue
            where = f"{piece.name}, line {reader.line_num}"
            if row is None:
                return
            if header is None:
                header = row
            elif row and len(row) != len(header):
                detail = f"{len(row)} fields; expected {len(header)} as in the header"
                yield where, Raw(where, None, "malformed", detail)
            elif row:
                yield where, dict(zip(header, row, strict=True))
    finally:
        csv.field_size_limit(limit)


class _CsvLines:
    """The lines of a piece for a csv.reader, which may go on after an error: a generator could not."""

    def __init__(self, piece: Piece) -> None:
        self._lines = _lines(piece)

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        _, _, line = next(self._lines)
        if line is None:
            raise csv.Error(f"more than {_MAX_LINE >> 20} MiB without a line break")
        return line.decode(errors="surrogateescape")


def _read_parquet(piece: Piece, text_column: str | None) -> Iterator[Raw]:
    from pyarrow import types

    with open_parquet(piece.name) as file:
        schema = file.schema_arrow
        column = text_column or _guess_column(piece.name, [f.name for f in schema if _holds_text(f.type)], schema.names)
        if column not in schema.names:
            raise ValueError(f"{piece.name}: no column {column!r}; it has {', '.join(map(repr, schema.names))}")
        holds_strings = types.is_string(schema.field(column).type) or types.is_large_string(schema.field(column).type)
    # Each text of a row group once in memory: a few kilobytes can repeat one of megabytes a million times.
    with open_parquet(piece.name, read_dictionary=[column] if holds_strings else None) as file:
        groups = list(range(piece.start, piece.end if piece.end >= 0 else file.metadata.num_row_groups))
        number = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
        for batch in file.iter_batches(batch_size=256, row_groups=groups, columns=[column], use_threads=False):
            for value in batch.column(0):
                yield _bounded(Raw(f"{piece.name}, row {number}", value.as_py()))
                number += 1


def _bounded(raw: Raw) -> Raw:
    """`raw`, or that its text is longer than a line may be."""
    if isinstance(raw.value, str) and len(raw.value) > _MAX_LINE:
        return raw._replace(value=None, problem="malformed", detail=f"a text of more than {_MAX_LINE >> 20} MiB")
    return raw


def _holds_text(kind: Any) -> bool:
    from pyarrow import types

    while types.is_list(kind) or types.is_large_list(kind) or types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _column(rows: Iterable[tuple[str, Mapping[str, Any] | Raw]], name: str, text_column: str | None) -> Iterator[Raw]:
    """The text of each row; if `text_column` is None, in the column guessed from the first row with text."""
    column, first_row, seen = text_column, "", False
    for where, row in rows:
        if isinstance(row, Raw):
            yield row
            continue
        first_row = first_row or f"{where} has {', '.join(map(repr, row)) or 'none'}"
        if column is None and (texts := [key for key, value in row.items() if value and is_text(value)]):
            column = _guess_column(where, texts, list(row))
        seen = seen or column in row
        if column is not None and column not in row:
            yield Raw(where, None, "missing", f"no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}")
        else:
            yield Raw(where, row[column] if column is not None else None)
    if first_row and text_column is not None and not seen:
        raise ValueError(f"{name}: no row has the column {text_column!r}; {first_row}")


def _guess_column(where: str, texts: list[str], names: list[str]) -> str:
    usual = [name for name in _USUAL_COLUMNS if name in texts]
    if usual or len(texts) == 1:
        return (usual or texts)[0]
    columns = ", ".join(map(repr, names)) or "none"
    raise ValueError(f"{where}: can't infer the text column from {columns}; set text_column")
