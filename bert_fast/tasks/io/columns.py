"""The roles of a table's columns: named by the user, or guessed from common column names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

from bert_fast.tasks.io.labels import is_missing, plain_value
from bert_fast.tasks.io.table import Table

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Role:
    """A column that a task reads.

    Args:
        name: of the role, as in the setting `columns.<name>`.
        usual_names: common column names for it, most likely first; matched case-insensitively.
        required: whether the task needs it.
        target: whether it is what the model learns to predict, which predictions don't need.
    """

    name: str
    usual_names: tuple[str, ...]
    required: bool = True
    target: bool = False


TEXT = Role(
    "text",
    ("text", "sentence", "sentence1", "premise", "question1", "review", "comment", "content", "tweet", "document",
     "body", "message", "query", "title", "string"),
)  # fmt: skip
TEXT_PAIR = Role(
    "text_pair", ("text_pair", "text2", "sentence2", "hypothesis", "question2", "passage", "answer"), required=False
)
LABEL = Role(
    "label", ("label", "labels", "class", "category", "target", "sentiment", "topic", "intent", "y"), target=True
)
SCORE = Role(
    "label", ("label", "score", "labels", "rating", "stars", "similarity", "value", "target", "y"), target=True
)


def column_option(role: str) -> str:
    """The option that names the column of a role, for messages."""
    return f"--columns.{role} (--data.columns.{role} of bert-fast finetune)"


def choose_columns(
    table: Table, roles: Sequence[Role], named: Mapping[str, str] | None = None, *, training: bool = True
) -> dict[str, str]:
    """Choose the column of each role.

    Args:
        table: the rows.
        roles: that the task reads.
        named: role -> column; the columns of other roles are guessed from common names.
        training: require the columns of targets.

    Returns:
        role -> column; a role without a column, if it is not required, is left out.

    Raises:
        ValueError: a column or role does not exist, or a required column can't be guessed; the message lists the
            columns.
    """
    named = dict(named or {})
    available = ", ".join(table.columns) or "none"
    if unknown := sorted(set(named) - {role.name for role in roles}):
        expected = ", ".join(role.name for role in roles)
        raise ValueError(f"columns has the role {', '.join(unknown)}; expected roles of this task: {expected}")
    chosen: dict[str, str] = {}
    for role in roles:
        if (name := named.get(role.name)) is not None:
            if name not in table.columns:
                raise ValueError(f"{table.source} has no column {name!r} for {role.name}; it has {available}")
            chosen[role.name] = name
    by_name = {name.lower(): name for name in table.columns if name not in chosen.values()}
    for role in roles:
        if role.name in chosen:
            continue
        guess = next((by_name[name] for name in role.usual_names if name in by_name), None)
        if guess is not None:
            chosen[role.name] = guess
            by_name.pop(guess.lower())
        elif role.required and (training or not role.target):
            header = ", or the columns of a file without a header with names" if table.unit == "line" else ""
            raise ValueError(
                f"{table.source}: no column for {role.name} among {available}; name it with "
                f"{column_option(role.name)}{header}"
            )
    return {role.name: chosen[role.name] for role in roles if role.name in chosen}


def describe_columns(table: Table, columns: Mapping[str, str]) -> str:
    """The message about which columns are used, with the table's notes."""
    unused = [name for name in table.columns if name not in columns.values()]
    chosen = ", ".join(f"{role} = {name!r}" if role != name else role for role, name in columns.items())
    parts = [f"{table.source}: {len(table):,} rows", chosen, *table.notes]
    return "; ".join([*parts, f"unused: {', '.join(unused)}"] if unused else parts)


def text_column(table: Table, column: str) -> list[str]:
    """A column as strings; numbers are converted, a missing value (None or NaN) is the empty string.

    Raises:
        ValueError: a value is neither a string nor a number, or not valid Unicode; the message says where.
    """
    texts = []
    for row, cell in enumerate(table[column]):
        value = plain_value(cell)
        if isinstance(value, (int, float, Decimal, type(None))) and not isinstance(value, bool):
            value = "" if is_missing(value) else str(value)
        elif not isinstance(value, str):
            raise ValueError(f"{table.where(row)}: {column!r} holds {type(value).__name__}; expected a text")
        if not value.isascii() and _SURROGATE.search(value):
            raise ValueError(f"{table.where(row)}: {column!r} has half of a surrogate pair; expected valid Unicode")
        texts.append(value)
    return texts


def number_column(table: Table, column: str) -> list[float]:
    """A column as floats.

    Raises:
        ValueError: a value is not a finite number; the message says where.
    """
    numbers = []
    for row, value in enumerate(table[column]):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"{table.where(row)}: {column!r} holds {value!r}; expected a number")
        numbers.append(number)
    return numbers


def handle_empty_texts(table: Table, columns: Sequence[str], policy: str, fill: str = "") -> tuple[Table, str]:
    """Refuse, drop or fill the rows whose text in one of `columns` is empty or white space.

    Args:
        table: the rows.
        columns: of texts.
        policy: refuse, drop or fill.
        fill: the text that replaces an empty one with policy "fill".

    Returns:
        The table, and a message for the user, "" if nothing changed.

    Raises:
        ValueError: there are such rows and the policy is "refuse".
    """
    empty = {name: {row for row, text in enumerate(text_column(table, name)) if not text.strip()} for name in columns}
    empty_rows: set[int] = set().union(*empty.values())
    if not empty_rows:
        return table, ""
    numbers = [str(table.numbers[row]) for row in sorted(empty_rows)]
    listed = ", ".join(numbers[:10]) + (" ..." if len(numbers) > 10 else "")
    message = f"{table.source}: {len(numbers)} of {len(table)} rows have no text ({table.unit} {listed})"
    if policy == "refuse":
        raise ValueError(f"{message}; set data.empty to drop to drop them, or to fill to fill in a text")
    if policy == "drop":
        return table.select([row for row in range(len(table)) if row not in empty_rows]), f"{message}; dropped"
    for name, rows in empty.items():
        filled = [fill if row in rows else text for row, text in enumerate(text_column(table, name))]
        table = table.with_column(name, filled)
    return table, f"{message}; filled with {fill!r}"
