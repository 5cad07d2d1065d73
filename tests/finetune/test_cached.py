"""Gradients in parts (GradCache): equal to those of the whole micro-batch, with dropout replayed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bert_fast.finetune.cached import cached_backward, parts_by_tokens
from bert_fast.finetune.task_run import TaskRun
from bert_fast.tasks.task import Example


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def labelled(name: str) -> Callable[[str], str]:
    """The message of a difference with the name of the parameter."""
    return lambda text: f"{name}: {text}"


def task_run(toy: Any, task: str, folder: Path, **changes: Any) -> TaskRun:
    torch.manual_seed(1)  # of the head
    run = TaskRun(toy.settings(folder / "run", task, **changes), None, lambda _: None)
    run.model.double().train()
    return run


@pytest.mark.parametrize("task", ["sentence-embedding", "rerank", "classification", "token-classification"])
def test_the_gradients_are_those_of_the_whole_batch(task: str, toy: Any, tmp_path: Path) -> None:
    found = []
    for tokens in (None, 9):
        run = task_run(toy, task, tmp_path, dropout=0.0, batch={"rows": 40, "cache_tokens": tokens})
        loss = run.backward(run.train_examples, run.loss_weight([run.train_examples]), 0.5)
        found.append((loss, gradients(run.model)))
    (loss, expected), (cached_loss, cached) = found
    assert len(parts_by_tokens(run.train_examples, 9)) > 5
    # float64 (eps 2.2e-16) in two orders, through two layers and, for pooling, float32 (eps 1.2e-7).
    torch.testing.assert_close(cached_loss, loss, rtol=1e-5, atol=1e-7)
    assert cached.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            cached[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_dropout_is_replayed(toy: Any, tmp_path: Path) -> None:
    """The vectors of both passes are the same bits, and the generator ends where one pass leaves it."""
    run = task_run(toy, "sentence-embedding", tmp_path, dropout=0.3, batch={"rows": 40, "cache_tokens": 9})
    run.model.float()
    parts = parts_by_tokens(run.train_examples, 9)
    weight = run.loss_weight([run.train_examples])
    outputs: list[Tensor] = []
    generator_ends = []

    def forward(part: Sequence[Example]) -> Tensor:
        outputs.append(run._forward(part))
        return outputs[-1]

    def loss(vectors: Tensor) -> Tensor:
        return run.task.loss(vectors, run.train_examples, run.loss_options) / weight

    torch.manual_seed(3)
    cached_backward(forward, loss, parts, run.device)
    generator_ends.append(torch.get_rng_state())
    cached = gradients(run.model)
    first, second = outputs[: len(parts)], outputs[len(parts) :]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(3)
    loss(torch.cat([run._forward(part) for part in parts])).backward()
    generator_ends.append(torch.get_rng_state())
    assert torch.equal(*generator_ends)
    for name, gradient in gradients(run.model).items():
        # float32 (eps 1.2e-7): sums over about 30 parts in another order.
        torch.testing.assert_close(
            cached[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}"
        )
    torch.manual_seed(4)
    assert not torch.equal(run._forward(parts[0]), first[0]), "dropout is on"


def test_parts_hold_up_to_the_budget() -> None:
    examples = [Example(row, [0] * length, [0] * length) for row, length in enumerate([3, 4, 2, 20, 1, 8, 1])]
    parts = parts_by_tokens(examples, 9)
    assert [[len(example.input_ids) for example in part] for part in parts] == [[3, 4, 2], [20], [1, 8], [1]]
