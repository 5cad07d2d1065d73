"""Rows with named columns in memory: what every task reads, wherever it came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Table:
    """Columns of equal length.

    Args:
        columns: name -> the values of the rows.
        source: where the rows came from; errors begin with it.
        numbers: where each row is in its source (line of a file, or count from 1); counted from 1 if empty.
        counted: what `numbers` counts: "line" or "row".
    """

    columns: dict[str, list[Any]]
    source: str = "table"
    numbers: list[int] = field(default_factory=list)
    counted: str = "row"

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"{self.source}: columns differ in length: {lengths}")
        rows = len(self)
        if not self.numbers:
            object.__setattr__(self, "numbers", list(range(1, rows + 1)))
        if len(self.numbers) != rows:
            raise ValueError(f"{self.source}: {len(self.numbers)} row numbers came for {rows} rows")

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self.columns:
            raise ValueError(f"{self.source} has no column {name!r}; it has {', '.join(self.columns) or 'none'}")
        return self.columns[name]

    def where(self, row: int) -> str:
        """How an error names the row with index `row`: source and line."""
        return f"{self.source}, {self.counted} {self.numbers[row]}"

    def select(self, rows: Sequence[int]) -> Table:
        """The rows with these indices, in this order."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(columns, self.source, [self.numbers[row] for row in rows], self.counted)

    def with_column(self, name: str, values: list[Any]) -> Table:
        """The table with a column added, or replaced."""
        return Table({**self.columns, name: values}, self.source, self.numbers, self.counted)

    def row(self, row: int) -> dict[str, Any]:
        """One row as a mapping."""
        return {name: values[row] for name, values in self.columns.items()}
