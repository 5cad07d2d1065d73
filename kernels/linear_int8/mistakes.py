"""What kernels of linear_int8 get wrong: see kernels/_common/mistakes.py."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from bert_fast.kernels._common.activation import activate
from bert_fast.kernels.linear_int8.reference import quantize_rows_reference


def _mistaken(
    x: Tensor,
    weight: tuple[Tensor, ...],
    bias: Tensor | None,
    activation: str | None,
    input_range: Tensor | None,
    out_dtype: torch.dtype | None,
    *,
    adds_low: bool = True,
    symmetric: bool = False,
    uses_scale: bool = True,
    adds_bias: bool = True,
    form: str = "own",
) -> Tensor:
    u, scale, low = quantize_rows_reference(x, input_range)
    if symmetric:
        low = torch.zeros_like(low)
        scale = x.to(scale.dtype).abs().amax(1, keepdim=True) / 127
        u = (x.to(scale.dtype) / scale).round()
    values = weight[0].to(scale.dtype)
    out = scale * (u.to(scale.dtype) @ values.T) + (low * values.sum(1) if adds_low else 0.0)
    out = out * (weight[1].to(scale.dtype) if uses_scale else 1.0)
    if bias is not None and adds_bias:
        out = out + bias.to(scale.dtype)
    form = {"own": activation, "none": None, "tanh": "gelu_tanh" if activation else None}[form]  # type: ignore[assignment]
    return activate(out, form).to(out_dtype or x.dtype)


MISTAKES = {
    "the zero point (the smallest value of the row) is left out": functools.partial(_mistaken, adds_low=False),
    "the activations are quantized symmetrically": functools.partial(_mistaken, symmetric=True),
    "the weight's scale is left out": functools.partial(_mistaken, uses_scale=False),
    "the bias is not added": functools.partial(_mistaken, adds_bias=False),
    "GeLU is left out": functools.partial(_mistaken, form="none"),
    "tanh GeLU in place of erf GeLU": functools.partial(_mistaken, form="tanh"),
}
