"""Which parameters decay, and what clipping does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bert_fast.models import BertConfig, BertForPreTraining
from bert_fast.optim.params import clipped_step, make_optimizer, param_groups
from bert_fast.pretrain.config import OptimizerOptions


def test_biases_and_layer_norms_do_not_decay_and_tied_weights_appear_once() -> None:
    model = BertForPreTraining(BertConfig.size("tiny", vocab_size=40))
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, plain = param_groups(model, 0.05)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)
    assert all(names[p].endswith("weight") and "LayerNorm" not in names[p] for p in decayed["params"])
    assert all(names[p].endswith("bias") or "LayerNorm" in names[p] for p in plain["params"])
    everything = [*decayed["params"], *plain["params"]]
    assert len(everything) == len(set(everything)) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    assert [len(group["params"]) for group in param_groups(model, 0.1)] == [1, 0]


@pytest.mark.parametrize("name", ["adamw", "lamb"])
@pytest.mark.parametrize("limit", [0.0, 0.5], ids=["no clipping", "clipping"])
def test_the_norm_is_that_before_clipping(name: str, limit: float) -> None:
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimizerOptions(name=name, max_grad_norm=limit))  # type: ignore[arg-type]
    model.weight.grad, model.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), -1.0)
    assert clipped_step(optimizer, limit).item() == pytest.approx((6 * 4 + 2) ** 0.5)


def test_adamw_follows_the_clipped_gradient() -> None:
    model = nn.Linear(3, 2)
    optimizer = make_optimizer(model, OptimizerOptions(max_grad_norm=0.5))
    model.weight.grad, model.bias.grad = torch.full((2, 3), 2.0), torch.full((2,), -1.0)
    clipped_step(optimizer, 0.5)
    norm = (model.weight.grad.square().sum() + model.bias.grad.square().sum()).sqrt()
    assert norm.item() == pytest.approx(0.5, rel=1e-4)
