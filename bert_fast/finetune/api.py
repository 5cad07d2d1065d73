"""Fine-tuning: from rows and a pretrained model to a folder that transformers loads.

On the CPU the same settings give the same losses, bit for bit: the order of the rows is a function of (seed, epoch),
and head and dropout follow torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bert_fast.finetune.config import FinetuneConfig
from bert_fast.finetune.files import check_target, result_folder
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.task_run import Part
from bert_fast.tasks.task import Task


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended.

    Args:
        metrics: {"dev": metrics of the model in `folder`, "test": the same or absent, "run": steps, seconds ...}.
        folder: the model in transformers' format, tokenizer, metrics, predictions and log.
        model: in eval mode.
        task: fitted.
    """

    metrics: dict[str, Any]
    folder: str
    model: nn.Module
    task: Task


def finetune(
    config: FinetuneConfig, model: nn.Module | None = None, report: Callable[[str], None] = print
) -> FinetuneResult:
    """Fine-tune a model on a task and write it to `config.output_dir`, which appears complete or not at all.

    The folder holds the model and the tokenizer as transformers (of sentence-embedding sentence-transformers too) loads
    them, with the labels and the task in config.json; metrics.json; predictions.dev.jsonl, each line with an `error` of
    0 where the prediction is right; log.jsonl; finetune.json, the settings; and report.html.

    Args:
        config: the run.
        model: in place of one loaded from `config.model` (which names the tokenizer's folder): a transformers model of
            the task's class, fused by `bert_fast.fuse` or as it is, or one of ours. It is trained in place.
        report: takes the sentences that a user should read.

    Raises:
        ValueError: the settings, the rows and the model don't fit each other; the message says what and where.
        FileExistsError: output_dir is there and `config.overwrite` is False.
        TrainingDivergedError: the loss or the gradient is not finite.
    """
    target = Path(config.output_dir)
    check_target(target, overwrite=config.overwrite)
    torch.manual_seed(config.seed)
    part = Part(config, model, report)
    loop = Finetuner([part])
    with result_folder(target, overwrite=config.overwrite) as folder:
        metrics = part.write(folder, loop.run([folder]))
    return FinetuneResult(metrics, str(target), part.model, part.task)
