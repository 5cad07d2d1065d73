"""What the usual mistakes of kernels compute, in PyTorch: shared by the ops' `mistakes.py`.

Each mistake is a kernel as `bert_fast.kernels.register` takes it. Where a kernel fails the three-way test,
`bert_fast.testing` looks for the mistake whose results are those of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskProbe:
    """A call whose result shows which elements were dropped.

    Args:
        call: called with impl=..., rng_state=... and a device; returns the output.
        kept: bool, from the output: which elements were kept.
        dropout_p: the probability that `call` drops with.
        expected: the mean of the output without dropout, if it is the expectation with it; None where it is not.
    """

    call: Callable[..., Tensor]
    kept: Callable[[Tensor], Tensor]
    dropout_p: float
    expected: float | None = None


def straight_through(value: Tensor, gradient_of: Tensor) -> Tensor:
    """`value`, with the gradient of `gradient_of`: a mistake of the backward pass alone."""
    return gradient_of + (value - gradient_of).detach()


def normalize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    unbiased: bool = False,
    eps_outside: bool = False,
    centered: bool = True,
    offset: float = 0.0,
) -> Tensor:
    """LayerNorm of each row, with the options by which kernels differ from it."""
    mean = x.mean(-1, keepdim=True)
    variance = (x - mean).square().sum(-1, keepdim=True) / (x.shape[-1] - unbiased)
    if not centered:
        mean, variance = torch.zeros_like(mean), x.square().mean(-1, keepdim=True)
    deviation = variance.sqrt() + eps if eps_outside else (variance + eps).sqrt()
    return (x - mean) / deviation * (weight.to(x.dtype) + offset) + bias.to(x.dtype)


NORM_MISTAKES: dict[str, dict[str, Any]] = {
    "the variance divides by E - 1 (biased variance expected: by E)": {"unbiased": True},
    "eps is added outside the square root": {"eps_outside": True},
    "the mean is not subtracted (RMSNorm)": {"centered": False},
    "the weight is used as 1 + weight": {"offset": 1.0},
}
