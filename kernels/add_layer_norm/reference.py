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
    if x_bias is not None:
        x = x + x_bias.to(x.dtype)
    if rng_state is not None:
        x = x * dropout_multiplier(rng_state, dropout_p, 1, *x.shape)[0].to(x.dtype)
    out = F.layer_norm(residual + x, (x.shape[1],), weight.to(x.dtype), bias.to(x.dtype), eps)
    return out.to(x.dtype)  # CUDA's autocast makes it float32
