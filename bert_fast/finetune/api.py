"""Fine-tuning on one task or on several: from rows and a pretrained model to folders that transformers loads.

On the CPU, equal settings give bitwise equal losses: the order of the rows is a function of (seed, epoch), and the head
and dropout use torch's generator.

With several tasks, each micro-batch belongs to one task, and the gradient of every task reaches the shared layers
(Caruana, "Multitask learning", 1997; Liu et al., "Multi-task deep neural networks for natural language understanding",
2019). A multi-task run with one task is bitwise equal to `finetune` on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bert_fast._io import check_absent, recover, write_json, write_text
from bert_fast._lock import exclusive
from bert_fast.finetune.config import FinetuneConfig, MultitaskConfig
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.report import METRICS, REPORT, SETTINGS, multitask_page
from bert_fast.finetune.task_run import TaskRun
from bert_fast.finetune.unfinished import UnfinishedRun
from bert_fast.tasks.task import Task

MULTITASK_SETTINGS = "multitask.json"


@dataclass(frozen=True)
class FinetuneResult:
    """The result of a fine-tuning run.

    Attributes:
        metrics: {"run": steps, seconds ..., "dev": metrics of the model in `folder`, "test": likewise, if there is a
            test split}.
        folder: holds the model in transformers' format, the tokenizer, metrics, predictions and the log.
        model: the model, in eval mode.
        task: the fitted task.
    """

    metrics: dict[str, Any]
    folder: str
    model: nn.Module
    task: Task


@dataclass(frozen=True)
class MultitaskResult:
    """The result of a fine-tuning run on several tasks.

    Attributes:
        metrics: {"run": steps, seconds ..., "mean": mean of the main metrics on dev, "tasks": {name: metrics}}.
        folder: holds one folder per task.
        tasks: name -> result, as `finetune` returns it; the models share their encoder.
    """

    metrics: dict[str, Any]
    folder: str
    tasks: dict[str, FinetuneResult]


def finetune(
    config: FinetuneConfig, model: nn.Module | None = None, report: Callable[[str], None] = print
) -> FinetuneResult:
    """Fine-tune a model on a task and write it to `config.output_dir`, which is complete or absent at every moment.

    The folder holds the model and tokenizer in transformers' format (for sentence-embedding also in that of
    sentence-transformers) with the labels and the task in config.json; metrics.json; predictions.dev.jsonl, whose
    `error` is 0 for a correct prediction; log.jsonl; finetune.json, the settings; and report.html.

    Args:
        config: the settings of the run.
        model: trained in place instead of a model loaded from `config.model`, which then only provides the tokenizer:
            a model of the task's class from transformers, fused by `bert_fast.fuse` or not, or from bert_fast.
        report: called with each message for the user.

    Returns:
        The metrics, the folder, the model and the fitted task.

    Raises:
        ValueError: settings, rows and model are inconsistent; the message names the setting, or the file and line.
        FileNotFoundError: `config.model` is neither a folder nor a hub name that can be reached.
        FileExistsError: output_dir exists and `config.overwrite` is False.
        TrainingDivergedError: the loss or the gradient is not finite.
    """
    with _reserved_output(config):
        torch.manual_seed(config.seed)
        task_run = TaskRun(config, model, report)
        metrics = UnfinishedRun(Finetuner([task_run]), config, report).finish(task_run.write)
    return FinetuneResult(metrics, str(Path(config.output_dir)), task_run.model, task_run.task)


def multitask(config: MultitaskConfig, report: Callable[[str], None] = print) -> MultitaskResult:
    """Fine-tune one encoder on several tasks and write each task's model to a folder of that name.

    `config.output_dir` is complete or absent at every moment. It holds one folder per task, as `finetune` writes it
    (encoder, head, tokenizer, metrics.json, log.jsonl, report.html ...); metrics.json; multitask.json, the settings;
    and report.html.

    Args:
        config: the settings of the run.
        report: called with each message for the user.

    Returns:
        The metrics, the folder and the result of each task.

    Raises:
        ValueError: settings, rows and model are inconsistent; the message names the task and the setting, or the file
            and line.
        FileNotFoundError: `config.model` is neither a folder nor a hub name that can be reached.
        FileExistsError: output_dir exists and `config.overwrite` is False.
        TrainingDivergedError: a loss or the gradient is not finite.
    """
    target = Path(config.output_dir)

    def write(folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
        by_task = {task_run.name: task_run.write(folder / task_run.name, run) for task_run in task_runs}
        metrics = {"run": run, "mean": mean_metric(task_runs, by_task), "tasks": by_task}
        write_json(folder / METRICS, metrics)
        write_json(folder / MULTITASK_SETTINGS, asdict(config))
        if all((folder / task_run.name / REPORT).is_file() for task_run in task_runs):
            write_text(folder / REPORT, multitask_page(target.name, metrics))
        return metrics

    with _reserved_output(config):
        task_runs = open_task_runs(config, report)
        loop = Finetuner(task_runs, config.sampling_temperature())
        metrics = UnfinishedRun(loop, config, report).finish(write)
    results = {
        task_run.name: FinetuneResult(
            metrics["tasks"][task_run.name], str(target / task_run.name), task_run.model, task_run.task
        )
        for task_run in task_runs
    }
    return MultitaskResult(metrics, str(target), results)


@contextmanager
def _reserved_output(config: FinetuneConfig | MultitaskConfig) -> Iterator[None]:
    """Lock the output folder, clean up after a killed writer of it, and check that it may be written."""
    target = Path(os.path.realpath(config.output_dir))
    with exclusive(target, what="fine-tuning run"):
        recover(target.parent, exclusive=False)
        check_absent(target, overwrite=config.overwrite)
        is_result = any((target / name).is_file() for name in (SETTINGS, MULTITASK_SETTINGS))
        if target.exists() and not is_result and (not target.is_dir() or any(target.iterdir())):
            raise FileExistsError(
                f"{target} exists and holds no result of finetune or multitask, so --overwrite does not replace it; "
                "choose another folder"
            )
        yield


def open_task_runs(config: MultitaskConfig, report: Callable[[str], None] = print) -> list[TaskRun]:
    """The tasks of a run, with rows read and models built.

    Raises:
        ValueError: settings, rows and model are inconsistent; the message starts with the task's name.
    """
    torch.manual_seed(config.seed)
    task_runs = []
    for name, task_config in config.task_configs().items():
        try:
            task_runs.append(
                TaskRun(task_config, None, _prefixed(name, report), name=name, weight=config.tasks[name].weight)
            )
        except ValueError as error:
            raise ValueError(f"tasks.{name}: {error}") from error
    return task_runs


def _prefixed(name: str, report: Callable[[str], None]) -> Callable[[str], None]:
    """`report` with the task's name before each message."""
    return lambda text: report(f"{name}: {text}")


def mean_metric(task_runs: Sequence[TaskRun], metrics: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The mean of the tasks' main metrics on dev, which selects the best model; None if one of them is undefined.

    A metric for which lower is better enters with its sign reversed.
    """
    main = [task_run.main_metric(metrics[task_run.name]["dev"]) for task_run in task_runs]
    return None if any(metric.value is None for metric in main) else sum(metric.score for metric in main) / len(main)
