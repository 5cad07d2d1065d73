"""A fitted task and its model on new rows: batches by length, no gradient, predictions in the rows' order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from bert_fast._device import autocast
from bert_fast.models.config import longest_input
from bert_fast.models.embedding import batches_by_length
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import CONFIG_KEY, Batch, Example, LossOptions, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Outputs:
    """What a model gives for examples.

    Attributes:
        arrays: one array an example, in their order; see `Task.split`.
        loss: the mean over all examples; None where one has no target.
    """

    arrays: list[np.ndarray[Any, Any]]
    loss: float | None


def groups_of(task: Task, examples: Sequence[Example]) -> list[list[int]]:
    """Indices of the examples that have to be in one batch: each alone, or all of a row."""
    if not task.rows_together:
        return [[index] for index in range(len(examples))]
    found: list[list[int]] = []
    for index, example in enumerate(examples):
        if index and examples[index - 1].row == example.row:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def text_settings(model: nn.Module) -> TextSettings:
    """How texts became tokens when `model` was fine-tuned."""
    config: Any = model.config
    found = getattr(config, "extra", {}).get(CONFIG_KEY) or getattr(config, CONFIG_KEY, {})
    return TextSettings(**found.get("text", {"max_length": longest_input(config)}))


@torch.inference_mode()
def run_examples(
    model: nn.Module,
    task: Task,
    examples: Sequence[Example],
    *,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    progress: Callable[[int], None] | None = None,
) -> Outputs:
    """The outputs of `model`, put in eval mode for it, and the mean loss where there are targets.

    Args:
        batch_tokens: examples of like length are packed up to this.
        precision: fp32, or bf16 for autocast.
        progress: called with the number of examples after each batch.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    groups = groups_of(task, examples)
    lengths = [sum(len(examples[index].input_ids) for index in group) for group in groups]
    arrays: list[Any] = [None] * len(examples)
    total, weight, options = 0.0, 0.0, LossOptions()
    judged = bool(examples) and all(example.target is not None for example in examples)
    for numbers in batches_by_length(lengths, batch_tokens):
        indices = [index for number in numbers for index in groups[number]]
        batch = Batch.of([examples[index] for index in indices], device)
        with autocast(device, precision):
            logits = task.forward(model, batch)
        if judged:
            total += float(task.loss(logits, batch.examples, options))
            weight += task.weight(batch.examples, options)
        for index, array in zip(indices, task.split(logits, batch), strict=True):
            arrays[index] = array
        if progress is not None:
            progress(len(indices))
    model.train(training)
    return Outputs(arrays, total / weight if weight else None)


def predict(
    model: nn.Module,
    task: Task,
    tokenizer: Tokenizer,
    table: Table,
    columns: Mapping[str, str],
    *,
    text: TextSettings | None = None,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """The prediction of each row of `table`; the keys are the task's (label, probability, scores ...).

    Args:
        model: of the class `task.model_class`, ours or transformers' (fused or not); runs on its device.
        columns: role -> column; targets are not needed and not looked at.
        text: as in training if None, which the model's configuration remembers.
    """
    roles = {role.name: role for role in task.roles}
    inputs = {name: column for name, column in columns.items() if not roles[name].target}
    text = text or text_settings(model)
    examples = task.encode(table, inputs, tokenizer, text, training=False)
    outputs = run_examples(model, task, examples, batch_tokens=batch_tokens, precision=precision, progress=progress)
    return task.decode(outputs.arrays, examples, table, inputs)
