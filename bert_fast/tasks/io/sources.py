"""Reading tables: csv, tsv, jsonl, json, parquet, CoNLL and text files, and data sets of the package `datasets`."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bert_fast._text import read_lines
from bert_fast.tasks.io import conll
from bert_fast.tasks.io.conll import read_conll
from bert_fast.tasks.io.data_sets import read_dataset, read_folder, read_parquet
from bert_fast.tasks.io.separated import read_separated
from bert_fast.tasks.io.squad import is_squad, squad_table
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import FormatSettings

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", *conll.SUFFIXES, ".txt")
_UTF_32 = (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LEGACY = ("cp1252", "gb18030", "shift_jis", "cp1251")  # that a message may suggest


def read_table(source: str | Path, names: Sequence[str] | None = None, settings: FormatSettings | None = None) -> Table:
    """Read all rows of a source.

    The suffix of a file, which .gz may follow (except for .parquet), is its format:

        .csv            comma-separated, quoted as in RFC 4180; the first line is the header
        .tsv            tab-separated, without quoting
        .jsonl          one object per line
        .json           a list of objects, an object of lists, or SQuAD's format (one row per question)
        .parquet        Parquet
        .conll .conllu .iob .iob2 .bio .bioes .bmes
                        one word and its tag per line, blank lines between sentences: columns `tokens` and `tags`
        .txt            one text per line: column `text`

    Text is UTF-8, and a line ends at a line feed alone. Other delimiters, quoting and UTF-16 are detected; see
    `read_separated` and `read_conll`. A folder written by `datasets.Dataset.save_to_disk` is read with pyarrow;
    `datasets:NAME[:CONFIGURATION[:SPLIT]]` loads a data set with the package `datasets`. Class indices of both, and of
    Parquet files that `datasets` wrote, become class names.

    Args:
        source: a file, a folder or `datasets:NAME`.
        names: the column names of a .csv or .tsv file without a header.
        settings: delimiter, quoting and encoding of text files.

    Returns:
        The table; its row numbers are lines for text formats, its notes what was detected.

    Raises:
        ValueError: the source does not exist, its format is unknown, or the file is malformed; the message names file
            and line.
    """
    settings = settings or FormatSettings()
    if str(source).startswith("datasets:"):
        return read_dataset(str(source).removeprefix("datasets:"))
    path = Path(source)
    if path.is_dir():
        return read_folder(path)
    if not path.is_file():
        raise ValueError(f"source {str(source)!r} does not exist; expected a file, a folder or 'datasets:NAME'")
    suffix = (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()
    if names and suffix not in (".csv", ".tsv"):
        raise ValueError(f"{path}: names is set; expected only for .csv and .tsv files without a header")
    if suffix == ".parquet":
        return read_parquet(path)
    if suffix not in FORMATS:
        raise ValueError(f"{path} has the suffix {suffix!r}; expected one of {', '.join(FORMATS)}")
    lines, note = _lines(path, settings.encoding)
    table = _read_text(lines, str(path), suffix, names, settings)
    return table.with_note(note) if note else table


def _read_text(
    lines: Iterator[tuple[int, str]], source: str, suffix: str, names: Sequence[str] | None, settings: FormatSettings
) -> Table:
    if suffix in (".csv", ".tsv"):
        return read_separated(lines, source, suffix, names, settings)
    if suffix == ".jsonl":
        return read_jsonl(lines, source)
    if suffix == ".json":
        return _read_json(lines, source)
    if suffix in conll.SUFFIXES:
        return read_conll(lines, source)
    return read_text(lines, source)


def _lines(path: Path, encoding: str | None) -> tuple[Iterator[tuple[int, str]], str]:
    """The lines of a file, and a note about its encoding, "" if that is UTF-8 or was given."""
    if encoding is not None:
        return _decoded_lines(path, encoding), ""
    start = _content(path, 4)
    if start in _UTF_32:
        return _decoded_lines(path, "utf-32"), "encoding UTF-32 detected"
    if start[:2] in _UTF_16:
        return _decoded_lines(path, "utf-16"), "encoding UTF-16 detected"
    if len(start) == 4 and start.count(0) == 2 and (start[0] == 0) != (start[1] == 0):  # two characters of ASCII
        encoding = "utf-16-le" if start[1] == 0 else "utf-16-be"
        return _decoded_lines(path, encoding), f"encoding {encoding.upper()} detected"
    return _utf8_lines(path), ""


def _utf8_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        yield from read_lines(path)
    except ValueError as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        fitting = [name for name in _LEGACY if _decodes(_content(path), name)]
        hint = f" (it is valid {', '.join(fitting)}, for example)" if fitting else ""
        raise ValueError(f"{error}; set format.encoding to its encoding{hint}") from error


def _decoded_lines(path: Path, encoding: str) -> Iterator[tuple[int, str]]:
    content = _content(path)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not {encoding} ({error.reason} at byte {error.start})") from error
    lines = text.removesuffix("\n").split("\n") if text else []
    yield from read_lines([f"{line}\n" for line in lines], str(path))


def _content(path: Path, size: int = -1) -> bytes:
    """The first `size` bytes of a file, decompressed; all by default."""
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return file.read(size)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path}: not a valid gzip file ({error})") from error


def _decodes(content: bytes, encoding: str) -> bool:
    try:
        content.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def read_text(lines: Iterable[tuple[int, str]], source: str) -> Table:
    """A table of the lines that are not blank: the column `text`."""
    rows = [(number, line) for number, line in lines if line.strip()]
    return Table({"text": [line for _, line in rows]}, source, [number for number, _ in rows], "line")


def read_jsonl(lines: Iterable[tuple[int, str]], source: str) -> Table:
    """A table of one JSON object per line; blank lines are skipped.

    Raises:
        ValueError: a line is no JSON object; the message names it.
    """
    rows, numbers = [], []
    for number, line in lines:
        if not line.strip():
            continue
        row = _parse_json(line, source, number)
        if not isinstance(row, dict):
            raise ValueError(f"{source}, line {number}: a JSON {type(row).__name__}; expected an object")
        rows.append(row)
        numbers.append(number)
    return _table_of_objects(rows, source, numbers, "line")


def _parse_json(text: str, source: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        number = error.lineno if line is None else line
        raise ValueError(f"{source}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # an integer of more digits than Python reads, or deep nesting
        where = source if line is None else f"{source}, line {line}"
        raise ValueError(f"{where}: JSON that can't be read ({error})") from error


def _table_of_objects(rows: list[dict[str, Any]], source: str, numbers: list[int], unit: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table({name: [row.get(name) for row in rows] for name in names}, source, numbers, unit)


def _read_json(lines: Iterable[tuple[int, str]], source: str) -> Table:
    content = _parse_json("\n".join(line for _, line in lines), source)
    if is_squad(content):
        return squad_table(content, source)
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return _table_of_objects(content, source, [], "row")
    if isinstance(content, dict) and content and all(isinstance(values, list) for values in content.values()):
        return Table(content, source)
    raise ValueError(f"{source}: expected a list of objects, or an object of lists of equal length")
