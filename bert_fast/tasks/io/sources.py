"""Tables from files and data sets: csv, tsv, jsonl, json, parquet, CoNLL, and folders that `datasets` saved."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bert_fast.tasks.io.squad import is_squad, squad_table
from bert_fast.tasks.io.table import Table

FORMATS = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".conll", ".iob", ".bio", ".txt")
_CONLL = (".conll", ".iob", ".bio")


def read_table(source: str | Path, names: Sequence[str] | None = None) -> Table:
    """All rows of a source.

    Files are told apart by their ending, which may be followed by .gz (but for parquet):

        .csv            comma-separated, quoted as RFC 4180 says; the first line names the columns
        .tsv            tab-separated, without quoting
        .jsonl          an object a line
        .json           a list of objects, an object of lists, or SQuAD's articles (a row a question)
        .parquet        as it is
        .conll .iob .bio   a token and its tag a line, blank lines between sentences: columns `tokens` and `tags`
        .txt            a text a line: column `text`

    A folder written by `datasets.Dataset.save_to_disk` is read with pyarrow, classes by their names;
    `datasets:NAME[:CONFIGURATION[:SPLIT]]` loads a data set with the package `datasets`.

    Args:
        names: the columns of a .csv or .tsv file whose first line is a row and not their names.

    Raises:
        ValueError: no such source, an unknown format, or a broken file; the message names file and line.
    """
    if str(source).startswith("datasets:"):
        return _read_dataset(str(source).removeprefix("datasets:"))
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"source {str(source)!r} is no file or folder; expected a path or 'datasets:NAME'")
    suffix = (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()
    if names and suffix not in (".csv", ".tsv"):
        raise ValueError(f"{path}: names of columns came, which only .csv and .tsv files without a header need")
    if suffix in (".csv", ".tsv"):
        return _read_separated(path, suffix, names)
    if suffix == ".jsonl":
        return _read_jsonl(path)
    if suffix == ".json":
        return _read_json(path)
    if suffix == ".parquet":
        return _read_parquet(path)
    if suffix in _CONLL:
        return _read_conll(path)
    if suffix == ".txt":
        rows = [(number, line) for number, line in _lines(path) if line.strip()]
        return Table({"text": [line for _, line in rows]}, str(path), [number for number, _ in rows], "line")
    raise ValueError(f"{path} ends in {suffix or 'nothing'!r}; expected one of {', '.join(FORMATS)}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, without their ends, decoded as UTF-8."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a gzip file that can be read ({error})") from error


def _read_separated(path: Path, suffix: str, names: Sequence[str] | None) -> Table:
    text = (line + "\n" for _, line in _lines(path))
    before = csv.field_size_limit(2**31 - 1)  # a field can be a whole document
    rows: list[list[str]] = []
    numbers: list[int] = []
    header = list(names or [])
    reader = csv.reader(text, strict=True) if suffix == ".csv" else _tab_separated(path)
    line = 0
    try:
        for row in reader:
            line = line + 1 if suffix == ".tsv" else getattr(reader, "line_num", 0)
            if not row:
                continue
            if not header:
                header = row
            elif len(row) != len(header):
                hint = " as there are names" if names else " as in the header"
                raise ValueError(f"{path}, line {line}: {len(row)} fields; expected {len(header)}{hint}")
            else:
                rows.append(row)
                numbers.append(line)
    except csv.Error as error:
        raise ValueError(f"{path}, line {getattr(reader, 'line_num', 0)}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(before)
    if len(set(header)) != len(header):
        raise ValueError(f"{path}: the header names a column twice: {', '.join(header)}")
    columns: dict[str, list[Any]] = {name: [row[index] for row in rows] for index, name in enumerate(header)}
    return Table(columns, str(path), numbers, "line")


def _tab_separated(path: Path) -> Iterator[list[str]]:
    # No quoting, as in the files of GLUE: a quotation mark is a character like any other.
    for _, line in _lines(path):
        yield line.split("\t") if line else []


def _of_objects(rows: list[dict[str, Any]], source: str, numbers: list[int], counted: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table({name: [row.get(name) for row in rows] for name in names}, source, numbers, counted)


def _read_jsonl(path: Path) -> Table:
    rows, numbers = [], []
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON {type(row).__name__}; expected an object")
        rows.append(row)
        numbers.append(number)
    return _of_objects(rows, str(path), numbers, "line")


def _read_json(path: Path) -> Table:
    try:
        found = json.loads("\n".join(line for _, line in _lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    if is_squad(found):
        return squad_table(found, str(path))
    if isinstance(found, list) and all(isinstance(row, dict) for row in found):
        return _of_objects(found, str(path), [], "row")
    if isinstance(found, dict) and found and all(isinstance(values, list) for values in found.values()):
        return Table(found, str(path))
    raise ValueError(f"{path}: expected a list of objects, or an object of lists of equal length")


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read ({error})") from error
    return Table(columns, str(path))


def _read_conll(path: Path) -> Table:
    sentences: list[list[tuple[str, str]]] = []
    numbers: list[int] = []
    inside = False
    for number, line in _lines(path):
        if not line.strip() or line.startswith("-DOCSTART-"):
            inside = False
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        if len(fields) < 2 or not fields[0].strip() or not fields[-1].strip():
            raise ValueError(f"{path}, line {number}: {line!r}; expected a token and its tag, or a blank line")
        if not inside:
            sentences.append([])
            numbers.append(number)
        inside = True
        sentences[-1].append((fields[0], fields[-1].strip()))
    columns: dict[str, list[Any]] = {
        "tokens": [[token for token, _ in sentence] for sentence in sentences],
        "tags": [[tag for _, tag in sentence] for sentence in sentences],
    }
    return Table(columns, str(path), numbers, "line")


def _read_folder(path: Path) -> Table:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text())["splits"]
        raise ValueError(f"{path} holds several splits; name one: {', '.join(str(path / split) for split in splits)}")
    if not (path / "state.json").is_file():
        raise ValueError(f"{path} is a folder; expected a file, or what datasets.Dataset.save_to_disk wrote")
    import pyarrow

    try:
        files = [item["filename"] for item in json.loads((path / "state.json").read_text())["_data_files"]]
        streams = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(path / name))) for name in files]
        rows = pyarrow.concat_tables([stream.read_all() for stream in streams]).to_pydict()
        features = json.loads((path / "dataset_info.json").read_text()).get("features") or {}
    except (pyarrow.ArrowException, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a data set that can be read ({type(error).__name__}: {error})") from error
    return Table({name: _named(values, features.get(name)) for name, values in rows.items()}, str(path))


def _named(values: list[Any], feature: Any) -> list[Any]:
    """Classes by their names, as the features of a data set describe them; -1 is a row without one."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = {"_type": "List", "feature": feature[0]}
    if not isinstance(feature, dict):
        return values
    if feature.get("_type") == "ClassLabel":
        names = feature["names"]
        return [None if value is None or value < 0 else names[value] for value in values]
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return [None if value is None else _named(value, feature["feature"]) for value in values]
    return values


def _read_dataset(name: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"source 'datasets:{name}' needs the package datasets: pip install 'bert_fast[datasets]'"
        ) from error
    repository, configuration, split = [*name.split(":"), "", ""][:3]
    loaded = datasets.load_dataset(repository, configuration or None, split=split or "train")
    columns = {column: list(loaded[column]) for column in loaded.column_names}
    described = {column: _described(feature) for column, feature in loaded.features.items()}
    return Table({column: _named(values, described[column]) for column, values in columns.items()}, f"datasets:{name}")


def _described(feature: Any) -> dict[str, Any]:
    """A feature object of `datasets` as `_named` reads it from a file."""
    if hasattr(feature, "names"):
        return {"_type": "ClassLabel", "names": feature.names}
    if hasattr(feature, "feature"):
        return {"_type": "List", "feature": _described(feature.feature)}
    return {}
