"""act(x weight^T + bias) in eager PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common.activation import activate
from bert_fast.kernels._common.checks import parameter_like


def linear_reference(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    """out = act(x weight^T + bias), `weight` being `weights` concatenated along dim 0.

    These are the arguments, in order, of every implementation; the encoder's fast path passes them by position.

    Args:
        x: (T, K) floating point; its dtype is that of the computation and of the result.
        weights: (N1, K), (N2, K) ..., cast to the dtype of `x`; N = N1 + N2 + ...
        bias: (N,), cast to the dtype of `x`, or None.
        activation: None, "gelu" or "gelu_tanh".

    Returns:
        (T, N) in the dtype of `x`; under autocast in autocast's, which casts the operands and caches the cast weight.
    """
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    weight, bias = parameter_like(weight, x), None if bias is None else parameter_like(bias, x)
    return activate(F.linear(x, weight, bias), activation)
