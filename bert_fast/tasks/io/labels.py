"""The values of label columns: one name for equal labels, lists of labels, rows without a label."""

from __future__ import annotations

import ast
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import chain
from typing import Any

from bert_fast.tasks.io.table import Table

# Texts that usually mean that a row has no label; compared in lower case.
_LOOK_MISSING = {
    "-1",
    "-100",
    "-",
    "--",
    "nan",
    "none",
    "null",
    "n/a",
    "na",
    "#n/a",
    "?",
    "unlabeled",
    "unlabelled",
}
_LONGEST_LITERAL = 100_000  # characters that Python's parser is given
_BOOLEANS = {"true": "1", "false": "0"}
_INTEGRAL = re.compile(r"([+-]?\d+)\.0*", re.ASCII)
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def plain_value(value: Any) -> Any:
    """`value` with scalars and arrays of NumPy or torch as Python's, and bytes as text where they are UTF-8."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    return value.tolist() if hasattr(value, "tolist") and hasattr(value, "shape") else value


def is_missing(value: Any) -> bool:
    """Whether a cell is empty: None, NaN, or a text of white space."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, (float, Decimal)) and math.isnan(value))


def label_name(value: Any) -> str:
    """The text of a label: 1, 1.0 and "1.0" are "1", True is "True"."""
    value = plain_value(value)
    if isinstance(value, Decimal):
        value = float(value)
    text = str(value).strip()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    match = _INTEGRAL.fullmatch(text)
    return match[1] if match else text


def label_key(value: Any) -> str:
    """What equal labels have in common: the label's name, "1" for true and "0" for false."""
    name = label_name(value)
    return _BOOLEANS.get(name.lower(), name)


class Labels:
    """The distinct labels of a column, in order, and their indices.

    1, 1.0, "1", "1.0" and true are one label; it is called 1, or by its spelling in the data if no label is the number
    0 or 1. Numbers come first, by value.

    Args:
        names: the names in order, as `fit` returned them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._indices = {label_key(name): index for index, name in enumerate(self.names)}

    @classmethod
    def fit(cls, values: Iterable[Any]) -> Labels:
        """The labels among `values`."""
        spellings: dict[str, list[str]] = {}
        for name in map(label_name, values):
            spellings.setdefault(label_key(name), []).append(name)
        booleans = {"0", "1"}.isdisjoint(chain.from_iterable(spellings.values()))
        return cls(label_order([names[0] if booleans else key for key, names in spellings.items()]))

    def index(self, value: Any) -> int | None:
        """The index of a label; None if it is not among them."""
        return self._indices.get(label_key(value))


def label_order(names: Iterable[str]) -> list[str]:
    """The distinct names in order: numbers by value, then other names."""
    return sorted(set(names), key=lambda name: (0, float(name), name) if _NUMBER.fullmatch(name) else (1, 0.0, name))


def labels_that_look_missing(counts: Mapping[str, int]) -> str:
    """A warning if labels look like marks of rows without one: "-", "nan", or -1 as the only negative number with 0."""
    negative = [name for name in counts if name.startswith("-") and _NUMBER.fullmatch(name)]
    signs = len(negative) > 1 or "0" not in counts
    found = {
        name: count
        for name, count in counts.items()
        if name.lower() in _LOOK_MISSING and not (name in negative and signs)
    }
    if not found:
        return ""
    listed = ", ".join(f"{name!r} ({count} rows)" for name, count in found.items())
    return f"the label {listed} is a class; if it means no label, set no_label to [{', '.join(map(repr, found))}]"


def drop_unlabelled(table: Table, column: str, no_label: Sequence[Any] | None) -> tuple[Table, str]:
    """Drop the rows without a label.

    Args:
        table: the rows.
        column: of the labels.
        no_label: the labels that mean none, in addition to None, NaN and empty cells; None drops no rows.

    Returns:
        The table, and a message for the user, "" if nothing changed.
    """
    if no_label is None:
        return table, ""
    keys = set(map(label_key, no_label))
    values = [plain_value(value) for value in table[column]]
    kept = [row for row, value in enumerate(values) if not (is_missing(value) or label_key(value) in keys)]
    if len(kept) == len(table):
        return table, ""
    dropped = Counter(repr(values[row]) for row in set(range(len(table))) - set(kept))
    listed = ", ".join(f"{value} {count} times" for value, count in dropped.most_common(5))
    message = f"{table.source}: {len(table) - len(kept):,} of {len(table):,} rows have no label ({listed}); dropped"
    return table.select(kept), message


def mapping_from_text(text: str) -> dict[Any, Any] | None:
    """The mapping that a text holds, in JSON or Python's notation; None if it holds none."""
    text = text.strip()
    if not (text.startswith("{") and text.endswith("}")):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = _literal(text)
    return values if isinstance(values, dict) else None


def _literal(text: str) -> Any:
    """The value of a text in Python's notation; None if it is none."""
    try:
        return ast.literal_eval(text) if len(text) <= _LONGEST_LITERAL else None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def list_from_text(text: str) -> list[Any] | None:
    """The list that a text holds: JSON, Python's and NumPy's notation, or names in brackets; None if it holds none.

    Tuples and sets of quoted texts and numbers are lists too.
    """
    text = text.strip()
    if text[:1] in ("(", "{") and text[-1:] in (")", "}"):
        values = _literal(text)
        return (
            list(values) if isinstance(values, tuple) else sorted(values, key=str) if isinstance(values, set) else None
        )
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        values = json.loads(text)
        return values if isinstance(values, list) else None
    except (ValueError, RecursionError):
        inner = text[1:-1].strip()
    if any(bracket in _QUOTED.sub("", inner) for bracket in "[]{}"):
        return None
    quoted = _QUOTED.findall(inner)
    if quoted and not _QUOTED.sub("", inner).strip(", \t\r\n"):
        try:
            return [ast.literal_eval(item) for item in quoted]
        except (ValueError, SyntaxError):
            return None
    if quoted and isinstance(values := _literal(text), list):  # with None, say
        return values
    words = inner.split()
    if words and "," not in inner and all(map(_NUMBER.fullmatch, words)):
        return words
    return [name for name in (item.strip() for item in inner.split(",")) if name]
