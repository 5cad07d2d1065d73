"""Recorded benchmarks compared: what got slower or faster beyond the noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bert_fast._io import read_json
from bert_fast.bench.names import OURS, YARDSTICK

Report = dict[str, Any]
Key = tuple[str, str, str]  # op, case, variant
# What makes the times of two files incomparable where it differs.
SAME = ("device", "threads", "compute_capability")


@dataclass(frozen=True)
class Change:
    """A variant of a case in two files.

    Attributes:
        verdict: "slower" or "faster" where the 95 % intervals of the medians don't overlap and the medians differ by
            more than the threshold; "same"; "now refused", "now timed", "gone" or "new".
        ratio: the new time over the old one.
    """

    key: Key
    old: Mapping[str, Any] | None
    new: Mapping[str, Any] | None
    verdict: str
    ratio: float | None = None


def load(path: Path) -> Report:
    """The report in a JSON file, or all reports of a folder as one.

    Raises:
        ValueError: the file is no report, or no file of the folder is one.
    """
    if path.is_dir():
        reports = [report for file in sorted(path.glob("*.json")) if (report := _report(file)) is not None]
        if not reports:
            raise ValueError(f"{path} has no JSON file with rows of a benchmark")
        return {**reports[-1], "rows": [row for report in reports for row in report["rows"]]}
    report = _report(path)
    if report is None:
        raise ValueError(f"{path} is no report of bert-fast bench: it has no rows with a case, a variant and a time")
    return report


def _report(file: Path) -> Report | None:
    """The report in a file, its rows with their op; None where it is none."""
    content = read_json(file)
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not isinstance(content.get("environment"), dict):
        return None
    if not all(isinstance(row, dict) and {"case", "variant", "ms"} <= row.keys() for row in rows):
        return None
    return {**content, "rows": [{"op": file.stem, **row} if not row.get("op") else row for row in rows]}


def doubts(old: Report, new: Report) -> list[str]:
    """Why the times of two reports may differ for other reasons than the code."""
    before, after = old["environment"], new["environment"]
    found = [
        f"{name} is {before.get(name)} in one and {after.get(name)} in the other"
        for name in SAME
        if before.get(name) != after.get(name)
    ]
    for name, environment in (("first", before), ("second", after)):
        if environment.get("busy"):
            found.append(f"other processes used the machine in the {name}")
    return found


def compare(old: Report, new: Report, threshold: float) -> list[Change]:
    """The variants of the ops that are in both reports, in the order of the new one.

    Args:
        threshold: medians that differ by less, relatively, are the same: 0.05 is five per cent.

    Raises:
        ValueError: no op is in both.
    """
    before, after = _rows(old), _rows(new)
    ops = [sorted({op for op, *_ in rows}) for rows in (before, after)]
    both = set(ops[0]) & set(ops[1])
    if not both:
        raise ValueError(f"no op is in both: {' and '.join(', '.join(names) or 'none' for names in ops)}")
    keys = [key for key in (*after, *(key for key in before if key not in after)) if key[0] in both]
    return [_change(key, before.get(key), after.get(key), threshold) for key in keys]


def _rows(report: Report) -> dict[Key, Mapping[str, Any]]:
    return {(row["op"], row["case"], row["variant"]): row for row in report["rows"] if row["variant"] != YARDSTICK}


def _change(key: Key, old: Mapping[str, Any] | None, new: Mapping[str, Any] | None, threshold: float) -> Change:
    if old is None or new is None:
        return Change(key, old, new, "new" if old is None else "gone")
    if old["ms"] is None or new["ms"] is None:
        verdict = "refused" if old["ms"] is new["ms"] else "now refused" if new["ms"] is None else "now timed"
        return Change(key, old, new, verdict)
    ratio = new["ms"] / old["ms"]
    (old_low, old_high), (new_low, new_high) = _interval(old), _interval(new)
    verdict = "same"
    if ratio > 1 + threshold and new_low > old_high:
        verdict = "slower"
    elif ratio < 1 / (1 + threshold) and new_high < old_low:
        verdict = "faster"
    return Change(key, old, new, verdict, ratio)


def _interval(row: Mapping[str, Any]) -> tuple[float, float]:
    """The 95 % interval of the median; files of older versions have none."""
    low, high = row.get("ms_low"), row.get("ms_high")
    return (row["ms"], row["ms"]) if low is None or high is None else (low, high)


def worse(changes: Sequence[Change]) -> list[Change]:
    """What makes the exit code 1: one of ours or a registered kernel is slower, refused now, or no longer measured."""
    verdicts = ("slower", "now refused", "gone")
    return [change for change in changes if change.verdict in verdicts and change.key[2].startswith(OURS)]


def lines(changes: Sequence[Change], *, all_of_them: bool = False) -> list[list[str]]:
    """A table of the changes, its headings first."""
    table = [["op", "case", "variant", "before, ms", "now, ms", "ratio", "verdict"]]
    for change in changes:
        if all_of_them or change.verdict not in ("same", "refused"):
            times = [_time(row) for row in (change.old, change.new)]
            ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
            table.append([*change.key, *times, ratio, change.verdict])
    return table


def _time(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["ms"] is None:
        return f"refused: {row.get('refused', '')}"
    low, high = _interval(row)
    return f"{row['ms']:.3f} ({low:.3f} to {high:.3f})"
