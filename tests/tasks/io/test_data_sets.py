"""Parquet files and saved data sets: names of classes, kinds of text columns, damaged and hostile indexes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from bert_fast.tasks.io.columns import text_column
from bert_fast.tasks.io.sources import read_table

CLASSES = {"_type": "ClassLabel", "names": ["no", "yes"]}


def with_features(table: pyarrow.Table, features: dict[str, Any]) -> pyarrow.Table:
    """The table with the metadata that the package `datasets` writes into a Parquet file."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def saved(folder: Path, table: pyarrow.Table, state: Any, info: Any = None) -> Path:
    folder.mkdir()
    with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    (folder / "state.json").write_text(state if isinstance(state, str) else json.dumps(state))
    if info is not None:
        (folder / "dataset_info.json").write_text(info if isinstance(info, str) else json.dumps(info))
    return folder


def test_class_labels_of_parquet_become_names(tmp_path: Path) -> None:
    table = pyarrow.table(
        {"label": [1, -1, None], "tags": [[0, 1], [], None], "nested": [{"a": [1]}, None, {"a": []}], "n": [0, 1, 2]}
    )
    features = {
        "label": CLASSES,
        "tags": {"_type": "Sequence", "feature": CLASSES},
        "nested": {"a": [CLASSES]},
        "n": {"_type": "Value", "dtype": "int64"},
    }
    pyarrow.parquet.write_table(with_features(table, features), tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").columns == {
        "label": ["yes", None, None],
        "tags": [["no", "yes"], [], None],
        "nested": [{"a": ["yes"]}, None, {"a": []}],
        "n": [0, 1, 2],
    }
    folder = saved(tmp_path / "saved", with_features(table, features), {"_data_files": [{"filename": "data.arrow"}]})
    assert read_table(folder)["label"] == ["yes", None, None], "without dataset_info.json, by the Arrow schema"
    wrong = with_features(pyarrow.table({"label": [0, 2]}), features)
    pyarrow.parquet.write_table(wrong, tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet, row 2: 'label' holds 2, which has no name"):
        read_table(tmp_path / "b.parquet")
    foreign = pyarrow.table({"label": [0]}).replace_schema_metadata({"huggingface": "[1"})
    pyarrow.parquet.write_table(foreign, tmp_path / "c.parquet")
    assert read_table(tmp_path / "c.parquet").columns == {"label": [0]}


CATEGORICAL = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())


@pytest.mark.parametrize(
    "kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view(), CATEGORICAL, pyarrow.binary()], ids=str
)
def test_every_kind_of_text_column_is_text(kind: pyarrow.DataType, tmp_path: Path) -> None:
    texts = ["a", "schön", "a", None]
    array = pyarrow.array(texts)
    column = array.dictionary_encode() if pyarrow.types.is_dictionary(kind) else array.cast(kind)
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    assert text_column(read_table(tmp_path / "a.parquet"), "text") == ["a", "schön", "a", ""]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"_data_files": [{"filename": "../data.arrow"}]}, r"names the file \"../data.arrow\"; expected a path inside"),
        ({"_data_files": [{"filename": "/etc/passwd"}]}, r"names the file \"/etc/passwd\"; expected a path inside"),
        ({"_data_files": [{"filename": 7}]}, "names the file 7; expected a path inside"),
        ({"_data_files": [{}]}, "names the file null; expected a path inside"),
        ({"_data_files": []}, "names no files; expected at least one"),
        ({"_data_files": {}}, "'_data_files' is {}; expected a list"),
        ({}, "has no '_data_files'"),
        ([], r"is \[\]; expected an object"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ({"_data_files": [{"filename": "absent.arrow"}]}, "absent.arrow: not a valid Arrow stream"),
        ({"_data_files": [{"filename": "state.json"}]}, "state.json: not a valid Arrow stream"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:50],
)
def test_indexes_that_are_damaged_or_leave_the_folder(state: Any, message: str, tmp_path: Path) -> None:
    saved(tmp_path / "data", pyarrow.table({"text": ["a"]}), state)
    with pytest.raises(ValueError, match=message) as error:
        read_table(tmp_path / "data")
    assert "state.json" in str(error.value) or "arrow" in str(error.value)


def test_every_flip_of_a_bit_of_the_index_is_read_or_named(tmp_path: Path) -> None:
    state, info = {"_data_files": [{"filename": "data.arrow"}]}, {"features": {"label": CLASSES}}
    folder = saved(tmp_path / "data", pyarrow.table({"label": [0, 1]}), state, info)
    expected = read_table(folder).columns
    assert expected == {"label": ["no", "yes"]}
    refused = 0
    for name in ("state.json", "dataset_info.json"):
        content = (folder / name).read_bytes()
        for bit in range(len(content) * 8):
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            (folder / name).write_bytes(bytes(flipped))
            try:
                table = read_table(folder)
            except ValueError as error:
                message = str(error)
            else:
                message = ""
                assert len(table) == 2
            refused += bool(message)
            assert not message or str(folder) in message
        (folder / name).write_bytes(content)
    assert refused > 100


def test_a_text_that_parquet_repeats_is_in_memory_once(tmp_path: Path) -> None:
    text = "a bird flies. " * 2**16
    index = pyarrow.array([0, None, *[0] * 2000], pyarrow.int32())
    dictionary = pyarrow.DictionaryArray.from_arrays(index, pyarrow.array([text]))
    short = pyarrow.array(["b", "a"] * 1001)
    table = pyarrow.table({"text": dictionary, "plain": dictionary.cast(pyarrow.string()), "short": short})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", compression="zstd")
    columns = read_table(tmp_path / "a.parquet").columns
    for name in ("text", "plain"):
        assert columns[name] == [text, None, *[text] * 2000]
        assert len({id(value) for value in columns[name]}) == 2
    assert columns["short"] == ["b", "a"] * 1001
