"""A report that compares fine-tuning runs: metrics, settings that differ and curves, as a self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from bert_fast._html import html_page, svg, table
from bert_fast._io import atomic_file, write_text
from bert_fast.finetune.report import damaged, numbers, read_run
from bert_fast.finetune.unfinished import NEUTRAL
from bert_fast.pretrain.report import Run, changed_settings, curves

COMPARISON = "comparison.html"


class Finished(NamedTuple):
    """A finished run: its curves and settings, and its metrics."""

    run: Run
    metrics: Mapping[str, Any]


def write_comparison(folders: Sequence[Path], output: Path, pictures: Path | None = None) -> list[Path]:
    """Write the page `output` on the runs in `folders`, and a PNG of each curve into the folder `pictures`.

    Returns:
        The paths written.

    Raises:
        FileNotFoundError: a folder is not the result folder of a fine-tuning run.
        ValueError: one of its files is damaged; the message names it.
    """
    names = [folder.resolve().name for folder in folders]
    runs = []
    for folder, name in zip(folders, names, strict=True):
        metrics, settings, log = read_run(folder)
        runs.append(Finished(Run(name if names.count(name) == 1 else str(folder), settings, log), metrics))
    with damaged(folders[0].parent):
        figures = curves([run for run, _ in runs], _curves(runs))
        text = comparison_page(runs, figures)
    write_text(output, text)
    written = [output]
    if pictures is not None:
        for column, figure in figures.items():
            path = pictures / f"{column}.png"
            with atomic_file(path) as temporary:
                figure.savefig(temporary, format="png", dpi=150)
            written.append(path)
    return written


def _curves(runs: Sequence[Finished]) -> list[tuple[str, str, bool, bool]]:
    """The curves of the page: the losses, the main metrics and the learning rate."""
    metrics = dict.fromkeys(run.metrics["run"]["main_metric"] for run in runs)
    main = [(f"{name} on dev", name, True, False) for name in metrics if name != "loss"]
    return [("loss", "loss", True, False), *main, ("learning rate", "lr", False, False)]


def comparison_page(runs: Sequence[Finished], figures: Mapping[str, Any]) -> str:
    """The page on `runs`, with the figures of their curves."""
    names = [run.name for run, _ in runs]
    title = "Fine-tuning: " + ", ".join(names)
    parts = [f"<h1>{escape(title)}</h1>"]
    for split in ("dev", "test"):
        if any(split in metrics for _, metrics in runs):
            parts += [f"<h2>Metrics on {split}</h2>", table([["", *names], *_metric_rows(runs, split)])]
    parts += ["<h2>Runs</h2>", table([["", *names], *_run_rows(runs)]), "<h2>Settings that differ</h2>"]
    changed = [row for row in changed_settings([run for run, _ in runs]) if row[0] not in NEUTRAL]
    parts.append(table([["", *names], *changed]) if changed else "<p>none</p>")
    parts.append("<h2>Curves</h2><p>Lines are training values, dots values on dev.</p>")
    parts += [svg(figure) for figure in figures.values()]
    for run, _ in runs:
        settings = escape(json.dumps(run.settings, indent=1, ensure_ascii=False))
        parts.append(f"<details><summary>settings of {escape(run.name)}</summary><pre>{settings}</pre></details>")
    return html_page(title, parts)


def _metric_rows(runs: Sequence[Finished], split: str) -> list[list[Any]]:
    """A row for each metric that a run has on `split`; an empty cell where another run has none."""
    by_run = [numbers(metrics, [split]) if split in metrics else {} for _, metrics in runs]
    names = dict.fromkeys(name for values in by_run for name in values)
    return [[name, *(values[name][0] if name in values else "" for values in by_run)] for name in names]


def _run_rows(runs: Sequence[Finished]) -> list[list[Any]]:
    """Rows of how each run went: the task, rows, steps, speed."""
    rows: list[list[Any]] = [["task", *(metrics["run"]["task"] for _, metrics in runs)]]
    for split in ("train", "dev", "test"):
        counts = [metrics["run"].get("rows", {}).get(split) for _, metrics in runs]
        if any(count is not None for count in counts):
            rows.append([f"{split} rows", *("" if count is None else f"{count:,}" for count in counts)])
    for name in ("steps", "epochs", "best_step", "stopped_early", "seconds", "tokens_per_second"):
        rows.append([name, *(metrics["run"].get(name, "") for _, metrics in runs)])
    return rows
