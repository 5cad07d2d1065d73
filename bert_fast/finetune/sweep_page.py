"""The report of a sweep: one self-contained HTML page, made from its sweep.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from bert_fast._html import html_page, label, panels_of, svg, table
from bert_fast._io import check_fields, read_json, write_text
from bert_fast.finetune.report import BLUE, ORANGE, REPORT

RESULT = "sweep.json"
_MAX_BARS = 40  # combinations in the figure
_RUN_FIELDS: dict[str, Any] = {
    "settings": dict, "values": list, "n": int, "mean": (int, float, type(None)), "std": (int, float, type(None)),
    "folders": list, "rank": int,
}  # fmt: skip


def read_sweep(folder: Path) -> dict[str, Any]:
    """The content of the sweep.json of a sweep.

    Raises:
        OSError: it can't be read.
        ValueError: it has another schema; the message names the file.
    """
    path = folder / RESULT
    result = read_json(
        path,
        {"metric": str, "folds": int, "complete": bool, "overwrite": bool, "best": (int, type(None)), "runs": list},
    )
    for number, run in enumerate(result["runs"], 1):
        where = f"{path}: run {number}"
        check_fields(run, _RUN_FIELDS, where)
        if not all(value is None or isinstance(value, (int, float)) for value in run["values"]):
            raise ValueError(f"{where}: 'values' is {run['values']}; expected numbers")
        if not all(isinstance(name, str) for name in run["folders"]):
            raise ValueError(f"{where}: 'folders' is {run['folders']}; expected names")
    return result


def settings_text(settings: Mapping[str, Any]) -> str:
    """Settings as on the command line."""
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "default settings"


def ranked(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The combinations of a result, best first; those of an unfinished sweep in their order."""
    return sorted(result["runs"], key=lambda run: run["rank"])


def write_sweep_page(folder: Path) -> Path:
    """Write `folder`/report.html from the sweep.json there.

    Raises:
        OSError: sweep.json can't be read.
        ValueError: it has another schema; the message names the file.
    """
    path = folder / REPORT
    write_text(path, page(folder.resolve().name, read_sweep(folder), folder))
    return path


def page(title: str, result: Mapping[str, Any], folder: Path) -> str:
    """The report as HTML: the ranking, each combination's values, and the metric by each setting."""
    runs = ranked(result)
    settings = list(dict.fromkeys(name for run in runs for name in run["settings"]))
    header = ["rank", *settings, f"mean {result['metric']}", "sample std", "n", "values"]
    rows = [
        [
            run["rank"] or "", *(str(run["settings"].get(name, "")) for name in settings), run["mean"],
            "" if run["std"] is None else run["std"], run["n"],
            ", ".join("undefined" if value is None else f"{value:.4f}" for value in run["values"]),
        ]
        for run in runs
    ]  # fmt: skip
    folds = f", {result['folds']} folds" if result["folds"] else ""
    note = (
        f"<p>{result['metric']} on dev{folds}: mean and sample standard deviation (divisor n - 1) over the n runs of a "
        "combination, one for each seed and fold.</p>"
    )
    unfinished = "" if result["complete"] else "<p>The sweep has not finished: not all combinations have all runs.</p>"
    parts = [f"<h1>{escape(title)}</h1>", unfinished, note, table([header, *rows])]
    if any(value is not None for run in runs for value in run["values"]):
        parts += ["<h2>Values</h2><p>Dots are runs, bars their means.</p>", values_figure(runs[:_MAX_BARS], result)]
        parts += by_setting(runs, settings, result["metric"])
    links = [_link(folder, name) for run in runs for name in run["folders"]]
    return html_page(title, [*parts, "<h2>Runs</h2><ul>", *links, "</ul>"])


def _link(folder: Path, name: str) -> str:
    page_of_run = f"{name}/{REPORT}"
    if not (folder / page_of_run).is_file():
        return f"<li>{escape(name)}</li>"
    return f'<li><a href="{quote(page_of_run)}">{escape(name)}</a></li>'


def values_figure(runs: Sequence[Mapping[str, Any]], result: Mapping[str, Any]) -> str:
    """The values of each combination, the best on top."""
    figure, (axes,) = panels_of(8, 1.2 + 0.28 * len(runs))
    for position, run in enumerate(runs):
        values = [value for value in run["values"] if value is not None]
        axes.plot(values, [position] * len(values), "o", color=BLUE, ms=4, alpha=0.6)
        if run["mean"] is not None:
            axes.plot([run["mean"]] * 2, [position - 0.3, position + 0.3], color=ORANGE, lw=2)
    axes.set_yticks(range(len(runs)), [label(_short(settings_text(run["settings"]))) for run in runs])
    axes.set(xlabel=f"{label(result['metric'])} on dev", ylim=(len(runs) - 0.5, -0.5))
    return svg(figure)


def by_setting(runs: Sequence[Mapping[str, Any]], settings: Sequence[str], metric: str) -> list[str]:
    """For each setting with several values the means of the combinations that have each value."""
    parts = []
    for name in settings:
        groups: dict[str, list[float]] = {}
        for run in runs:
            if run["mean"] is not None:
                groups.setdefault(str(run["settings"].get(name, "")), []).append(run["mean"])
        if len(groups) < 2:
            continue
        names = sorted(groups, key=_number_or_text)
        figure, (axes,) = panels_of(4.5, 3)
        for position, value in enumerate(names):
            axes.plot([position] * len(groups[value]), groups[value], "o", color=BLUE, ms=4, alpha=0.6)
        axes.plot(range(len(names)), [sum(groups[v]) / len(groups[v]) for v in names], color=ORANGE, lw=1)
        axes.set_xticks(range(len(names)), [label(_short(value)) for value in names])
        axes.set(xlabel=label(name), ylabel=f"{label(metric)} on dev")
        parts.append(svg(figure))
    return ["<h2>By setting</h2><p>Dots are combinations, the line their mean.</p>", *parts] if parts else []


def _number_or_text(text: str) -> tuple[bool, float, str]:
    try:
        return False, float(text), text
    except ValueError:
        return True, 0.0, text


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}…"
