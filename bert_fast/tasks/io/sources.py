"""Reading tables: csv, tsv, jsonl, json, parquet, CoNLL and text files, and data sets of the package `datasets`."""

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
    """Read all rows of a source.

    The suffix of a file, which .gz may follow (except for .parquet), is its format:

        .csv            comma-separated, quoted as in RFC 4180; the first line is the header
        .tsv            tab-separated, without quoting
        .jsonl          one object per line
        .json           a list of objects, an object of lists, or SQuAD's format (one row per question)
        .parquet        Parquet
        .conll .iob .bio   one token and its tag per line, blank lines between sentences: columns `tokens` and `tags`
        .txt            one text per line: column `text`

    A folder written by `datasets.Dataset.save_to_disk` is read with pyarrow, and class indices become class names;
    `datasets:NAME[:CONFIGURATION[:SPLIT]]` loads a data set with the package `datasets`.

    Args:
        source: a file, a folder or `datasets:NAME`.
        names: the column names of a .csv or .tsv file without a header.

    Returns:
        The table; its row numbers are lines for text formats.

    Raises:
        ValueError: the source does not exist, its format is unknown, or the file is malformed; the message names file
            and line.
    """
    if str(source).startswith("datasets:"):
        return _read_dataset(str(source).removeprefix("datasets:"))
    path = Path(source)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ValueError(f"source {str(source)!r} does not exist; expected a file, a folder or 'datasets:NAME'")
    suffix = (Path(path.stem) if path.suffix == ".gz" else path).suffix.lower()
    if names and suffix not in (".csv", ".tsv"):
        raise ValueError(f"{path}: names is set; expected only for .csv and .tsv files without a header")
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
        rows = [(number, line) for number, line in _read_lines(path) if line.strip()]
        return Table({"text": [line for _, line in rows]}, str(path), [number for number, _ in rows], "line")
    raise ValueError(f"{path} has the suffix {suffix!r}; expected one of {', '.join(FORMATS)}")


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The UTF-8 lines of a file, numbered from 1, without line ends."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a valid gzip file ({error})") from error


def _read_separated(path: Path, suffix: str, names: Sequence[str] | None) -> Table:
    text = (line + "\n" for _, line in _read_lines(path))
    previous_limit = csv.field_size_limit(2**31 - 1)  # a field may hold a document
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
                origin = "names" if names else "the header"
                raise ValueError(f"{path}, line {line}: {len(row)} fields; expected {len(header)} as in {origin}")
            else:
                rows.append(row)
                numbers.append(line)
    except csv.Error as error:
        raise ValueError(f"{path}, line {getattr(reader, 'line_num', 0)}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(previous_limit)
    if len(set(header)) != len(header):
        raise ValueError(f"{path}: duplicate columns in the header: {', '.join(header)}")
    columns: dict[str, list[Any]] = {name: [row[index] for row in rows] for index, name in enumerate(header)}
    return Table(columns, str(path), numbers, "line")


def _tab_separated(path: Path) -> Iterator[list[str]]:
    # No quoting, as in the files of GLUE: a quotation mark is an ordinary character.
    for _, line in _read_lines(path):
        yield line.split("\t") if line else []


def _table_of_objects(rows: list[dict[str, Any]], source: str, numbers: list[int], unit: str) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table({name: [row.get(name) for row in rows] for name in names}, source, numbers, unit)


def _read_jsonl(path: Path) -> Table:
    rows, numbers = [], []
    for number, line in _read_lines(path):
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
    return _table_of_objects(rows, str(path), numbers, "line")


def _read_json(path: Path) -> Table:
    try:
        content = json.loads("\n".join(line for _, line in _read_lines(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    if is_squad(content):
        return squad_table(content, str(path))
    if isinstance(content, list) and all(isinstance(row, dict) for row in content):
        return _table_of_objects(content, str(path), [], "row")
    if isinstance(content, dict) and content and all(isinstance(values, list) for values in content.values()):
        return Table(content, str(path))
    raise ValueError(f"{path}: expected a list of objects, or an object of lists of equal length")


def _read_parquet(path: Path) -> Table:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_table(path).to_pydict()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a valid Parquet file ({error})") from error
    return Table(columns, str(path))


def _read_conll(path: Path) -> Table:
    sentences: list[list[tuple[str, str]]] = []
    numbers: list[int] = []
    inside = False
    for number, line in _read_lines(path):
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
        raise ValueError(
            f"{path} holds several splits; expected one of {', '.join(str(path / split) for split in splits)}"
        )
    if not (path / "state.json").is_file():
        raise ValueError(f"{path} is a folder; expected a file, or a folder written by datasets.Dataset.save_to_disk")
    import pyarrow

    try:
        files = [item["filename"] for item in json.loads((path / "state.json").read_text())["_data_files"]]
        streams = [pyarrow.ipc.open_stream(pyarrow.memory_map(str(path / name))) for name in files]
        rows = pyarrow.concat_tables([stream.read_all() for stream in streams]).to_pydict()
        features = json.loads((path / "dataset_info.json").read_text()).get("features") or {}
    except (pyarrow.ArrowException, OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a valid data set ({type(error).__name__}: {error})") from error
    return Table({name: _class_names(values, features.get(name)) for name, values in rows.items()}, str(path))


def _class_names(values: list[Any], feature: Any) -> list[Any]:
    """Replace class indices by the names in a feature of a data set; -1 is a row without a class."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = {"_type": "List", "feature": feature[0]}
    if not isinstance(feature, dict):
        return values
    if feature.get("_type") == "ClassLabel":
        names = feature["names"]
        return [None if value is None or value < 0 else names[value] for value in values]
    if feature.get("_type") in ("Sequence", "List", "LargeList"):
        return [None if value is None else _class_names(value, feature["feature"]) for value in values]
    return values


def _read_dataset(name: str) -> Table:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"source 'datasets:{name}' requires the package datasets; pip install 'bert_fast[datasets]'"
        ) from error
    repository, configuration, split = [*name.split(":"), "", ""][:3]
    loaded = datasets.load_dataset(repository, configuration or None, split=split or "train")
    columns = {column: list(loaded[column]) for column in loaded.column_names}
    features = {column: _feature_dict(feature) for column, feature in loaded.features.items()}
    named = {column: _class_names(values, features[column]) for column, values in columns.items()}
    return Table(named, f"datasets:{name}")


def _feature_dict(feature: Any) -> dict[str, Any]:
    """A feature of `datasets` in the form that its dataset_info.json has."""
    if hasattr(feature, "names"):
        return {"_type": "ClassLabel", "names": feature.names}
    if hasattr(feature, "feature"):
        return {"_type": "List", "feature": _feature_dict(feature.feature)}
    return {}
