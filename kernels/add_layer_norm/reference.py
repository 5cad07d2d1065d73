"""LayerNorm(residual + dropout(x + x_bias)) in eager PyTorch: the definition."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common.philox import dropout_multiplier


def add_layer_norm_reference(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    eps: float,
    rng_state: Tensor | None,
) -> Tensor:
    """out = LayerNorm(residual + dropout(x + x_bias)) * weight + bias, row by row.

    LayerNorm(s) = (s - mean(s)) / sqrt(var(s) + eps), with the biased variance. These are the arguments, in order, of
    the operator `add_layer_norm_fwd` and of every implementation; the encoder's fast path passes them by position.

    Args:
        x, residual: (T, E) of one floating dtype, which is that of the computation and of the result.
        weight, bias: (E,), cast to the dtype of `x`.
        x_bias: (E,), cast to the dtype of `x`, or None.
        dropout_p: probability of dropping an element of x + x_bias; read where `rng_state` is a tensor.
        eps: added to the variance.
        rng_state: int64 (2,), seed and offset of the mask (plane 0, row t, column e), or None for no dropout.

    Returns:
        (T, E) in the dtype of `x`.
    """
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if rng_state is not None:
        x = x * dropout_multiplier(rng_state, dropout_p, 1, *x.shape)[0].to(x.dtype)
    out = F.layer_norm(residual + x, (x.shape[1],), weight.to(x.dtype), bias.to(x.dtype), eps)
    return out.to(x.dtype)  # layer_norm returns float32 under CUDA autocast
