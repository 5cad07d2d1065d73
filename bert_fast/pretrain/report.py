"""A report that compares pretraining runs: a self-contained HTML page, and the curves as PNG files.

It is made from the logs and settings in the runs' folders, also of a run that has not finished.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bert_fast import _io
from bert_fast._config import differences
from bert_fast._html import html_page, label, panels_of, svg, table
from bert_fast.pretrain.config import SETTINGS
from bert_fast.runtime.log import LOG, read_log

# Distinguishable in print and to the colour-blind (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31", "#444444")
# title, column of the log, whether to draw held-out values too, whether the axis is logarithmic
_CURVES = (
    ("loss", "loss", True, False),
    ("masked-token accuracy", "mlm_accuracy", True, False),
    ("next-sentence accuracy", "nsp_accuracy", True, False),
    ("learning rate", "lr", False, False),
    ("gradient norm, before clipping", "grad_norm", False, True),
    ("real tokens per second", "tokens_per_second", False, False),
    ("share of the ceiling (MFU)", "mfu", False, False),
)


@dataclass(frozen=True)
class Run:
    """A run's name, settings and log, and messages on what of the log could not be read."""

    name: str
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    problems: Sequence[str] = ()

    def points(self, kind: str, column: str) -> tuple[list[int], list[float]]:
        """Steps and values of `column` in the lines of `kind` that have a number there."""
        lines = [line for line in self.log if line["kind"] == kind and _is_number(line.get(column))]
        return [line["step"] for line in lines], [line[column] for line in lines]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def is_pretraining(folder: Path) -> bool:
    """Whether `folder` is the folder of a pretraining run."""
    return (folder / SETTINGS).is_file()


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, named by the folder's name, or by its path if several have the same name.

    Raises:
        FileNotFoundError: a folder is not the folder of a pretraining run.
        ValueError: the settings of a run are no JSON object.
    """
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        for file in (SETTINGS, LOG):
            if not (folder / file).is_file():
                raise FileNotFoundError(
                    f"{folder / file} does not exist; expected a folder that bert-fast pretrain wrote"
                )
        problems: list[str] = []
        settings, log = _io.read_json(folder / SETTINGS), read_log(folder / LOG, problems.append)
        runs.append(Run(name if names.count(name) == 1 else str(folder), settings, log, problems))
    return runs


def write_pretrain_report(folders: Sequence[Path], output: Path, pictures: Path | None = None) -> list[Path]:
    """Write the page `output` on the runs in `folders`, and a PNG of each curve into the folder `pictures`.

    Returns:
        The paths written.

    Raises:
        FileNotFoundError: a folder is not the folder of a pretraining run.
        ValueError: a log is empty, or the settings of a run are no JSON object.
    """
    runs = read_runs(folders)
    empty = [run.name for run in runs if not run.log]
    if empty:
        raise ValueError(f"the log of {', '.join(empty)} is empty; expected at least one logged step")
    figures = curves(runs)
    written = [output]
    _io.write_text(output, page(runs, figures))
    if pictures is not None:
        for column, figure in figures.items():
            with _io.atomic_file(pictures / f"{column}.png") as path:
                figure.savefig(path, format="png", dpi=150)
            written.append(pictures / f"{column}.png")
    return written


def page(runs: Sequence[Run], figures: Mapping[str, Any]) -> str:
    """The page on `runs`, with the figures of `curves(runs)`."""
    title = "Pretraining: " + ", ".join(run.name for run in runs)
    parts = [f"<h1>{escape(title)}</h1>", *(f"<p>{escape(text)}</p>" for run in runs for text in run.problems)]
    parts.append(table([["", *(run.name for run in runs)], *_summary(runs)]))
    parts += [svg(figure) for figure in figures.values()]
    if len(runs) > 1:
        changed = changed_settings(runs)
        parts += ["<h2>Settings that differ</h2>", table([["", *(run.name for run in runs)], *changed])]
    for run in runs:
        settings = escape(json.dumps(run.settings, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>settings of {escape(run.name)}</summary><pre>{settings}</pre></details>")
    return html_page(title, parts)


def _summary(runs: Sequence[Run]) -> list[list[Any]]:
    """Rows of each run's results."""
    rows: list[list[Any]] = []

    def add(name: str, kind: str, column: str, choose: Any) -> None:
        by_run = [run.points(kind, column)[1] for run in runs]
        if any(by_run):
            rows.append([name, *(choose(values) if values else None for values in by_run)])

    rows.append(["steps", *(f"{run.log[-1]['step']:,}" for run in runs)])
    add("real tokens", "train", "tokens", lambda values: f"{values[-1]:,}")
    add("training loss, last", "train", "loss", lambda values: values[-1])
    add("held-out loss, last", "eval", "loss", lambda values: values[-1])
    add("held-out loss, best", "eval", "loss", min)
    add("held-out masked-token accuracy, best", "eval", "mlm_accuracy", max)
    add("held-out next-sentence accuracy, best", "eval", "nsp_accuracy", max)
    add("real tokens per second, median", "train", "tokens_per_second", _median)
    add("model TFLOP/s, median", "train", "tflops", _median)
    add("MFU, median", "train", "mfu", _median)
    add("fill, median", "train", "fill", _median)
    add("skipped updates", "train", "skipped", lambda values: f"{values[-1]:,}")
    return rows


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def changed_settings(runs: Sequence[Run]) -> list[list[Any]]:
    """Rows of the settings that differ between the runs."""
    changed: dict[str, list[Any]] = {}
    for run in runs[1:]:
        for name in differences(runs[0].settings, run.settings):
            changed[name] = [_setting(each.settings, name) for each in runs]
    return [[name, *(json.dumps(value) for value in values)] for name, values in sorted(changed.items())]


def _setting(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def curves(runs: Sequence[Run], of: Sequence[tuple[str, str, bool, bool]] = _CURVES) -> dict[str, Any]:
    """A figure for each column that a run has: lines are training values, dots held-out values.

    Args:
        runs: to draw in one figure a column.
        of: title, column of the log, whether to draw held-out values too, whether the axis is logarithmic.
    """
    figures: dict[str, Any] = {}
    for title, column, held_out, logarithmic in of:
        if not any(run.points(kind, column)[0] for run in runs for kind in ("train", *(("eval",) if held_out else ()))):
            continue
        figure, (axes,) = panels_of(9, 3.2)
        for number, run in enumerate(runs):
            colour = _COLOURS[number % len(_COLOURS)]
            steps, values = run.points("train", column)
            if steps:
                # One value has no line: it needs a mark to be seen.
                axes.plot(steps, values, "x" if len(steps) == 1 else "-", color=colour, lw=1, label=label(run.name))
            if held_out and run.points("eval", column)[0]:
                name = label(f"{run.name}, held out" if len(runs) > 1 else "held out")
                axes.plot(*run.points("eval", column), "o-", color=colour, ms=4, lw=0.5, label=name)
        axes.set(title=title, xlabel="step")
        if logarithmic:
            axes.set_yscale("log")
        if len(runs) > 1 or held_out:
            axes.legend(frameon=False)
        figures[column] = figure
    return figures
