"""What kernels of add_layer_norm get wrong: see kernels/_common/mistakes.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.mistakes import NORM_MISTAKES, MaskProbe, normalize, straight_through
from bert_fast.kernels._common.philox import dropout_multiplier
from bert_fast.kernels.add_layer_norm.api import add_layer_norm


def _mistaken(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    eps: float,
    rng_state: Tensor | None,
    *,
    adds_bias: bool = True,
    adds_residual: bool = True,
    drops: str = "x",
    scaled: bool = True,
    replays: bool = True,
    **norm: Any,
) -> Tensor:
    if x_bias is not None:
        x = x + x_bias.to(x.dtype) * (1.0 if adds_bias else 0.0)
    keep = torch.ones((), dtype=x.dtype, device=x.device)
    if rng_state is not None:
        keep = dropout_multiplier(rng_state, dropout_p, 1, *x.shape)[0].to(x.dtype)
        keep = keep if scaled else (keep > 0).to(x.dtype)
    if drops == "x":
        x = x * keep if replays else straight_through(x * keep, x)
    x = x + residual * (1.0 if adds_residual else 0.0)
    if drops == "sum":
        x = x * keep
    out = normalize(x, weight, bias, eps, **norm)
    return out * keep if drops == "result" else out


MISTAKES = {
    **{name: functools.partial(_mistaken, **options) for name, options in NORM_MISTAKES.items()},
    "x_bias is not added": functools.partial(_mistaken, adds_bias=False),
    "the residual is not added": functools.partial(_mistaken, adds_residual=False),
    "dropout also drops the residual": functools.partial(_mistaken, drops="sum"),
    "dropout is applied after LayerNorm": functools.partial(_mistaken, drops="result"),
    "dropout is left out": functools.partial(_mistaken, drops="nothing"),
    "kept elements are not scaled by 1 / (1 - p)": functools.partial(_mistaken, scaled=False),
    "the backward pass does not apply the dropout mask": functools.partial(_mistaken, replays=False),
}


def _probe(impl: str, rng_state: Tensor, device: str) -> Tensor:
    x = torch.ones(200, 96, device=device)
    weight, bias = torch.ones(96, device=device), torch.zeros(96, device=device)
    return add_layer_norm(x, torch.zeros_like(x), weight, bias, dropout_p=0.25, rng_state=rng_state, impl=impl)


# Each row is a mixture of two values, of which the kept elements have the larger.
MASK_PROBE = MaskProbe(_probe, lambda out: out > 0, 0.25)
