"""Parquet files, folders of the package `datasets`, its data sets by name; class indices become class names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_fast._io import read_json, safe_name
from bert_fast.tasks.io.table import Table

if TYPE_CHECKING:
    import pyarrow


def read_parquet(path: Path) -> Table:
    """The table of a Parquet file; columns that `datasets` wrote as ClassLabel hold the names of the classes.

    Raises:
        ValueError: the file is no valid Parquet file, or a class index has no name; the message names file and row.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        # As dictionaries: a few kilobytes can repeat a text of megabytes a million times.
        schema = pyarrow.parquet.read_schema(path)
        texts = [
            field.name
            for field in schema
            if pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)
        ]
        table = pyarrow.parquet.read_table(path, read_dictionary=texts)
        columns = _columns(table)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a valid Parquet file ({error})") from error
    return Table(_named(columns, _features(table.schema), str(path)), str(path))


def read_folder(path: Path) -> Table:
    """The table of a folder written by `datasets.Dataset.save_to_disk`.

    Raises:
        ValueError: the folder is not one, holds several splits, or is damaged; the message names the file.
    """
    if (path / "dataset_dict.json").is_file():
        splits = read_json(path / "dataset_dict.json", {"splits": list})["splits"]
        raise ValueError(
            f"{path} holds several splits; expected one of {', '.join(str(path / str(split)) for split in splits)}"
        )
    state = path / "state.json"
    if not state.is_file():
        raise ValueError(f"{path} is a folder; expected a file, or a folder written by datasets.Dataset.save_to_disk")
    import pyarrow

    entries = read_json(state, {"_data_files": list})["_data_files"]
    names = [entry.get("filename") if isinstance(entry, dict) else entry for entry in entries]
    files = [safe_name(path, name, str(state)) for name in names]
    if not files:
        raise ValueError(f"{state} names no files; expected at least one")
    rows = []
    for file in files:
        try:
            rows.append(pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all())
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: not a valid Arrow stream ({error})") from error
    try:
        columns = _columns(pyarrow.concat_tables(rows))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a valid data set ({error})") from error
    info = path / "dataset_info.json"
    features = read_json(info).get("features") if info.is_file() else _features(rows[0].schema)
    return Table(_named(columns, features, str(path)), str(path))


def read_dataset(name: str) -> Table:
    """The table of a data set of the package `datasets`: NAME[:CONFIGURATION[:SPLIT]].

    Raises:
        ValueError: the package is not installed.
    """
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
    return Table(_named(columns, features, f"datasets:{name}"), f"datasets:{name}")


def _columns(table: pyarrow.Table) -> dict[str, list[Any]]:
    """The columns as Python values; repeated names, which a mapping can't hold, are refused."""
    import pyarrow

    names = table.column_names
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise pyarrow.ArrowInvalid(f"columns are repeated: {', '.join(repeated)}")
    return {name: _values(table[name]) for name in names}


def _values(column: pyarrow.ChunkedArray) -> list[Any]:
    """The values of a column; of one that is encoded as a dictionary each different value once in memory."""
    import pyarrow

    if not pyarrow.types.is_dictionary(column.type):
        values: list[Any] = column.to_pylist()
        return values
    values = []
    for chunk in column.chunks:
        different = chunk.dictionary.to_pylist()
        values += [None if index is None else different[index] for index in chunk.indices.to_pylist()]
    return values


def _features(schema: pyarrow.Schema) -> Any:
    """The features that `datasets` keeps in the metadata of a schema, if any."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return stored.get("info", {}).get("features")
    except (ValueError, AttributeError, RecursionError):  # the metadata of another program
        return None


def _named(columns: dict[str, list[Any]], features: Any, source: str) -> dict[str, list[Any]]:
    """The columns with class indices replaced by names, where `features` has them."""
    features = features if isinstance(features, dict) else {}
    named: dict[str, list[Any]] = {}
    for name, values in columns.items():
        named[name] = []
        for row, value in enumerate(values):
            try:
                named[name].append(_class_names(value, features.get(name)))
            except (IndexError, TypeError, KeyError) as error:
                raise ValueError(f"{source}, row {row + 1}: {name!r} holds {value!r}, which has no name") from error
    return named


def _class_names(value: Any, feature: Any) -> Any:
    """Replace the class indices in a value by the names in its feature; -1 is a row without a class."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = {"_type": "List", "feature": feature[0]}
    if value is None or not isinstance(feature, dict):
        return value
    kind = feature.get("_type")
    if kind == "ClassLabel" and feature.get("names"):
        return value if isinstance(value, str) else None if value < 0 else feature["names"][value]
    if kind in ("Sequence", "List", "LargeList"):
        inner = feature.get("feature")
        # datasets stores a sequence of objects as an object of lists.
        if isinstance(value, Mapping):
            inner = {name: {"_type": "List", "feature": item} for name, item in (inner or {}).items()}
            return _class_names(value, inner)
        return [_class_names(item, inner) for item in value]
    if kind is None and isinstance(value, Mapping):
        return {name: _class_names(item, feature.get(name)) for name, item in value.items()}
    return value


def _feature_dict(feature: Any) -> Any:
    """A feature of `datasets` in the form that its dataset_info.json has."""
    if hasattr(feature, "names"):
        return {"_type": "ClassLabel", "names": feature.names}
    if hasattr(feature, "feature"):
        return {"_type": "List", "feature": _feature_dict(feature.feature)}
    if isinstance(feature, Mapping):
        return {name: _feature_dict(item) for name, item in feature.items()}
    return [_feature_dict(feature[0])] if isinstance(feature, list) and len(feature) == 1 else {}
