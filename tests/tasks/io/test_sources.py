"""Every format gives the same table, and errors name the file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from bert_fast.tasks.io.columns import (
    LABEL,
    TEXT,
    TEXT_PAIR,
    choose_columns,
    describe_columns,
    handle_empty_texts,
    text_column,
)
from bert_fast.tasks.io.sources import read_table
from bert_fast.tasks.io.table import Table

ROWS = [{"text": 'she said "no", twice', "label": "bad"}, {"text": "schön, 好 🙂", "label": "good"}]
CSV = 'text,label\n"she said ""no"", twice",bad\n"schön, 好 🙂",good\n'
JSONL = "".join(json.dumps(row) + "\n\n" for row in ROWS)
FILES = {
    "a.csv": CSV,
    "a.tsv": 'text\tlabel\nshe said "no", twice\tbad\nschön, 好 🙂\tgood\n',
    "a.jsonl": JSONL,
    "list.json": json.dumps(ROWS, indent=1),
    "columns.json": json.dumps({name: [row[name] for row in ROWS] for name in ("text", "label")}),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_formats_give_the_same_rows(name: str, packed: bool, tmp_path: Path) -> None:
    path = tmp_path / (name + (".gz" if packed else ""))
    data = ("\ufeff" + FILES[name] if name.endswith("csv") else FILES[name]).encode()
    path.write_bytes(gzip.compress(data) if packed else data)
    table = read_table(str(path))
    assert [table.row(row) for row in range(len(table))] == ROWS


def test_parquet_and_a_saved_data_set(tmp_path: Path) -> None:
    table = pyarrow.table({"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read_table(tmp_path / "a.parquet").columns == table.to_pydict()
    folder = tmp_path / "saved"
    folder.mkdir()
    with pyarrow.OSFile(str(folder / "data.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    classes = {"_type": "ClassLabel", "names": ["no", "yes"]}
    features = {"label": classes, "tags": {"_type": "Sequence", "feature": classes}, "text": {"_type": "Value"}}
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    assert read_table(folder).columns == {"text": ["a", "b"], "label": ["yes", None], "tags": [["no", "yes"], []]}


def test_conll_and_text_and_a_file_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "a.conll"
    path.write_text("-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n")
    table = read_table(path)
    assert table.columns == {
        "tokens": [["EU", "rejects"], ["Peter"]],
        "column2": [["NNP", "VBZ"], ["NNP"]],
        "tags": [["B-ORG", "O"], ["B-PER"]],
    }
    assert table.where(1) == f"{path}, line 7"
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert read_table(tmp_path / "a.txt").numbers == [1, 3]
    (tmp_path / "b.tsv").write_text("0\tfine\n1\tbad\n")
    table = read_table(tmp_path / "b.tsv", ["label", "text"])
    assert table.columns == {"label": ["0", "1"], "text": ["fine", "bad"]}
    assert table.numbers == [1, 2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\na,1\nb\n", "a.csv, line 3: 1 fields; expected 2 as in the header"),
        ("a.csv", 'text,label\n"a\n,1\nb,2\n', "not CSV"),
        ("a.csv", "text,text\na,1\n", "duplicate columns in the header"),
        ("a.tsv", "text\tlabel\na\t1\n\na\tb\tc\n", "a.tsv, line 4: 3 fields; expected 2"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl, line 1: a JSON list; expected an object"),
        ("a.json", "[{}, \n1 2]", "a.json, line 2: not JSON"),
        ("a.json", '{"a": 1}', "expected a list of objects"),
        ("a.json", '{"a": [1], "b": []}', "columns differ in length"),
        ("a.conll", "EU B-ORG\nrejects\n", "a.conll, line 2: 'rejects'; expected a token and its tag"),
        ("a.parquet", "no", "not a valid Parquet file"),
        ("a.csv.gz", "no", "not a valid gzip file"),
        ("a.doc", "", "has the suffix '.doc'; expected one of .csv"),
        ("a.jsonl", b'{"a": 1}\n\xff\n', "a.jsonl, line 2: not UTF-8"),
    ],
)
def test_malformed_files(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"a\.") as error:
        read_table(tmp_path / name)
    assert message in str(error.value)


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not exist; expected a file, a folder or 'datasets:NAME'"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(ValueError, match=r"expected a file, or a folder written by datasets"):
        read_table(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"holds several splits; expected one of .*train"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("columns", "named", "chosen"),
    [
        (["Sentence", "label", "id"], {}, ["Sentence", None, "label"]),
        (["sentence1", "sentence2", "score", "label"], {}, ["sentence1", "sentence2", "label"]),
        (["premise", "hypothesis", "gold"], {"label": "gold"}, ["premise", "hypothesis", "gold"]),
        (["text", "body", "class"], {"text": "body"}, ["body", None, "class"]),
    ],
    ids=["case", "pair", "named", "named before guessed"],
)
def test_columns_are_named_or_guessed(columns: list[str], named: dict[str, str], chosen: list[str | None]) -> None:
    by_role = choose_columns(Table({name: ["x"] for name in columns}), [TEXT, TEXT_PAIR, LABEL], named)
    assert [by_role.get(role) for role in ("text", "text_pair", "label")] == chosen


def test_missing_columns() -> None:
    table = Table({"a": ["x"], "b": ["y"]}, "my.csv")
    with pytest.raises(
        ValueError,
        match=r"no column for text among a, b; name it with --columns.text \(--data.columns",
    ):
        choose_columns(table, [TEXT, LABEL])
    with pytest.raises(ValueError, match=r"my.csv has no column 'c' for text; it has a, b"):
        choose_columns(table, [TEXT, LABEL], {"text": "c"})
    with pytest.raises(ValueError, match="columns has the role txt; expected roles of this task: text, label"):
        choose_columns(table, [TEXT, LABEL], {"txt": "a"})
    assert choose_columns(table, [TEXT, LABEL], {"text": "a"}, training=False) == {"text": "a"}
    assert describe_columns(table, {"text": "a"}) == "my.csv: 1 rows; text = 'a'; unused: b"


def test_empty_texts_are_refused_dropped_or_filled() -> None:
    table = Table({"text": ["a", " ", None, "d"], "n": [1, 2, 3, 4]}, "my.csv", [2, 3, 4, 5], "line")
    with pytest.raises(ValueError, match=r"my.csv: 2 of 4 rows have no text \(line 3, 4\); set data.empty to drop"):
        handle_empty_texts(table, ["text"], "refuse")
    dropped, message = handle_empty_texts(table, ["text"], "drop")
    assert dropped.columns == {"text": ["a", "d"], "n": [1, 4]}
    assert dropped.numbers == [2, 5]
    assert message.endswith("dropped")
    filled, _ = handle_empty_texts(table, ["text"], "fill", "nothing")
    assert filled["text"] == ["a", "nothing", "nothing", "d"]
    assert handle_empty_texts(filled, ["text"], "refuse") == (filled, "")
    with pytest.raises(ValueError, match="line 2: 'text' holds list; expected a text"):
        text_column(Table({"text": [["a"]]}, "my.csv", [2], "line"), "text")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": ' + "9" * 5000 + "}\n", "a.jsonl, line 2: JSON that can't be read (Exceeds"),
        ("a.jsonl", '{"a": 1}\n' + "[" * 100_000 + "\n", "a.jsonl, line 2: JSON that can't be read (maximum recursion"),
        ("a.json", '[{"a": ' + "9" * 5000 + "}]", "a.json: JSON that can't be read (Exceeds the limit"),
        ("a.json", "[" * 100_000, "a.json: JSON that can't be read (maximum recursion"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[:-20], "a.jsonl.gz: not a valid gzip file"),
        ("a.jsonl.gz", b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 20, "a.jsonl.gz: not a valid gzip file"),
    ],
    ids=["digits", "nesting", "json digits", "json nesting", "truncated", "deflate"],
)  # fmt: skip
def test_a_bad_row_is_an_error_that_names_it(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=r"a\.") as error:
        read_table(tmp_path / name)
    assert message in str(error.value)


SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "json", "txt"])
def test_only_line_feeds_end_lines(suffix: str, tmp_path: Path) -> None:
    row = json.dumps({"text": SEPARATORS, "label": "x"}, ensure_ascii=False)
    content = {
        "csv": f"text,label\n{SEPARATORS},x\nb,y\n",
        "tsv": f"text\tlabel\n{SEPARATORS}\tx\nb\ty\n",
        "jsonl": f'{row}\n{{"text": "b"}}\n',
        "json": f'[{row},\n{{"text": "b"}}]',
        "txt": f"{SEPARATORS}\nb\n",
    }[suffix]
    (tmp_path / f"a.{suffix}").write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    table = read_table(tmp_path / f"a.{suffix}")
    assert table["text"] == [SEPARATORS, "b"]


def test_values_that_are_no_texts_are_named() -> None:
    table = Table({"text": ["a", "\ud800"]}, "my.jsonl", [3, 4], "line")
    with pytest.raises(ValueError, match=r"my.jsonl, line 4: 'text' has half of a surrogate pair"):
        text_column(table, "text")
    assert text_column(Table({"text": [1, 2.5, None, float("nan"), "x"]}), "text") == ["1", "2.5", "", "", "x"]
    with pytest.raises(ValueError, match="row 1: 'text' holds bool; expected a text"):
        text_column(Table({"text": [True]}), "text")


def test_columns_may_be_any_sequences() -> None:
    table = Table({"text": ("a", "b"), "label": np.array([0, 1])})  # type: ignore[dict-item]
    assert table.columns == {"text": ["a", "b"], "label": [0, 1]}
    for wrong in ("ab", 7):
        with pytest.raises(TypeError, match=rf"table: the column 'text' is '?{wrong}'?; expected a list"):
            Table({"text": wrong})  # type: ignore[dict-item]
