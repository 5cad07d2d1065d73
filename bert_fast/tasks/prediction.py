"""Inference of a fitted task: batches of similar length, without gradients, predictions in the order of the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from bert_fast._ahead import map_ahead
from bert_fast._device import autocast
from bert_fast.data.tokenizer import check_rows
from bert_fast.models.config import longest_input
from bert_fast.models.embedding import batches_by_length
from bert_fast.models.texts import as_tokenizer, check_integer_argument, evaluating
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import CONFIG_KEY, Batch, Example, LossOptions, Task

WINDOW = 4096  # rows tokenized at once; bounds the memory


@dataclass(frozen=True)
class Outputs:
    """The outputs of a model for examples.

    Attributes:
        arrays: one array per example, in order; see `Task.per_example`.
        loss: the mean loss; None if an example has no target.
    """

    arrays: list[np.ndarray[Any, Any]]
    loss: float | None


def example_groups(task: Task, examples: Sequence[Example]) -> list[list[int]]:
    """The indices of examples that must be in one batch: each alone, or all of a row."""
    if not task.keep_rows_together:
        return [[index] for index in range(len(examples))]
    groups: list[list[int]] = []
    for index, example in enumerate(examples):
        if index and examples[index - 1].row == example.row:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def text_settings(model: nn.Module) -> TextSettings:
    """How texts were tokenized when `model` was fine-tuned."""
    config: Any = model.config
    entry = getattr(config, "extra", {}).get(CONFIG_KEY) or getattr(config, CONFIG_KEY, {})
    return TextSettings(**entry.get("text", {"max_length": longest_input(config)}))


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
    """Run `model`, in eval mode, on `examples`; then every module has the mode again that it had.

    Args:
        model: of bert_fast or transformers; runs on its own device.
        task: fitted.
        examples: with or without targets.
        batch_tokens: maximum tokens of a batch of examples of similar length.
        precision: fp32, or bf16 for autocast.
        progress: called after each batch with its number of examples.

    Returns:
        The output of each example, and the mean loss if all have targets.
    """
    check_integer_argument("batch_tokens", batch_tokens, 1)
    with evaluating(model):
        device = next(model.parameters()).device
        groups = example_groups(task, examples)
        lengths = [sum(len(examples[index].input_ids) for index in group) for group in groups]
        arrays: list[Any] = [None] * len(examples)
        total, weight, options = 0.0, 0.0, LossOptions()
        has_targets = bool(examples) and all(example.target is not None for example in examples)
        for numbers in batches_by_length(lengths, batch_tokens):
            indices = [index for number in numbers for index in groups[number]]
            batch = Batch.of([examples[index] for index in indices], device)
            with autocast(device, precision):
                logits = task.forward(model, batch)
            if has_targets:
                total += float(task.loss(logits, batch.examples, options))
                weight += task.weight(batch.examples, options)
            for index, array in zip(indices, task.per_example(logits, batch), strict=True):
                arrays[index] = array
            if progress is not None:
                progress(len(indices))
        return Outputs(arrays, total / weight if weight else None)


def predict(
    model: nn.Module,
    task: Task,
    tokenizer: Any,
    table: Table,
    columns: Mapping[str, str],
    *,
    text: TextSettings | None = None,
    batch_tokens: int = 8192,
    precision: str = "fp32",
    progress: Callable[[int], None] | None = None,
) -> list[dict[str, Any]]:
    """Predict every row of `table`.

    Rows are tokenized `WINDOW` at a time, in a thread while the model runs on the window before.

    Args:
        model: of the class `task.model_class`, from bert_fast or transformers (fused or not); runs on its own device.
        task: fitted, as `task_from_config` restores it.
        tokenizer: of the model, from `bert_fast.data.load_tokenizer` or transformers' fast one.
        table: the rows.
        columns: role -> column; targets are ignored.
        text: how texts are tokenized; None takes the settings of the training from the model's configuration.
        batch_tokens: maximum tokens of a batch of examples of similar length.
        precision: fp32, or bf16 for autocast.
        progress: called after each batch with its number of examples.

    Returns:
        One prediction per row, as JSON values; the keys depend on the task (label, probability, scores ...).

    Raises:
        TypeError: `tokenizer` is no tokenizer that can be used.
        ValueError: a value of the table is invalid; the message names the row.
    """
    roles = {role.name: role for role in task.roles}
    inputs = {name: column for name, column in columns.items() if not roles[name].target}
    text = text or text_settings(model)
    tokenizer = as_tokenizer(tokenizer)
    settings: Any = model.config
    check_rows(tokenizer, settings.vocab_size, "predict")
    run = partial(run_examples, model, task, batch_tokens=batch_tokens, precision=precision, progress=progress)

    def encode(window: Table) -> tuple[Table, list[Example]]:
        return window, task.encode(window, inputs, tokenizer, text, training=False)

    starts = range(0, max(len(table), 1), WINDOW)
    windows = (table.select(range(len(table))[start : start + WINDOW]) for start in starts)
    predictions = []
    with closing(map_ahead(encode, windows)) as encoded:
        for window, examples in encoded:
            predictions += task.decode(run(examples).arrays, examples, window, inputs)
    return predictions
