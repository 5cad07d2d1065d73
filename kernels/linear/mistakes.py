"""What kernels of linear get wrong: see kernels/_common/mistakes.py."""

from __future__ import annotations

import functools

from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common.activation import activate
from bert_fast.kernels._common.mistakes import straight_through

_OTHER = {"gelu": "gelu_tanh", "gelu_tanh": "gelu", None: None}


def _mistaken(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    *,
    adds_bias: bool = True,
    bias_after: bool = False,
    form: str = "own",
    gradient: bool = True,
) -> Tensor:
    product = F.linear(x, weight.to(x.dtype))
    shift = 0.0 if bias is None else bias.to(x.dtype) * (1.0 if adds_bias else 0.0)
    activation = {"own": activation, "other": _OTHER[activation], "none": None}[form]
    if bias_after:
        return activate(product, activation) + shift
    out = activate(product + shift, activation)
    return out if gradient else straight_through(out, product + shift)


MISTAKES = {
    "the bias is not added": functools.partial(_mistaken, adds_bias=False),
    "the bias is added after GeLU": functools.partial(_mistaken, bias_after=True),
    "GeLU is left out": functools.partial(_mistaken, form="none"),
    "tanh GeLU in place of erf GeLU": functools.partial(_mistaken, form="other"),
    "the backward pass leaves GeLU's derivative out": functools.partial(_mistaken, gradient=False),
}
