"""An in-memory table with named columns: the input of every task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Args:
        columns: name -> the values of the rows.
        source: the origin of the rows, with which error messages begin.
        numbers: the position of each row in its source, such as the line of a file; 1, 2 ... if empty.
        unit: what `numbers` counts: "line", "row" or "question".
        notes: what a user should know of how the source was read, such as a delimiter that was detected.

    Raises:
        ValueError: the columns, or `numbers`, differ in length.
        TypeError: a column is no list; other sequences, such as arrays or a DataFrame's columns, are copied into lists.
    """

    columns: dict[str, list[Any]]
    source: str = "table"
    numbers: list[int] = field(default_factory=list)
    unit: str = "row"
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, values in self.columns.items():
            if isinstance(values, (str, bytes)) or not hasattr(values, "__iter__"):
                raise TypeError(f"{self.source}: the column {name!r} is {values!r}; expected a list of values")
        if not all(isinstance(values, list) for values in self.columns.values()):
            object.__setattr__(self, "columns", {name: list(values) for name, values in self.columns.items()})
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{self.source}: columns differ in length: {lengths}")
        rows = len(self)
        if not self.numbers:
            object.__setattr__(self, "numbers", list(range(1, rows + 1)))
        if len(self.numbers) != rows:
            raise ValueError(f"{self.source}: {len(self.numbers)} row numbers; expected {rows}, one per row")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self.columns:
            raise ValueError(f"{self.source} has no column {name!r}; it has {', '.join(self.columns) or 'none'}")
        return self.columns[name]

    def where(self, row: int) -> str:
        """The location of the row with index `row` for error messages: source and line."""
        return f"{self.source}, {self.unit} {self.numbers[row]}"

    def select(self, rows: Sequence[int]) -> Table:
        """The rows with these indices, in this order."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(columns, self.source, [self.numbers[row] for row in rows], self.unit, self.notes)

    def with_column(self, name: str, values: list[Any]) -> Table:
        """The table with a column added or replaced."""
        return replace(self, columns={**self.columns, name: values})

    def with_note(self, note: str) -> Table:
        """The table with one more note."""
        return replace(self, notes=(*self.notes, note))

    def row(self, row: int) -> dict[str, Any]:
        """One row as a mapping."""
        return {name: values[row] for name, values in self.columns.items()}
