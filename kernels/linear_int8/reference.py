"""The linear layer in 8 bits in eager PyTorch: the definition. Its products are exact integers, held in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def quantize_rows_reference(x: Tensor, input_range: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x (T, K) -> u (T, K) uint8, scale (T, 1), low (T, 1), x being scale u + low up to rounding and the range."""
    x = x if x.dtype == torch.float64 else x.float()
    if input_range is None:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    else:
        low, high = (bound.to(x.dtype).expand(x.shape[0], 1) for bound in input_range)
    scale = (high - low) * (1.0 / 255.0)
    inverse = torch.where(scale > 0, 1.0 / scale, 0.0)
    u = ((x - low) * inverse).round().clamp(0, 255).nan_to_num(0.0).to(torch.uint8)
    # A value that is not finite makes its whole row so.
    return u, scale + (x - x).sum(1, keepdim=True), low


def linear_int8_reference(
    x: Tensor,
    values: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    activation: str | None,
    input_range: Tensor | None,
) -> Tensor:
    u, scale, low = quantize_rows_reference(x, input_range)
    products = (u.double() @ values.double().T).to(scale.dtype)
    out = (scale * products + low * values.double().sum(1).to(scale.dtype)) * weight_scale.to(scale.dtype)
    if bias is not None:
        out = out + bias.to(scale.dtype)
    if activation is not None:
        out = F.gelu(out, approximate="none" if activation == "gelu" else "tanh")
    return out.to(x.dtype)


def feed_forward_int8_reference(
    x: Tensor,
    up: tuple[Tensor, ...],
    up_bias: Tensor | None,
    down: tuple[Tensor, ...],
    activation: str,
    up_range: Tensor | None,
    down_range: Tensor | None,
) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()  # between the two products nothing is rounded to x's dtype
    between = linear_int8_reference(wide, up[0], up[1], up_bias, activation, up_range)
    return linear_int8_reference(between, down[0], down[1], None, None, down_range).to(x.dtype)
