"""Pretraining runs as one HTML page that needs no network, and as pictures: their curves beside each other.

Everything comes from the logs and settings in the runs' folders, also of a run that is still going.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bert_fast.finetune.report import html_page, panels_of, svg, table
from bert_fast.pretrain.config import differences
from bert_fast.runtime.log import read_log

SETTINGS, LOG = "pretrain.json", "log.jsonl"
# Told apart in print and by the colour-blind (Okabe and Ito).
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d31", "#444444")
# title, column of the log, whether held-out values are drawn too, logarithmic axis
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
    """A run's name, settings and log."""

    name: str
    settings: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]

    def points(self, kind: str, column: str) -> tuple[list[int], list[float]]:
        """Steps and values of a column in the lines of `kind`, where it has one."""
        lines = [line for line in self.log if line["kind"] == kind and line.get(column) is not None]
        return [line["step"] for line in lines], [line[column] for line in lines]


def is_pretraining(folder: Path) -> bool:
    """Whether `folder` is that of a pretraining run."""
    return (folder / SETTINGS).is_file()


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs in `folders`, named by their last parts, by their whole paths where these are the same.

    Raises:
        FileNotFoundError: a folder is not that of a pretraining run.
    """
    short = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, short, strict=True):
        for file in (SETTINGS, LOG):
            if not (folder / file).is_file():
                raise FileNotFoundError(
                    f"{folder / file} is not there; expected a folder that bert-fast pretrain wrote"
                )
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        runs.append(Run(name if short.count(name) == 1 else str(folder), settings, read_log(folder / LOG)))
    return runs


def write_pretrain_report(folders: Sequence[Path], output: Path, pictures: Path | None = None) -> list[Path]:
    """Write the page `output` of the runs in `folders`, and a PNG of each curve into the folder `pictures`.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: a folder is not that of a pretraining run.
        ValueError: there is nothing in the logs yet.
    """
    runs = read_runs(folders)
    empty = [run.name for run in runs if not run.log]
    if empty:
        raise ValueError(f"the log of {', '.join(empty)} has no line yet; expected at least one step")
    figures = curves(runs)
    written = [output]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs, figures), encoding="utf-8")
    if pictures is not None:
        pictures.mkdir(parents=True, exist_ok=True)
        for column, figure in figures.items():
            figure.savefig(pictures / f"{column}.png", dpi=150)
            written.append(pictures / f"{column}.png")
    return written


def page(runs: Sequence[Run], figures: Mapping[str, Any]) -> str:
    """The page of `runs` with the figures that `curves` made of them."""
    title = "Pretraining: " + ", ".join(run.name for run in runs)
    parts = [f"<h1>{escape(title)}</h1>", table([["", *(run.name for run in runs)], *_summary(runs)])]
    parts += [svg(figure) for figure in figures.values()]
    if len(runs) > 1:
        changed = _changed(runs)
        parts += ["<h2>Settings that differ</h2>", table([["", *(run.name for run in runs)], *changed])]
    for run in runs:
        shown = escape(json.dumps(run.settings, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>settings of {escape(run.name)}</summary><pre>{shown}</pre></details>")
    return html_page(title, parts)


def _summary(runs: Sequence[Run]) -> list[list[Any]]:
    """Rows of what each run came to."""
    rows: list[list[Any]] = []

    def add(name: str, kind: str, column: str, choose: Any) -> None:
        values = [run.points(kind, column)[1] for run in runs]
        if any(values):
            rows.append([name, *(choose(found) if found else None for found in values)])

    rows.append(["steps", *(f"{run.log[-1]['step']:,}" for run in runs)])
    add("real tokens", "train", "tokens", lambda found: f"{found[-1]:,}")
    add("training loss, last", "train", "loss", lambda found: found[-1])
    add("held-out loss, last", "eval", "loss", lambda found: found[-1])
    add("held-out loss, best", "eval", "loss", min)
    add("held-out masked-token accuracy, best", "eval", "mlm_accuracy", max)
    add("held-out next-sentence accuracy, best", "eval", "nsp_accuracy", max)
    add("real tokens per second, median", "train", "tokens_per_second", _median)
    add("model TFLOP/s, median", "train", "tflops", _median)
    add("MFU, median", "train", "mfu", _median)
    add("fill, median", "train", "fill", _median)
    add("skipped updates", "train", "skipped", lambda found: f"{found[-1]:,}")
    return rows


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _changed(runs: Sequence[Run]) -> list[list[Any]]:
    """Rows of the settings in which the runs are not all the same."""
    found: dict[str, list[Any]] = {}
    for run in runs[1:]:
        for name in differences(runs[0].settings, run.settings):
            found[name] = [_setting(each.settings, name) for each in runs]
    return [[name, *(json.dumps(value) for value in values)] for name, values in sorted(found.items())]


def _setting(settings: Any, name: str) -> Any:
    for part in name.split("."):
        settings = settings.get(part) if isinstance(settings, Mapping) else None
    return settings


def curves(runs: Sequence[Run]) -> dict[str, Any]:
    """A figure for each column that any run has: dots are held-out values, lines training ones."""
    figures: dict[str, Any] = {}
    for title, column, held_out, logarithmic in _CURVES:
        if not any(run.points("train", column)[0] for run in runs):
            continue
        figure, (axes,) = panels_of(9, 3.2)
        for number, run in enumerate(runs):
            colour = _COLOURS[number % len(_COLOURS)]
            axes.plot(*run.points("train", column), color=colour, lw=1, label=run.name)
            if held_out:
                axes.plot(*run.points("eval", column), "o-", color=colour, ms=4, lw=0.5, label="held out")
        axes.set(title=title, xlabel="step")
        if logarithmic:
            axes.set_yscale("log")
        if len(runs) > 1 or held_out:
            axes.legend(frameon=False)
        figures[column] = figure
    return figures
