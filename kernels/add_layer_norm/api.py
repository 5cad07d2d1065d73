"""Public function of add_layer_norm: validates the arguments, dispatches to an implementation."""

from __future__ import annotations

from torch import Tensor

from bert_fast.kernels._common.checks import (
    check_eps,
    check_floating,
    check_same_dtype,
    to_compute_dtype,
)
from bert_fast.kernels._common.philox import dropout_state
from bert_fast.kernels._common.times import size_of_rows
from bert_fast.kernels.add_layer_norm.op import OP


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    rng_state: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Residual connection and LayerNorm of a sublayer: out = LayerNorm(residual + dropout(x + x_bias)) * weight + bias.

    LayerNorm(s) = (s - mean(s)) / sqrt(var(s) + eps) over each row, with the biased variance. The backward pass
    recomputes the sum and the dropout mask; besides its inputs only mean and 1 / sqrt(var + eps) of each row are saved.

    Args:
        x: (T, E) float32, bfloat16, float16 or float64; the sublayer's matrix product, without its bias if `x_bias` is
            given.
        residual: (T, E) in the dtype of `x`; the sublayer's input.
        weight, bias: (E,), the dtype of `x` or float32.
        x_bias: (E,), the dtype of `x` or float32, or None.
        dropout_p: probability of dropping an element of x + x_bias, in steps of 1/256; 0 for none.
        eps: added to the variance.
        rng_state: int64 (2,), seed and offset of the dropout mask (plane 0, row t, column e); drawn from torch's
            generator where None.
        impl: "auto", "reference", "triton", "cuda" or "cpu".

    Returns:
        (T, E) in the dtype of `x`, under autocast in autocast's.

    Raises:
        TypeError: a tensor is not floating point, x and residual differ in dtype, or rng_state is not int64.
        ValueError: a shape, a device, `dropout_p`, `eps` or `impl` is none of these.
        ImplUnavailableError: the requested `impl` can't run here.

    Source: Vaswani et al., "Attention is all you need", 2017, section 5.4; Ba et al., "Layer normalization", 2016.
    """
    check_floating("x", x, ("T", "E"))
    check_floating("residual", residual, x.shape, x)
    width = x.shape[1:]
    check_floating("weight", weight, width, x)
    check_floating("bias", bias, width, x)
    if x_bias is not None:
        check_floating("x_bias", x_bias, width, x)
    eps = check_eps(eps)
    rng_state = dropout_state(dropout_p, rng_state, x)
    x, residual = to_compute_dtype(x), to_compute_dtype(residual)
    check_same_dtype(x, residual=residual)
    call = OP.select(impl, x, size=size_of_rows(x.shape[0], x.shape[1], dropout_p))
    out: Tensor = call(x, residual, weight, bias, x_bias, dropout_p, eps, rng_state)
    return out
