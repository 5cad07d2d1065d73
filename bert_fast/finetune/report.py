"""The report of a fine-tuning run: one self-contained HTML page of curves, metrics, calibration and worst mistakes.

It is made from the files of the result folder alone, so it can be regenerated for any of them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast._html import html_page, panels_of, svg, table
from bert_fast._io import write_text
from bert_fast.runtime.log import read_log
from bert_fast.tasks.metrics import calibration

METRICS, PREDICTIONS, SETTINGS, REPORT = "metrics.json", "predictions.dev.jsonl", "finetune.json", "report.html"
MAX_MISTAKES = 25
_MAX_TICK_LABELS = 30  # a larger confusion matrix is drawn without names and numbers
BLUE, ORANGE = "#1b6ca8", "#d9822b"


def missing_package() -> str:
    """The name of the missing package that the figures need; "" if nothing is missing."""
    return "" if importlib.util.find_spec("matplotlib") else "matplotlib"


def write_report(folder: Path) -> Path:
    """Write `folder`/report.html from metrics.json, log.jsonl, finetune.json and predictions.dev.jsonl there.

    Raises:
        FileNotFoundError: one of these files is missing.
    """
    for name in (METRICS, SETTINGS, PREDICTIONS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; expected a folder written by bert-fast finetune")
    metrics = json.loads((folder / METRICS).read_text(encoding="utf-8"))
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (folder / PREDICTIONS).read_text(encoding="utf-8").splitlines()]
    text = page(metrics, settings, read_log(folder / "log.jsonl"), lines)
    path = folder / REPORT
    write_text(path, text)
    return path


def page(
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    log: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
) -> str:
    """The report as HTML, from the content of the four files."""
    run = metrics["run"]
    splits = [name for name in ("dev", "test") if name in metrics]
    title = f"{run['task']}: {Path(settings['output_dir']).name}"
    summary = {"model": settings["model"], "training rows": settings["data"]["train"]}
    summary |= {name: run[name] for name in ("steps", "epochs", "best_step", "stopped_early", "tokens_per_second")}
    parts = [
        f"<h1>{escape(title)}</h1>",
        table([["", *splits], *([name, *row] for name, row in _numbers(metrics, splits).items())]),
        "<h2>Training</h2>",
        table([[name, value] for name, value in summary.items()], header=False),
        curves(log, run["main_metric"], run["best_step"]),
    ]
    for split in splits:
        parts += _classes(metrics[split], split)
    parts += _calibration(predictions) + _mistakes(predictions)
    settings_json = escape(json.dumps(settings, indent=1, ensure_ascii=False))
    parts.append(f"<h2>Settings</h2><details><summary>{SETTINGS}</summary><pre>{settings_json}</pre></details>")
    return html_page(title, parts)


def multitask_page(title: str, metrics: Mapping[str, Any]) -> str:
    """The report of a run on several tasks, from its metrics: one line per task, with links to their own reports."""
    rows: list[Sequence[Any]] = [["task", "kind", "metric", "dev", "test"]]
    for name, task in metrics["tasks"].items():
        metric = task["run"]["main_metric"]
        rows.append([name, task["run"]["task"], metric, task["dev"][metric], task.get("test", {}).get(metric, "")])
    links = "".join(f'<li><a href="{name}/{REPORT}">{escape(name)}</a></li>' for name in metrics["tasks"])
    mean = "undefined" if metrics["mean"] is None else f"{metrics['mean']:.4f}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        table(rows),
        f"<p>Mean of the metrics on dev: {mean}</p>",
        f"<ul>{links}</ul>",
        "<h2>Training</h2>",
        table([[name, value] for name, value in metrics["run"].items()], header=False),
    ]
    return html_page(title, parts)


def _numbers(metrics: Mapping[str, Any], splits: Sequence[str]) -> dict[str, list[Any]]:
    """The scalar metrics, with their values (None if undefined) on every split."""
    first = metrics[splits[0]]
    names = [name for name, value in first.items() if value is None or isinstance(value, (int, float))]
    return {name: [metrics[split].get(name) for split in splits] for name in names}


def curves(log: Sequence[Mapping[str, Any]], metric: str, best: int) -> str:
    """Training and dev loss, the metric on dev, and the learning rate over steps; `best` is the selected step."""
    train = [line for line in log if line["kind"] == "train"]
    dev = [line for line in log if line["kind"] == "eval"]
    figure, (losses, scores, rates) = panels_of(11, 3, 3)
    losses.plot([line["step"] for line in train], [line["loss"] for line in train], color=BLUE, lw=1, label="train")
    with_loss = [line for line in dev if line.get("loss") is not None]
    losses.plot([x["step"] for x in with_loss], [x["loss"] for x in with_loss], "o-", color=ORANGE, ms=3, label="dev")
    losses.set(title="loss", xlabel="step")
    losses.legend(frameon=False)
    defined = [line for line in dev if line.get(metric) is not None]
    scores.plot([line["step"] for line in defined], [line[metric] for line in defined], "o-", color=ORANGE, ms=3)
    scores.axvline(best, color="#999", lw=1, ls=":")
    scores.set(title=f"{metric} on dev; dotted: best step", xlabel="step")
    rates.plot([line["step"] for line in train], [line["lr"] for line in train], color=BLUE, lw=1)
    rates.set(title="learning rate", xlabel="step")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    return svg(figure)


def _classes(metrics: Mapping[str, Any], split: str) -> list[str]:
    parts = []
    if metrics.get("per_class"):
        names = ("precision", "recall", "f1", "support")
        rows = [[label, *(row[name] for name in names)] for label, row in metrics["per_class"].items()]
        parts += [f"<h2>Classes on {split}</h2>", table([["class", *names], *rows])]
    if metrics.get("confusion_matrix"):
        labels, matrix = metrics["labels"], metrics["confusion_matrix"]
        rows = [["true \\ predicted", *labels], *([label, *row] for label, row in zip(labels, matrix, strict=True))]
        parts += [f"<h2>Confusion matrix on {split}</h2>", table(rows, diagonal=True), confusion(matrix, labels)]
    return parts


def confusion(matrix: Sequence[Sequence[int]], labels: Sequence[str]) -> str:
    """A confusion matrix as a figure, coloured by the share of the true class and annotated with counts."""
    counts = np.array(matrix)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = min(2.2 + 0.45 * len(labels), 10.0)
    figure, (axes,) = panels_of(size + 1, size)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    if len(labels) <= _MAX_TICK_LABELS:
        short = [label if len(label) <= 20 else label[:19] + "…" for label in labels]
        axes.set_xticks(range(len(labels)), short, rotation=45, ha="right", parse_math=False)
        axes.set_yticks(range(len(labels)), short, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            if count:
                colour = "white" if shares[row, column] > 0.6 else "#222"
                axes.text(column, row, str(count), ha="center", va="center", fontsize=8, color=colour)
    return svg(figure)


def _calibration(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The reliability diagram on dev, if each prediction has one probability and is correct or not."""
    confidences = [line["prediction"].get("probability") for line in predictions]
    if not confidences or any(not isinstance(p, float) for p in confidences) or predictions[0].get("error") is None:
        return []
    bins = calibration(np.array(confidences), np.array([line["error"] == 0 for line in predictions]), 10)
    figure, (axes,) = panels_of(4.5, 3.6)
    axes.plot([0, 1], [0, 1], color="#999", lw=1, ls=":")
    confidence, accuracy = ([one[name] for one in bins] for name in ("confidence", "accuracy"))
    sizes = [20 + 200 * one["rows"] / len(predictions) for one in bins]
    axes.scatter(confidence, accuracy, s=sizes, color=BLUE, alpha=0.8, clip_on=False)
    axes.set(xlabel="predicted probability", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    rows = [[one["confidence"], one["accuracy"], one["rows"]] for one in bins]
    legend = "<p>The dotted line is perfect calibration; dots grow with the number of rows.</p>"
    return ["<h2>Calibration on dev</h2>", legend, svg(figure), table([["probability", "accuracy", "rows"], *rows])]


def _mistakes(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The predictions with the largest errors, worst first."""
    wrong = [line for line in predictions if line.get("error")]
    if not predictions or predictions[0].get("error") is None:
        return []
    title = f"<h2>Worst mistakes on dev</h2><p>{len(wrong):,} of {len(predictions):,} predictions are wrong.</p>"
    worst = sorted(wrong, key=lambda line: -line["error"])[:MAX_MISTAKES]
    if not worst:
        return [title]
    inputs = list(worst[0]["input"])
    outputs = [name for name, value in worst[0]["prediction"].items() if _is_short(value)]
    rows = [
        [line["row"], line["error"], *map(line["prediction"].get, outputs), *map(line["input"].get, inputs)]
        for line in worst
    ]
    header = ["row", "error", *(f"predicted {name}" for name in outputs), *inputs]
    return [title, table([header, *rows])]


def _is_short(value: Any) -> bool:
    """Whether a value of a prediction is listed: a string, a float or a list of strings, not scores or candidates."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, (str, float)) and not isinstance(value, bool)
