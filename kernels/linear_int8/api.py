"""The doors of linear_int8: checks, then the chosen implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.checks import autocast, check_floating, check_integer, check_same_device, check_shape
from bert_fast.kernels.linear_int8 import cpu_backends
from bert_fast.kernels.linear_int8.op import FEED_FORWARD, OP


class Int8Weight(NamedTuple):
    """A weight in 8 bits: row n is scale[n] values[n]."""

    values: Tensor  # (N, K) int8
    scale: Tensor  # (N,) float32
    sums: Tensor  # (N,) float32, the sum of each row of values


def quantize_weight(weight: Tensor, *, limit: int | None = None) -> Int8Weight:
    """A weight in 8 bits, symmetric and by output channel: values = round(weight / scale), scale = max |row| / limit.

    Args:
        weight: (N, K) floating point.
        limit: the largest magnitude of a value, 1 to 127; None for what this CPU multiplies without saturation: 127
            with VNNI, else 64 (README.md).

    Raises:
        TypeError: `weight` is not floating point.
        ValueError: its shape is not (N, K), it is empty, or it has values that are not finite.
    """
    check_floating("weight", weight, ("N", "K"))
    if not weight.numel() or not bool(weight.isfinite().all()):
        raise ValueError(f"weight (shape {tuple(weight.shape)}) is empty or not finite; expected finite numbers")
    limit = cpu_backends.weight_limit() if limit is None else limit
    if not 1 <= limit <= 127:
        raise ValueError(f"limit is {limit}; expected 1 to 127")
    precise = weight.detach().float()
    scale = precise.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / limit
    values = (precise / scale[:, None]).round().clamp(-limit, limit).to(torch.int8)
    return Int8Weight(values, scale, values.sum(1, dtype=torch.int64).float())


def linear_int8(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    input_range: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """A linear layer with operands of 8 bits: out = act(x' weight'^T + bias), without a gradient.

    x' = scale_t u_t + low_t with u_t = round((x_t - low_t) / scale_t) from 0 to 255: by token, low_t and
    low_t + 255 scale_t being the row's smallest and largest value, or with `input_range` the same for every token.
    A row with a value that is not finite gives NaN.

    Args:
        x: (T, K) float32, bfloat16, float16 or float64.
        weight: what `quantize_weight` made of (N, K).
        bias: (N,) floating point, or None.
        activation: None, "gelu" (with erf) or "gelu_tanh".
        input_range: (2,) float32, the lowest and the highest value of x, which is clipped to them; None for by token.
        impl: "auto", "reference" or "cpu".

    Returns:
        (T, N) in the dtype of `x`, under autocast in autocast's.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: a shape, a device or `activation` does not fit, or `x` asks for a gradient.
        ImplUnavailableError: the `impl` asked for can't run here.
    """
    x = _checked(x, weight, bias, activation, input_range)
    out: Tensor = OP.select(impl, x)(x, tuple(weight), bias, activation, input_range)
    return out


def feed_forward_int8(
    x: Tensor,
    up: Int8Weight,
    up_bias: Tensor | None,
    down: Int8Weight,
    *,
    activation: str = "gelu",
    up_range: Tensor | None = None,
    down_range: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """BERT's feed-forward block in 8 bits: act(x up^T + up_bias) down^T, without the second bias.

    What `linear_int8` computes twice; between the two the rows are quantized before they are written to memory.

    Args:
        x: (T, K); up: of (F, K); up_bias: (F,) or None; down: of (N, F).
        activation: "gelu" or "gelu_tanh".
        up_range, down_range: see `linear_int8`; of x, and of the activations.
        impl: "auto", "reference" or "cpu".

    Returns and raises: (T, N); as `linear_int8`.
    """
    x = _checked(x, up, up_bias, activation, up_range)
    if activation is None:
        raise ValueError("activation is None; expected 'gelu' or 'gelu_tanh'")
    _check_weight(down, up.values.shape[0], x)
    _check_range(down_range, x)
    call = FEED_FORWARD[OP.select(impl, x)]
    out: Tensor = call(x, tuple(up), up_bias, tuple(down), activation, up_range, down_range)
    return out


def _checked(
    x: Tensor, weight: Int8Weight, bias: Tensor | None, activation: str | None, input_range: Tensor | None
) -> Tensor:
    """`x` in autocast's dtype, once everything fits."""
    check_floating("x", x, ("T", "K"))
    _check_weight(weight, x.shape[1], x)
    if bias is not None:
        check_floating("bias", bias, weight.values.shape[:1], x)
    _check_range(input_range, x)
    if activation not in (None, "gelu", "gelu_tanh"):
        raise ValueError(f"activation is {activation!r}; expected None, 'gelu' or 'gelu_tanh'")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x asks for a gradient, and linear_int8 has none; run it under torch.no_grad()")
    return autocast(x)


def _check_weight(weight: Int8Weight, width: int, x: Tensor) -> None:
    check_integer("weight.values", weight.values, (torch.int8,))
    check_shape("weight.values", weight.values, ("N", width))
    check_same_device(x, **{"weight.values": weight.values})


def _check_range(input_range: Tensor | None, x: Tensor) -> None:
    if input_range is not None:
        check_floating("input_range", input_range, (2,), x)
