"""act(x weight^T + bias) in eager PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def linear_reference(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if not torch.is_autocast_enabled(x.device.type):  # which casts for itself, and keeps the cast weight
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    out = F.linear(x, weight, bias)
    if activation is None:
        return out
    return F.gelu(out, approximate="none" if activation == "gelu" else "tanh")
