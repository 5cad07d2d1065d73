"""The table of a report in the terminal: by rich where it is installed, else as Markdown."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from bert_fast.bench import names

Row = Mapping[str, Any]


def print_table(op: str, report: Mapping[str, Any]) -> None:
    """Print environment, ceilings and rows of a report."""
    rounded = {name: round(value, 1) for name, value in report["ceilings"].items()}
    print(f"{op}: {json.dumps({**report['environment'], **rounded})}")
    if sys.stdout.isatty() and _has_rich():
        _print_rich(report["rows"])
    else:
        print(markdown(report["rows"]))


def _has_rich() -> bool:
    from importlib.util import find_spec

    return find_spec("rich") is not None


def _rate(rows: Sequence[Row]) -> str:
    return "real tokens/s" if any(row.get("tokens_per_s") for row in rows) else "GB/s"


def headings(rows: Sequence[Row]) -> list[str]:
    """The names of the columns."""
    return ["case", "variant", "ms", "95 %", _rate(rows), "GFLOP/s", "of ceiling", "error", "MB", "x best peer"]


def cells(row: Row, rate: str) -> list[str]:
    """The texts of a row; of a refused one the reason in the third cell."""
    if row["ms"] is None:
        return [row["case"], row["variant"], f"refused: {row['refused']}", *[""] * 7]
    yardstick = row["variant"] == names.YARDSTICK
    error = ("" if yardstick else "own mask") if row["error"] is None else f"{row['error']:.1e}"
    ratio = "" if row["ratio_to_best_peer"] is None or yardstick else f"{row['ratio_to_best_peer']:.2f}"
    speed = f"{row['gbytes_per_s']:.1f}" if rate == "GB/s" else f"{row['tokens_per_s']:,.0f}"
    return [
        row["case"],
        row["variant"],
        f"{row['ms']:.3f}",
        f"{row['ms_low']:.3f} to {row['ms_high']:.3f}",
        speed,
        f"{row['gflops']:.1f}",
        f"{row['share_of_ceiling']:.0%}",
        error,
        "" if row["peak_mbytes"] is None else f"{row['peak_mbytes']:.1f}",
        ratio,
    ]


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    columns, rate = headings(rows), _rate(rows)
    lines = [columns, ["---"] * len(columns), *(cells(row, rate) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _print_rich(rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns, rate = headings(rows), _rate(rows)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        shown.add_column(column, justify="left" if column in ("case", "variant") else "right", overflow="fold")
    case = None
    for row in rows:
        texts = cells(row, rate)
        texts[0], case = ("" if texts[0] == case else texts[0]), texts[0]
        ours = row["variant"].startswith(names.OURS)
        style = "red" if row["ms"] is None and ours else "dim" if row["ms"] is None else "bold" if ours else ""
        shown.add_row(*map(_escaped, texts), style=style)
    Console().print(shown)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
