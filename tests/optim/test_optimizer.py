"""Parameter groups, clipping, and the learning-rate schedule."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import nn

from bert_fast.models import BertConfig, BertForPreTraining
from bert_fast.optim.config import OptimizerOptions
from bert_fast.optim.groups import param_groups
from bert_fast.optim.optimizer import clipped_step, lr_factor, make_optimizer, set_lr


def test_biases_and_layer_norms_do_not_decay_and_tied_weights_appear_once() -> None:
    model = BertForPreTraining(BertConfig.size("tiny", vocab_size=40))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain = param_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all(names[p].endswith("weight") and "LayerNorm" not in names[p] for p in decayed["params"])
    assert all(names[p].endswith("bias") or "LayerNorm" in names[p] for p in plain["params"])
    everything = [*decayed["params"], *plain["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


def test_frozen_parameters_are_in_no_group() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in param_groups(model, 0.1)] == [1, 0]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("limit", [0.0, 0.5], ids=["no clipping", "clipping"])
def test_clipped_step_returns_the_norm_before_clipping(name: str, limit: float) -> None:
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimizerOptions(name=name, max_grad_norm=limit))  # type: ignore[arg-type]
    model.weight.grad, model.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), -1.0)
    assert clipped_step(optimizer, limit).item() == pytest.approx((6 * 4 + 2) ** 0.5)


def test_adamw_gradients_are_clipped_in_place() -> None:
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimizerOptions(max_grad_norm=0.5))
    model.weight.grad, model.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), -1.0)
    clipped_step(optimizer, 0.5)
    norm = (model.weight.grad.square().sum() + model.bias.grad.square().sum()).sqrt()
    # clip_grad_norm_ divides by the norm, 5.1, plus 1e-6, which is 2e-7 of it; an eps of float32 is 1.2e-7.
    assert norm.item() == pytest.approx(0.5, rel=1e-4)


def test_warm_up_then_linear_decay() -> None:
    factors = [lr_factor(step, warmup=4, total=10) for step in range(1, 11)]
    assert factors == [1 / 4, 2 / 4, 3 / 4, 4 / 4, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]


def test_without_warm_up_decay_starts_at_the_first_step() -> None:
    assert [lr_factor(step, 0, 4) for step in range(1, 5)] == [4 / 5, 3 / 5, 2 / 5, 1 / 5]


def test_without_decay_the_peak_stays() -> None:
    assert [lr_factor(step, 2, 5, "none") for step in range(1, 6)] == [1 / 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 2), (10, 1000), (999, 1000)])
def test_peak_once_and_zero_only_after_the_last_step(warmup: int, total: int) -> None:
    factors = [lr_factor(step, warmup, total) for step in range(1, total + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    assert lr_factor(total + 1, warmup, total) == 0
    if warmup:
        assert factors.index(1.0) == warmup - 1
    # Equal steps down after the peak.
    after = [Fraction(factor).limit_denominator(10**6) for factor in factors[warmup:]]
    assert all(a - b == Fraction(1, total + 1 - warmup) for a, b in pairwise(after))


def test_a_schedule_of_another_name_and_a_rate_that_is_no_number_are_refused() -> None:
    with pytest.raises(ValueError, match="decay is 'quadratic'; expected linear, cosine, none or constant"):
        lr_factor(1, 0, 4, "quadratic")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    for lr in (float("nan"), float("inf"), -0.1):
        with pytest.raises(ValueError, match=f"lr is {lr}; expected a finite number"):
            set_lr(optimizer, lr)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_cosine_and_constant_decay() -> None:
    factors = [lr_factor(step, 2, 9, "cosine") for step in range(1, 10)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[5] == pytest.approx(0.5)  # halfway through the decay
    assert factors[2] == pytest.approx((1 + math.cos(math.pi / 8)) / 2)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[-1] > 0
    assert lr_factor(9, 2, 9, "constant") == 1.0
