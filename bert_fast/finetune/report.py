"""The report of a fine-tuning run: one self-contained HTML page of curves, metrics, calibration and worst mistakes.

It is made from the files of the result folder alone, so it can be regenerated for any of them.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast._html import html_page, label, panels_of, svg, table
from bert_fast._io import check_fields, read_json, write_text
from bert_fast._text import read_lines
from bert_fast.finetune.mistakes import mistakes, read_rows, scatter
from bert_fast.runtime.log import LOG, read_log
from bert_fast.tasks.metrics import calibration

METRICS, PREDICTIONS, SETTINGS, REPORT = "metrics.json", "predictions.dev.jsonl", "finetune.json", "report.html"
_MAX_TICK_LABELS = 30  # a larger confusion matrix is drawn without names and numbers
BLUE, ORANGE = "#1b6ca8", "#d9822b"


def missing_package() -> str:
    """The name of the missing package that the figures need; "" if nothing is missing."""
    return "" if importlib.util.find_spec("matplotlib") else "matplotlib"


def is_finetuning(folder: Path) -> bool:
    """Whether `folder` is the result folder of a fine-tuning run."""
    return all((folder / name).is_file() for name in (METRICS, SETTINGS))


def read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]:
    """The metrics, the settings and the log of a result folder.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged; the message names it.
    """
    for name in (METRICS, SETTINGS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; expected a folder written by bert-fast finetune")
    metrics = read_json(folder / METRICS, {"run": dict, "dev": dict})
    check_fields(metrics["run"], {"task": str, "main_metric": str, "best_step": int}, f"{folder / METRICS}, run")
    settings = read_json(folder / SETTINGS, {"model": str, "output_dir": str, "data": dict})
    return metrics, settings, read_log(folder / LOG)


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write a page from metrics.json, log.jsonl, finetune.json and predictions.dev.jsonl of `folder`.

    Args:
        folder: of a fine-tuning run.
        output: the page; report.html in `folder` if None.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: one of these files is missing.
        ValueError: one of them is damaged; the message names it.
    """
    metrics, settings, log = read_run(folder)
    path = folder / PREDICTIONS
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; expected a folder written by bert-fast finetune")
    predictions = []
    for number, line in read_lines(path):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        fields: dict[str, Any] = {"row": int, "input": dict, "prediction": dict, "error": (int, float, type(None))}
        predictions.append(check_fields(values, fields, f"{path}, line {number}"))
    output = folder / REPORT if output is None else output
    with damaged(folder):
        text = page(metrics, settings, log, predictions)
    write_text(output, text)
    return output


@contextmanager
def damaged(folder: Path) -> Iterator[None]:
    """In the block, what is missing in the files of a run, or of another type, is a ValueError that names `folder`."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        message = f"the files of the run in {folder} are damaged or don't fit together"
        raise ValueError(f"{message} ({type(error).__name__}: {error})") from error


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
    summary = {"model": Path(settings["model"]).name or settings["model"]}
    summary |= {f"{split} rows": f"{count:,}" for split, count in run.get("rows", {}).items() if count is not None}
    if scheme := metrics["dev"].get("scheme"):
        summary["tag scheme"] = scheme
    names = ("steps", "epochs", "best_step", "stopped_early", "tokens_per_second")
    summary |= {name: run[name] for name in names if run.get(name) is not None}
    parts = [
        f"<h1>{escape(title)}</h1>",
        table([["", *splits], *([name, *row] for name, row in numbers(metrics, splits).items())]),
        "<h2>Training</h2>",
        table([[name, value] for name, value in summary.items()], header=False),
        curves(log, run["main_metric"], run["best_step"]),
    ]
    for split in splits:
        parts += _classes(metrics[split], split)
    rows = read_rows(run["task"], settings, predictions)
    parts += _calibration(predictions) + scatter(rows, predictions) + mistakes(rows, predictions)
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


def numbers(metrics: Mapping[str, Any], splits: Sequence[str]) -> dict[str, list[Any]]:
    """The scalar metrics, with their values (None if undefined) on every split."""
    by_split = [metrics[split] for split in splits]
    names = [name for of in by_split for name, value in of.items() if value is None or isinstance(value, (int, float))]
    return {name: [metrics[split].get(name) for split in splits] for name in names}


def curves(log: Sequence[Mapping[str, Any]], metric: str, best: int) -> str:
    """Training and dev loss, the metric on dev, and the learning rate over steps; `best` is the selected step.

    A panel without a value is left out, and so is the figure if none has one.
    """

    def points(kind: str, name: str) -> tuple[list[int], list[float]]:
        lines = [line for line in log if line["kind"] == kind and line.get(name) is not None]
        return [line["step"] for line in lines], [line[name] for line in lines]

    # title, and the curves of a panel: kind, column, format of the line, colour
    panels = [
        ("loss", [("train", "loss", "-", BLUE), ("eval", "loss", "o-", ORANGE)]),
        (f"{metric} on dev; dotted: best step", [("eval", metric, "o-", ORANGE)]),
        ("learning rate", [("train", "lr", "-", BLUE)]),
    ]
    panels = [(title, drawn) for title, drawn in panels if any(points(kind, name)[0] for kind, name, *_ in drawn)]
    if not panels:
        return "<p>The log has no step.</p>"
    figure, axes = panels_of(11 / 3 * len(panels), 3, len(panels))
    for panel, (title, drawn) in zip(axes, panels, strict=True):
        for kind, name, line, colour in drawn:
            steps, values = points(kind, name)
            if steps:
                # One value has no line: it needs a dot to be seen.
                shape = "o" if len(steps) == 1 else line
                panel.plot(steps, values, shape, color=colour, ms=3, lw=1, label="dev" if kind == "eval" else kind)
        panel.set(title=label(title), xlabel="step")
        panel.xaxis.get_major_locator().set_params(integer=True)
        if title == "loss":
            panel.legend(frameon=False)
        elif title == "learning rate":
            panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        else:
            panel.axvline(best, color="#999", lw=1, ls=":")
    return svg(figure)


def _classes(metrics: Mapping[str, Any], split: str) -> list[str]:
    parts = []
    if metrics.get("per_class"):
        names = ("precision", "recall", "f1", "support")
        rows = [[kind, *(row[name] for name in names)] for kind, row in metrics["per_class"].items()]
        parts += [f"<h2>Classes on {split}</h2>", table([["class", *names], *rows])]
    if metrics.get("confusion_matrix"):
        labels, matrix = metrics["labels"], metrics["confusion_matrix"]
        rows = [["true \\ predicted", *labels], *([name, *row] for name, row in zip(labels, matrix, strict=True))]
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
        short = [label(name if len(name) <= 20 else name[:19] + "…") for name in labels]
        axes.set_xticks(range(len(labels)), short, rotation=45, ha="right")
        axes.set_yticks(range(len(labels)), short)
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
