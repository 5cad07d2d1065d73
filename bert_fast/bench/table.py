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
    """The texts of a row; of a refused one the reason in the third cell. Files of older versions lack some fields."""
    if row["ms"] is None:
        return [row["case"], row["variant"], f"refused: {row.get('refused', '')}", *[""] * 7]
    yardstick = row["variant"] == names.YARDSTICK

    def text(field: str, form: str) -> str:
        value = row.get(field)
        return "" if value is None else format(value, form)

    interval = [text(field, ".3f") for field in ("ms_low", "ms_high")]
    return [
        row["case"],
        row["variant"],
        text("ms", ".3f"),
        " to ".join(interval) if all(interval) else "",
        text("gbytes_per_s", ".1f") if rate == "GB/s" else text("tokens_per_s", ",.0f"),
        text("gflops", ".1f"),
        text("share_of_ceiling", ".0%"),
        "own mask" if row.get("error") is None and not yardstick else text("error", ".1e"),
        text("peak_mbytes", ".1f"),
        "" if yardstick else text("ratio_to_best_peer", ".2f"),
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
