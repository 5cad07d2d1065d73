"""One self-contained HTML page of a report, or of several that are compared.

Roofline, time and memory by length, ours over the peers, and the rows as tables; the figures are inline SVG.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from bert_fast import _html
from bert_fast.bench import table
from bert_fast.bench.names import OURS, YARDSTICK

Report = Mapping[str, Any]
Row = Mapping[str, Any]
PASSES = ("forward + backward", "forward", "backward")
COLOURS = ("#1b6ca8", "#d1733c", "#3b9e6a", "#8a5fb0", "#b8a13a", "#7f7f7f", "#c65b7c", "#4fb3bf", "#a0623d", "#5b7d2a")
# What the SVGs have in common: they are read on a light and on a dark page.
_INK = "#808080"
_STYLE = "<style>figure svg { background: none !important } figure { margin: 1em 0 } .bad { color: #c0392b }</style>"


def of_report(report: Report) -> str:
    """The page of one report."""
    title = f"Benchmarks on {report['environment']['device']}"
    return _html.html_page(title, [_STYLE, f"<h1>{escape(title)}</h1>", *_about(report), *_sections(report)])


def of_comparison(sections: Sequence[tuple[str, str, Sequence[Sequence[str]]]], reports: Mapping[str, Report]) -> str:
    """The page of a comparison.

    Args:
        sections: title, summary and table of each pair of files.
        reports: by the name of the file.
    """
    parts = [_STYLE, "<h1>Benchmarks compared</h1>"]
    for title, summary, lines in sections:
        parts += [f"<h2>{escape(title)}</h2>", f"<p>{escape(summary)}</p>", _changes(lines)]
    last = list(reports.values())[-1]
    parts += ["<h2>The environments</h2>", _html.table(_environments(reports)), *_sections(last)]
    return _html.html_page("Benchmarks compared", parts)


def _changes(lines: Sequence[Sequence[str]]) -> str:
    head, *rows = lines
    marked = {"slower": "bad", "now refused": "bad", "gone": "bad", "same": "quiet", "refused": "quiet"}
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f'<tr class="{marked.get(row[-1], "")}">' + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{cells}</tr>\n{body}</table></div>'


def _environments(reports: Mapping[str, Report]) -> list[list[Any]]:
    names = dict.fromkeys(name for report in reports.values() for name in report["environment"])
    rows = [[name, *(str(report["environment"].get(name, "")) for report in reports.values())] for name in names]
    return [["", *reports], *rows]


def _about(report: Report) -> list[str]:
    environment = [[name, str(value)] for name, value in report["environment"].items()]
    ceilings = [[name, f"{value:,.1f}"] for name, value in report["ceilings"].items()]
    busy = '<p class="bad">Other processes used the processor: the figures are unreliable.</p>'
    parts = [busy] if report["environment"].get("busy") else []
    parts += [f'<p class="bad">failed: {escape(failure)}</p>' for failure in report.get("failures", [])]
    return [
        *parts,
        "<details><summary>Environment, and the ceilings measured in this run</summary>",
        _html.table([["environment", ""], *environment]),
        _html.table([["ceiling", ""], *ceilings]),
        "</details>",
    ]


def _sections(report: Report) -> list[str]:
    parts: list[str] = []
    timed = [row for row in report["rows"] if row["ms"] is not None]
    if any(row.get("flops") and row.get("traffic") for row in timed):
        parts += ["<h2>Roofline</h2>", _figure(_roofline(timed, report["ceilings"]))]
    for op in dict.fromkeys(row["op"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["op"] == op]
        parts.append(f"<h2>{escape(op)}</h2>")
        parts += _figures_of_op([row for row in rows if row["ms"] is not None])
        columns, rate = table.headings(rows), table._rate(rows)
        parts.append(_html.table([columns, *(table.cells(row, rate) for row in rows)]))
    return parts


def _figures_of_op(rows: Sequence[Row]) -> list[str]:
    figures = []
    ratios = [row for row in rows if row.get("ratio_to_best_peer") is not None and row["variant"].startswith(OURS)]
    if ratios:
        figures += ["<h3>Ours over the best peer: longer is faster</h3>", _figure(_over_peers(ratios))]
    for value, title, unit in (("ms", "Time by length", "ms"), ("peak_mbytes", "Memory by length", "MB")):
        drawn = [row for row in rows if row.get(value) and row.get("length") and row["variant"] != YARDSTICK]
        lengths: dict[str, set[int]] = {}
        for row in drawn:
            lengths.setdefault(_kind(row["case"]), set()).add(row["length"])
        drawn = [row for row in drawn if len(lengths[_kind(row["case"])]) > 1]
        if drawn:
            figures += [f"<h3>{title}</h3>", _figure(_by_length(drawn, value, unit))]
    return figures


def _figure(figure: Any) -> str:
    return f"<figure>{_html.svg(figure)}</figure>"


def _axes(width: float, height: float, panels: int = 1) -> tuple[Any, list[Any]]:
    """A figure of panels, two in a row, each row `height` inches, for a light and a dark page."""
    from matplotlib.figure import Figure

    rows, columns = -(-panels // 2), min(panels, 2)
    figure = Figure(figsize=(width, height * rows), layout="constrained")
    figure.patch.set_alpha(0.0)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[panels:]:
        unused.set_visible(False)
    axes = axes[:panels]
    for panel in axes:
        panel.patch.set_alpha(0.0)
        panel.tick_params(colors=_INK, which="both")
        panel.grid(visible=True, color=_INK, alpha=0.25, linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
        for spine in panel.spines.values():
            spine.set_color(_INK)
        for text in (panel.title, panel.xaxis.label, panel.yaxis.label):
            text.set_color(_INK)
    return figure, axes


def _legend(panel: Any, **options: Any) -> None:
    panel.legend(fontsize=8, framealpha=0.0, labelcolor=_INK, **options)


def _roofline(rows: Sequence[Row], ceilings: Mapping[str, float]) -> Any:
    """GFLOP/s by FLOPs a byte, under the bandwidth and the matrix products of the run."""
    figure, (panel,) = _axes(9, 4.5)
    drawn = [row for row in rows if row.get("flops") and row.get("traffic") and row["variant"] != YARDSTICK]
    intensities = [row["flops"] / row["traffic"] for row in drawn]
    ends = [min(intensities) / 2, max(intensities) * 2]
    copy = ceilings["copy_gbytes_per_s"]
    for name, ceiling in ceilings.items():
        if name.endswith("_gemm_gflops"):
            corner = ceiling / copy
            xs = sorted({ends[0], min(max(corner, ends[0]), ends[1]), ends[1]})
            panel.plot(xs, [min(ceiling, copy * x) for x in xs], color=_INK, linewidth=1.0)
            text = f"{name.removesuffix('_gemm_gflops')} {ceiling:,.0f}"
            panel.annotate(text, (ends[1], min(ceiling, copy * ends[1])), color=_INK, fontsize=8, va="center")
    groups: dict[str, list[Row]] = {}
    for row in drawn:
        groups.setdefault(f"{row['op']}, {'ours' if row['variant'].startswith(OURS) else 'peers'}", []).append(row)
    for index, (name, members) in enumerate(groups.items()):
        panel.scatter(
            [row["flops"] / row["traffic"] for row in members],
            [row["gflops"] for row in members],
            s=22 if name.endswith("ours") else 14,
            marker="o" if name.endswith("ours") else "x",
            color=COLOURS[index // 2 % len(COLOURS)] if name.endswith("ours") else _INK,
            label=name,
        )
    panel.set(xscale="log", yscale="log", xlabel="FLOPs a byte", ylabel="GFLOP/s")
    _legend(panel)
    return figure


def _over_peers(rows: Sequence[Row]) -> Any:
    """A bar for each variant of ours: the time of the best peer over its time."""
    figure, (panel,) = _axes(9, 0.6 + 0.24 * len(rows))
    labels = [_html.label(f"{row['case']}, {row['variant'].removeprefix(OURS).strip()}") for row in rows]
    ratios = [row["ratio_to_best_peer"] for row in rows]
    places = range(len(rows))
    panel.barh(places, ratios, color=[COLOURS[0] if ratio >= 1 else COLOURS[1] for ratio in ratios], height=0.7)
    for place, ratio in zip(places, ratios, strict=True):
        panel.annotate(f" {ratio:.2f}", (ratio, place), va="center", fontsize=8, color=_INK)
    panel.axvline(1.0, color=_INK, linewidth=1.0)
    panel.set_yticks(list(places), labels, fontsize=8)
    panel.invert_yaxis()
    panel.margins(x=0.12)
    return figure


def _by_length(rows: Sequence[Row], value: str, unit: str) -> Any:
    """A panel for each pass and dtype, a line for each variant."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(_kind(row["case"]), []).append(row)
    figure, panels = _axes(9, 3.2, len(kinds))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    colour = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(variants)}
    for panel, (kind, members) in zip(panels, kinds.items(), strict=True):
        for name in dict.fromkeys(row["variant"] for row in members):
            points = sorted((row["length"], row[value]) for row in members if row["variant"] == name)
            style = "-" if name.startswith(OURS) else "--"
            panel.plot(*zip(*points, strict=True), style, marker=".", color=colour[name], label=_html.label(name))
        panel.set(xscale="log", yscale="log", xlabel="longest sequence, or rows", ylabel=unit)
        panel.set_title(kind, fontsize=9)
        _legend(panel)
    return figure


def _kind(case: str) -> str:
    """The dtype and the pass in the name of a case."""
    which: Callable[[str], bool] = case.__contains__
    found = next(filter(which, PASSES), "")
    dtype = next((name for name in ("float32", "bfloat16", "float16", "int8") if name in case), "")
    rest = [word for word in ("half filled", "dropout") if word in case]
    return ", ".join(part for part in (dtype, found, *rest) if part) or "all"
