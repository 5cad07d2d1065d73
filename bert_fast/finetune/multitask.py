"""Fine-tuning on several tasks at once: one encoder, and for each task a head, rows and metrics of its own.

Each micro-batch is of one task, and every task's gradient reaches the shared layers (Caruana, "Multitask learning",
1997; Liu et al., "Multi-task deep neural networks for natural language understanding", 2019). One task alone is the
same run as `bert_fast.finetune.api`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from bert_fast.finetune.api import FinetuneResult
from bert_fast.finetune.files import check_target, result_folder, write_json
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.multitask_config import MultitaskConfig
from bert_fast.finetune.report import METRICS, REPORT, html_page, table
from bert_fast.finetune.task_run import Part

SETTINGS = "multitask.json"


@dataclass(frozen=True)
class MultitaskResult:
    """How a run over several tasks ended.

    Args:
        metrics: {"run": steps, seconds ..., "mean": of the main metrics on dev, "tasks": {name: its metrics}}.
        folder: with a folder for each task.
        tasks: name -> its result, as `finetune` gives it; the models share their encoder.
    """

    metrics: dict[str, Any]
    folder: str
    tasks: dict[str, FinetuneResult]


def open_parts(config: MultitaskConfig, report: Callable[[str], None] = print) -> list[Part]:
    """The tasks of a run: rows read, models made.

    Raises:
        ValueError: the settings, the rows and the model don't fit each other; the message starts with the task's name.
    """
    torch.manual_seed(config.seed)
    parts = []
    for name, settings in config.runs().items():
        try:
            parts.append(Part(settings, None, _of(name, report), name=name, weight=config.tasks[name].weight))
        except ValueError as error:
            raise ValueError(f"tasks.{name}: {error}") from error
    return parts


def _of(name: str, report: Callable[[str], None]) -> Callable[[str], None]:
    """`report` of sentences that say which task they are about."""
    return lambda text: report(f"{name}: {text}")


def multitask(config: MultitaskConfig, report: Callable[[str], None] = print) -> MultitaskResult:
    """Fine-tune one encoder on several tasks and write each task's model to a folder of its name.

    `config.output_dir` appears complete or not at all: a folder a task, as `finetune` writes it (encoder, head,
    tokenizer, metrics.json, log.jsonl, report.html ...; transformers loads it); metrics.json; multitask.json, the
    settings; and report.html.

    Args:
        config: the run.
        report: takes the sentences that a user should read.

    Raises:
        ValueError: the settings, the rows and the model don't fit each other; the message says what and where.
        FileExistsError: output_dir is there and `config.overwrite` is False.
        TrainingDivergedError: a loss or the gradient is not finite.
    """
    target = Path(config.output_dir)
    check_target(target, overwrite=config.overwrite)
    parts = open_parts(config, report)
    loop = Finetuner(parts, config.power())
    with result_folder(target, overwrite=config.overwrite) as folder:
        folders = [folder / part.name for part in parts]
        run = loop.run(folders)
        metrics = {part.name: part.write(own, run) for part, own in zip(parts, folders, strict=True)}
        found = {"run": run, "mean": mean_metric(parts, metrics), "tasks": metrics}
        write_json(folder / METRICS, found)
        write_json(folder / SETTINGS, asdict(config))
        if all((own / REPORT).is_file() for own in folders):
            (folder / REPORT).write_text(page(target.name, found), encoding="utf-8")
    tasks = {
        part.name: FinetuneResult(metrics[part.name], str(target / part.name), part.model, part.task) for part in parts
    }
    return MultitaskResult(found, str(target), tasks)


def mean_metric(parts: Sequence[Part], metrics: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean of the parts' metrics on dev, by which the best model was chosen; None where one is not defined.

    Of a metric that is the better the lower, its negative counts.
    """
    scores = [part.score(metrics[part.name]["dev"]) for part in parts]
    return None if any(value is None for _, value, _ in scores) else sum(worth for _, _, worth in scores) / len(scores)


def page(title: str, metrics: Mapping[str, Any]) -> str:
    """The report of the run: a line for each task, with a link to its own report."""
    rows: list[Sequence[Any]] = [["task", "kind", "metric", "dev", "test"]]
    for name, own in metrics["tasks"].items():
        metric = own["run"]["main_metric"]
        rows.append([name, own["run"]["task"], metric, own["dev"][metric], own.get("test", {}).get(metric, "")])
    links = "".join(f'<li><a href="{name}/{REPORT}">{escape(name)}</a></li>' for name in metrics["tasks"])
    mean = "not defined" if metrics["mean"] is None else f"{metrics['mean']:.4f}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        table(rows),
        f"<p>Mean of the metrics on dev: {mean}</p>",
        f"<ul>{links}</ul>",
        "<h2>Training</h2>",
        table([[name, value] for name, value in metrics["run"].items()], header=False),
    ]
    return html_page(title, parts)
