"""The user's own documents: .txt, .jsonl, .csv and .parquet files, and Hugging Face datasets."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bert_fast.data.sentences import Document, as_document

FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
_USUAL_COLUMNS = ("text", "content", "document", "body", "sentences")


def find_files(source: str) -> list[Path]:
    """The file `source`, or the files with a known ending under the folder `source`, sorted.

    Raises:
        ValueError: there is nothing at that path, the folder has no such file, or the ending is not known.
    """
    path = Path(source)
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in FORMATS)
        if not found:
            raise ValueError(f"the folder {source} has no file that ends in {', '.join(FORMATS)}")
        return found
    if not path.is_file():
        raise ValueError(f"source {source!r} is no file or folder; expected a path, 'builtin' or 'datasets:NAME'")
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{source} ends in {path.suffix or 'nothing'!r}; expected one of {', '.join(FORMATS)}")
    return [path]


def read_file(path: Path, text_column: str | None = None, one_document_per_line: bool = False) -> Iterator[Document]:
    """Documents of one file, by its ending.

    .txt has a sentence a line and blank lines between documents, or a document a line. The others have a document a
    row, in the column `text_column` (guessed if None): a text, which is split into sentences, or a list of sentences.

    Raises:
        ValueError: the file is broken; its name and the line or row are in the message.
    """
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _read_txt(path, one_document_per_line)
    if suffix == ".jsonl":
        rows = _read_jsonl(path)
    elif suffix == ".csv":
        rows = _read_csv(path)
    else:
        rows = _read_parquet(path)
    return _documents(rows, text_column)


def read_dataset(name: str, text_column: str | None = None) -> Iterator[Document]:
    """Documents of the train split of a Hugging Face dataset, `NAME` or `NAME:CONFIGURATION`.

    Raises:
        ValueError: the package `datasets` is not installed, or the dataset has no such column.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"source 'datasets:{name}' needs the package datasets: pip install 'bert_fast[datasets]'"
        ) from error
    name, _, configuration = name.partition(":")
    rows = datasets.load_dataset(name, configuration or None, split="train")
    return _documents(((f"datasets:{name}, row {i}", row) for i, row in enumerate(rows)), text_column)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error


def _read_txt(path: Path, one_document_per_line: bool) -> Iterator[Document]:
    document: Document = []
    for _, line in _lines(path):
        if one_document_per_line:
            if line.strip():
                yield as_document(line) or []
        elif line.strip():
            document.append(line)
        elif document:
            yield document
            document = []
    if document:
        yield document


def _read_jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON {type(row).__name__}; expected an object with a column of text")
        yield where, row


def _read_csv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    text = (line + "\n" for _, line in _lines(path))
    limit = csv.field_size_limit(2**31 - 1)  # a field is a whole document
    try:
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if row and len(row) != len(header):
                raise ValueError(f"{where}: {len(row)} fields; expected {len(header)} as in the header")
            if row:
                yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read ({error})") from error


def _documents(rows: Iterable[tuple[str, Mapping[str, Any]]], text_column: str | None) -> Iterator[Document]:
    column = text_column
    for where, row in rows:
        if column is None:
            column = _guess_column(where, row)
        if column not in row:
            raise ValueError(f"{where}: no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}")
        document = as_document(row[column])
        if document is None:
            found = type(row[column]).__name__
            raise ValueError(f"{where}: column {column!r} holds {found}; expected a text or a list of sentences")
        yield document


def _guess_column(where: str, row: Mapping[str, Any]) -> str:
    texts = [name for name, value in row.items() if as_document(value) is not None]
    usual = [name for name in _USUAL_COLUMNS if name in texts]
    if usual or len(texts) == 1:
        return (usual or texts)[0]
    columns = ", ".join(map(repr, row)) or "none"
    raise ValueError(f"{where}: which column has the text? It has {columns}; name one with text_column")
