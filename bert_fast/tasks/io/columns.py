"""Which column of a table plays which role: named by the user, or guessed from usual names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bert_fast.tasks.io.table import Table


@dataclass(frozen=True)
class Role:
    """A column that a task reads.

    Args:
        name: of the role, as in the setting `columns.<name>`.
        usual: column names by which it is guessed, the likeliest first; compared without case.
        required: whether there has to be one.
        target: whether it is what the model learns to predict: not needed for predictions.
    """

    name: str
    usual: tuple[str, ...]
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


def setting_of(role: str) -> str:
    """What a message calls the setting that names the column of a role."""
    return f"--columns.{role} (--data.columns.{role} of bert-fast finetune)"


def choose_columns(
    table: Table, roles: Sequence[Role], given: Mapping[str, str] | None = None, *, training: bool = True
) -> dict[str, str]:
    """The column for each role: `given` by name, else guessed.

    Args:
        training: targets have to be there.

    Returns:
        {role: column}; roles that are not required may be missing.

    Raises:
        ValueError: no such column or role, or a required one can't be guessed; the message lists what there is.
    """
    given = dict(given or {})
    there = ", ".join(table.columns) or "none"
    if unknown := sorted(set(given) - {role.name for role in roles}):
        expected = ", ".join(role.name for role in roles)
        raise ValueError(f"columns has {', '.join(unknown)}; this task reads {expected}")
    chosen: dict[str, str] = {}
    for role in roles:
        if (name := given.get(role.name)) is not None:
            if name not in table.columns:
                raise ValueError(f"{table.source} has no column {name!r} for {role.name}; it has {there}")
            chosen[role.name] = name
    by_name = {name.lower(): name for name in table.columns if name not in chosen.values()}
    for role in roles:
        if role.name in chosen:
            continue
        found = next((by_name[name] for name in role.usual if name in by_name), None)
        if found is not None:
            chosen[role.name] = found
            by_name.pop(found.lower())
        elif role.required and (training or not role.target):
            raise ValueError(
                f"{table.source}: which column is the {role.name}? It has {there}; "
                f"name one with {setting_of(role.name)}"
            )
    return {role.name: chosen[role.name] for role in roles if role.name in chosen}


def describe(table: Table, columns: Mapping[str, str]) -> str:
    """The sentence that tells the user which columns are read."""
    left = [name for name in table.columns if name not in columns.values()]
    chosen = ", ".join(f"{role} = {name!r}" if role != name else role for role, name in columns.items())
    return f"{table.source}: {len(table):,} rows; {chosen}" + (f"; not read: {', '.join(left)}" if left else "")


def texts(table: Table, column: str) -> list[str]:
    """A column of texts; numbers become their text, a missing value the empty text.

    Raises:
        ValueError: a value is no text; the message says where.
    """
    found = []
    for row, value in enumerate(table[column]):
        if value is None:
            value = ""
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            value = str(value)
        elif not isinstance(value, str):
            raise ValueError(f"{table.where(row)}: {column!r} holds {type(value).__name__}; expected a text")
        found.append(value)
    return found


def settle_empty(table: Table, columns: Sequence[str], policy: str, fill: str = "") -> tuple[Table, list[int], str]:
    """Rows whose text in one of `columns` is empty or only spaces: refused, dropped, or filled.

    Args:
        policy: refuse, drop or fill.
        fill: the text that is put in with policy "fill".

    Returns:
        The table, the indices (in the one given) of its rows, and a sentence for the user, "" if nothing was done.

    Raises:
        ValueError: there are such rows and the policy is "refuse".
    """
    everything = list(range(len(table)))
    empty = {column: [row for row, text in enumerate(texts(table, column)) if not text.strip()] for column in columns}
    bad = sorted({row for rows in empty.values() for row in rows})
    if not bad:
        return table, everything, ""
    listed = ", ".join(str(table.numbers[row]) for row in bad[:10]) + (" ..." if len(bad) > 10 else "")
    what = f"{table.source}: {len(bad)} of {len(table)} rows have no text ({table.counted} {listed})"
    if policy == "refuse":
        raise ValueError(f"{what}; give data.empty: drop to leave them out, or fill to put a text in")
    if policy == "drop":
        kept = sorted(set(everything) - set(bad))
        return table.select(kept), kept, f"{what}; left out"
    for column, rows in empty.items():
        missing = set(rows)
        filled = [fill if row in missing else text for row, text in enumerate(texts(table, column))]
        table = table.with_column(column, filled)
    return table, everything, f"{what}; filled with {fill!r}"
