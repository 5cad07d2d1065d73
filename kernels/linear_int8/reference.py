"""The INT8 linear layer in eager PyTorch: the definition. Its products are exact integers, held in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_fast.kernels._common.activation import activate


def quantize_rows_reference(x: Tensor, input_range: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Asymmetric quantization of each row: u = round((x - low) / scale), so x is about scale u + low.

    scale = (high - low) / 255, where low and high are the smallest and the largest value of the row, or `input_range`,
    to which x is clipped. A row with a value that is not finite gets a scale of NaN.

    Args:
        x: (T, K) floating point; computed in float32, or in float64 for float64.
        input_range: (2,), low and high of every row, or None.

    Returns:
        u (T, K) uint8; scale (T, 1) and low (T, 1) in the dtype of the computation.
    """
    x = x if x.dtype == torch.float64 else x.float()
    if input_range is None:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    else:
        low, high = (bound.to(x.dtype).expand(x.shape[0], 1) for bound in input_range)
    scale = (high - low) * (1.0 / 255.0)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    u = ((x - low) * inverse).round().clamp(0, 255).nan_to_num(0.0).to(torch.uint8)
    return u, scale + (x - x).sum(1, keepdim=True), low  # x - x is NaN where x is not finite


def linear_int8_reference(
    x: Tensor,
    weight: tuple[Tensor, ...],
    bias: Tensor | None,
    activation: str | None,
    input_range: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """out = act(x' weight'^T + bias), of the quantized x' = scale u + low and weight' = weight_scale values.

    Computed as (scale (u values^T) + low sum(values)) weight_scale + bias, whose products are integers. These are the
    arguments, in order, of every implementation; the encoder's fast path passes them by position.

    Args:
        x: (T, K) floating point; computed in float32, or in float64 for float64.
        weight: values (N, K) int8, scale (N,) float32, and the sums of the rows of values, (N,) float32, which the
            reference computes itself.
        bias: (N,) floating point, or None.
        activation: None, "gelu" or "gelu_tanh".
        input_range: see `quantize_rows_reference`.
        out_dtype: None for the dtype of `x`.

    Returns:
        (T, N) in `out_dtype`.
    """
    values, weight_scale = weight[:2]
    u, scale, low = quantize_rows_reference(x, input_range)
    products = (u.double() @ values.double().T).to(scale.dtype)
    out = (scale * products + low * values.double().sum(1).to(scale.dtype)) * weight_scale.to(scale.dtype)
    if bias is not None:
        out = out + bias.to(scale.dtype)
    return activate(out, activation).to(x.dtype if out_dtype is None else out_dtype)


def feed_forward_int8_reference(
    x: Tensor,
    up: tuple[Tensor, ...],
    up_bias: Tensor | None,
    down: tuple[Tensor, ...],
    activation: str,
    up_range: Tensor | None,
    down_range: Tensor | None,
) -> Tensor:
    """out = act(x up^T + up_bias) down^T, both products as in `linear_int8_reference`.

    The intermediate activations are quantized from float32 (float64 for float64), not from the dtype of `x`. These are
    the arguments, in order, of every implementation; the encoder's fast path passes them by position.

    Args:
        x: (T, K) floating point.
        up, down: the quantized weights (F, K) and (N, F): values, scale and sums.
        up_bias: (F,) floating point, or None.
        activation: "gelu" or "gelu_tanh".
        up_range, down_range: the ranges of `x` and of the intermediate activations, (2,), or None.

    Returns:
        (T, N) in the dtype of `x`.
    """
    precise = x if x.dtype == torch.float64 else x.float()
    intermediate = linear_int8_reference(precise, up, up_bias, activation, up_range)
    return linear_int8_reference(intermediate, down, None, None, down_range).to(x.dtype)
