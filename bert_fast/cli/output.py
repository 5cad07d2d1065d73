"""Predictions as JSON lines, CSV or Parquet: the rows that were read, with a prediction each."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bert_fast._io import atomic_file
from bert_fast._terminal import data_stream

if TYPE_CHECKING:
    from bert_fast.tasks.io.table import Table

FORMATS = (".jsonl", ".csv", ".parquet")
# What Excel and other programs take for the start of a formula, with the full-width forms of = + - @.
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def add_output_arguments(parser: Any) -> None:
    """Add the options of commands that write predictions."""
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help=f"output file, {', '.join(FORMATS)}; it has the columns of the input and the predictions. "
        "A column of the input with the name of a predicted one is written as input_NAME",
    )
    parser.add_argument(
        "--class_columns",
        type=bool,
        default=False,
        help="write a column probability_CLASS for each class in place of the column scores",
    )
    parser.add_argument(
        "--quote_formulas",
        type=bool,
        default=False,
        help="in .csv, put ' before texts that a spreadsheet would run as a formula: those starting with = + - @, a "
        "tab or a line end",
    )


def check_output(
    output: str | None,
    formats: Sequence[str] = FORMATS,
    option: str = "--output",
    inputs: Sequence[str | None] = (),
) -> None:
    """ValueError, before anything is computed, if `output` is a folder, is one of the files `inputs` that the command
    reads, or has a suffix that is not one of `formats`."""
    if output is None:
        return
    if formats and Path(output).suffix not in formats:
        raise ValueError(f"{option} is {output!r}; expected a file name ending in {', '.join(formats)}")
    if not output or Path(output).is_dir():
        raise ValueError(f"{option} is {output!r}, {'a folder' if output else 'empty'}; expected the name of a file")
    for name in inputs:
        if name and Path(name).exists() and Path(output).exists() and Path(output).samefile(name):
            raise ValueError(f"{option} is {output!r}, which is read; expected another file")


def prediction_lines(
    table: Table, predictions: Sequence[Mapping[str, Any]], *, class_columns: bool = False
) -> list[dict[str, Any]]:
    """One mapping per row: its number in the source as `row`, the columns of the table, and the prediction.

    Args:
        table: the rows. A column with the name of a key of the predictions, or `row`, is renamed to input_NAME.
        predictions: one per row.
        class_columns: replace `scores` by one key `probability_CLASS` per class.

    Raises:
        ValueError: `class_columns` is set, and the predictions have no scores.
    """
    if class_columns:
        if any("scores" not in prediction for prediction in predictions):
            raise ValueError("--class_columns is set; expected a task that predicts classes, with scores")
        predictions = [_with_class_columns(prediction) for prediction in predictions]
    taken = {"row", *(name for prediction in predictions for name in prediction)}
    # The row's id is part of a prediction of question-answering: the same value, written once.
    same = [name for name in table.columns if name in taken and _is_same(table[name], predictions, name)]
    names: dict[str, str] = {}
    for name in table.columns:
        new = name
        while new in (taken if name == new else {*taken, *table.columns, *names.values()}):
            new = f"input_{new}"
        if name not in same:
            names[name] = new
    return [
        {"row": table.numbers[row], **{new: table[name][row] for name, new in names.items()}, **prediction}
        for row, prediction in enumerate(predictions)
    ]


def _is_same(values: Sequence[Any], predictions: Sequence[Mapping[str, Any]], name: str) -> bool:
    return name == "id" and all(
        name in prediction and prediction[name] == value for value, prediction in zip(values, predictions, strict=True)
    )


def _with_class_columns(prediction: Mapping[str, Any]) -> dict[str, Any]:
    columns = {f"probability_{label}": score for label, score in prediction["scores"].items()}
    return {**{name: value for name, value in prediction.items() if name != "scores"}, **columns}


def write_predictions(
    table: Table,
    predictions: Sequence[Mapping[str, Any]],
    output: str | None,
    *,
    class_columns: bool = False,
    quote_formulas: bool = False,
) -> None:
    """Write `prediction_lines` to the file `output`, atomically, in the format of its suffix; None is stdout (JSON).

    Raises:
        OSError: the file can't be written; the message names it.
    """
    lines = prediction_lines(table, predictions, class_columns=class_columns)
    if output is None:
        write_json_lines(lines, data_stream())
    else:
        with atomic_file(Path(output)) as path:
            if output.endswith(".parquet"):
                _write_parquet(lines, path)
            else:
                with path.open("w", encoding="utf-8", newline="") as file:
                    if output.endswith(".csv"):
                        _write_csv(lines, file, quote_formulas=quote_formulas)
                    else:
                        write_json_lines(lines, file)


def write_json_lines(lines: Sequence[Mapping[str, Any]], file: Any) -> None:
    """Write one JSON object per line."""
    for line in lines:
        file.write(to_json(line) + "\n")


def to_json(value: Any) -> str:
    """`value` as JSON on one line; characters that UTF-8 can't encode (lone surrogates) are escaped."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if text.isascii() or not _has_surrogates(text) else json.dumps(value, default=str)


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)


def _write_csv(lines: Sequence[Mapping[str, Any]], file: io.TextIOBase, *, quote_formulas: bool) -> None:
    def cell(value: Any) -> Any:
        if isinstance(value, (list, dict)):
            value = to_json(value)
        if isinstance(value, str) and _has_surrogates(value):
            value = value.encode("utf-8", "backslashreplace").decode()
        return "'" + value if quote_formulas and isinstance(value, str) and _is_formula(value) else value

    names = _names(lines)
    writer = csv.writer(file)
    writer.writerow([cell(name) for name in names])
    writer.writerows([cell(line.get(name)) for name in names] for line in lines)


def _is_formula(text: str) -> bool:
    """Whether a spreadsheet may run `text` as a formula; a number with a sign is none."""
    if not text.lstrip(" \u00a0").startswith(_FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return text[0] in "\t\r\n"


def _write_parquet(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {}
    for name in _names(lines):
        values = [line.get(name) for line in lines]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):  # of several types
            columns[name] = pa.array(
                [value if value is None or isinstance(value, str) else to_json(value) for value in values]
            )
    pq.write_table(pa.table(columns), path)


def _names(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))
