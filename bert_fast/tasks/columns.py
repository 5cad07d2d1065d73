"""Which column of a table plays which role: named by the user, or guessed from usual names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bert_fast.tasks.table import Table


@dataclass(frozen=True)
class Role:
    """A column that a task reads.

    Args:
        name: of the role, as in `--columns.<name>`.
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
                f"{table.source}: which column is the {role.name}? It has {there}; name it with "
                f"--columns.{role.name} COLUMN"
            )
    return chosen
