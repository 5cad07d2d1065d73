"""Draw the recorded benchmarks: one SVG per report, next to its JSON.

    python -m benchmarks.reports.plots [FOLDER ...]      folders benchmarks/results/<device>; without one, all of them

One panel per kind of pass, one group per size, one bar per variant. A bar is the minimal traffic or FLOPs over the
time, so longer is better at every size; its label is the time. Only this module needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

from bert_fast.bench.runner import RESULTS, YARDSTICK

OURS = ("#1b6ca8", "#4c9bd6", "#0b3c5d", "#7db9e8")
PEERS = (
    *("#b8b8b8", "#8f8f8f", "#d9c79a", "#a89f91", "#c9b7c4", "#9fb59a", "#6f6f6f"),
    *("#e0a08a", "#b07a6a", "#8ab0a8", "#c4c46a", "#9a86b0", "#5f7a6a", "#d8b0d0"),
)
YARDSTICK_COLOUR = "#e8e8e8"
KIND = re.compile(r"^(?P<size>.*?) (?P<kind>(?:forward|backward|unpad|pad|train|infer)\b.*|one step\b.*)$")
BAR = 0.17  # inches


def split(case: str) -> tuple[str, str]:
    """Split the name of a case into its size and the kind of pass."""
    match = KIND.match(case)
    return (match["size"], match["kind"]) if match else (case, "")


def panels(rows: list[dict[str, Any]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """The rows by kind of pass and size."""
    by_kind: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        size, kind = split(row["case"])
        by_kind.setdefault(kind, {}).setdefault(size, []).append(row)
    return by_kind


def colours(rows: list[dict[str, Any]]) -> dict[str, str]:
    """One colour per variant: blue for ours, grey and brown for peers."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    ours = [name for name in names if name.startswith("bert_fast")]
    peers = [name for name in names if name not in ours]
    palette = {name: OURS[index % len(OURS)] for index, name in enumerate(ours)}
    palette |= {name: PEERS[index % len(PEERS)] for index, name in enumerate(peers)}
    return {name: YARDSTICK_COLOUR if name == YARDSTICK else palette[name] for name in names}


def measure_of(rows: list[dict[str, Any]]) -> tuple[str, float, str]:
    """The column to draw, its divisor, and the unit of the quotient."""
    if any(row.get("tokens_per_s") for row in rows):
        return "tokens_per_s", 1000.0, "thousand real tokens per second"
    flops = max((row["gflops"] or 0.0 for row in rows), default=0.0)
    column, top = ("gflops", flops) if flops else ("gbytes_per_s", max(row["gbytes_per_s"] or 0.0 for row in rows))
    large = top >= 1000
    unit = ("FLOP/s", "of the minimal FLOPs") if flops else ("B/s", "of the minimal traffic")
    return column, 1000.0 if large else 1.0, f"{'T' if large else 'G'}{unit[0]} {unit[1]}"


def milliseconds(ms: float) -> str:
    """`ms` with three digits."""
    return f"{ms:.0f} ms" if ms >= 100 else f"{ms:.{max(0, 2 - math.floor(math.log10(ms)))}f} ms"


def draw_panel(
    axes: Any, sizes: dict[str, list[dict[str, Any]]], colour: dict[str, str], column: str, by: float
) -> None:
    """Draw groups of bars from the top down, one bar apart."""
    y, ticks = 0.0, []
    for size, rows in sizes.items():
        top = y
        for row in rows:
            value = (row[column] or 0.0) / by
            if row["ms"] is None:
                text = "refused"
            else:
                axes.barh(y, value, height=0.92, color=colour[row["variant"]])
                text = milliseconds(row["ms"])
            axes.annotate(
                text,
                (value if value else axes.get_xlim()[0], y),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=6,
                color="#444444" if row["ms"] is not None else "#a04040",
                bbox={"facecolor": "white", "alpha": 0.75, "linewidth": 0, "pad": 0.4},
            )
            y += 1.0
        ticks.append(((top + y - 1) / 2, size))
        y += 1.0
    axes.set_yticks([tick for tick, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.set_ylim(y - 1.3, -0.8)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.6, which="major")
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def draw(op: str, report: dict[str, Any], file: Path) -> None:
    """Draw a report's rows as one figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    plt.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": op, "font.family": "DejaVu Sans"})
    rows = report["rows"]
    colour = colours(rows)
    kinds = panels(rows)
    column, by, unit = measure_of(rows)
    values = [(row[column] or 0.0) / by for row in rows if row["ms"] is not None]
    best = [max((row[column] or 0.0) for row in group) for sizes in kinds.values() for group in sizes.values()]
    log = max(best) > 50 * min(value for value in best if value > 0)
    columns = min(2, len(kinds))
    lines = -(-len(kinds) // columns)
    most = [
        max(sum(len(group) + 1 for group in sizes.values()) for sizes in list(kinds.values())[i * columns :][:columns])
        for i in range(lines)
    ]
    heights = [BAR * bars + 0.55 for bars in most]
    figure, grid = plt.subplots(
        lines,
        columns,
        figsize=(5.2 * columns, sum(heights) + 1.35),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    ceiling = ceiling_of(report, column, by)
    limits = "".join(f"dashed: {name} {reached:.3g}, measured in the same run; " for name, reached in ceiling.items())
    for axes, (kind, sizes) in zip(grid.flat, kinds.items(), strict=False):
        if log:
            axes.set_xscale("log")
        low = min(value for value in values if value > 0) / 2 if log else 0.0
        axes.set_xlim(low, max(values) * (2.2 if log else 1.18))
        draw_panel(axes, sizes, colour, column, by)
        for name, reached in ceiling.items():
            if low < reached < axes.get_xlim()[1]:
                axes.axvline(reached, color="#b04030", linewidth=0.9, linestyle="--")
                axes.annotate(
                    name, (reached, 1), xycoords=("data", "axes fraction"), xytext=(0, 1),
                    textcoords="offset points", ha="center", va="bottom", fontsize=6, color="#b04030",
                )  # fmt: skip
        axes.set_title(kind, fontsize=9, loc="left")
    for axes in list(grid.flat)[len(kinds) :]:
        axes.set_visible(False)
    about = report["environment"]
    where = about.get("device_name", about["device"])
    figure.suptitle(
        f"{op} on {where}: {unit}\nlonger is better; {limits}"
        f"torch {about['torch']}, commit {about['commit']}, {about['date']}",
        fontsize=8.5,
        x=0.01,
        ha="left",
    )
    figure.legend(
        handles=[Patch(color=shade, label=name) for name, shade in colour.items()],
        loc="outside lower left", ncols=2 * columns, fontsize=7, frameon=False,
    )  # fmt: skip
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)
    plt.close(figure)


def ceiling_of(report: dict[str, Any], column: str, by: float) -> dict[str, float]:
    """The measured ceilings of the column, by label."""
    ceilings = report.get("ceilings", {})
    if column == "tokens_per_s":
        return {}
    if column == "gbytes_per_s":
        return {"copy": ceilings["copy_gbytes_per_s"] / by}
    name = "bf16" if "bf16_gemm_gflops" in ceilings else "fp32"
    return {f"{name} GEMM": ceilings[f"{name}_gemm_gflops"] / by}


def draw_folder(folder: Path, suffix: str = ".svg") -> list[Path]:
    """Draw every report in a device's folder; returns the written files."""
    written = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or not any(row.get("ms") for row in report.get("rows", [])):
            continue
        file = path.with_suffix(suffix)
        draw(path.stem, report, file)
        written.append(file)
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description="draw the recorded benchmarks")
    parser.add_argument("folders", nargs="*", type=Path, help="results/<device>; all of them if none is named")
    parser.add_argument("--png", action="store_true", help="PNG instead of SVG")
    options = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("plots need matplotlib: pip install matplotlib", file=sys.stderr)
        return 1
    folders = options.folders or sorted(path for path in RESULTS.iterdir() if path.is_dir())
    for folder in folders:
        for file in draw_folder(folder, ".png" if options.png else ".svg"):
            print(f"{file} {file.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
