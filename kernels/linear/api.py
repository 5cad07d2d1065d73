"""Public function of linear: validates the arguments, dispatches to an implementation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bert_fast.kernels._common.activation import check_activation
from bert_fast.kernels._common.checks import check_floating, to_compute_dtype
from bert_fast.kernels._common.times import size_of_rows
from bert_fast.kernels.linear.op import OP


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """Linear layer with an optional GeLU: out = act(x weight^T + bias).

    The weight is read at every call; on the CPU `bert_fast.freeze` keeps packed copies of a model's weights. On a GPU
    the product is cuBLAS's and bias_gelu its epilogue.

    Args:
        x: (T, K) float32, bfloat16, float16 or float64.
        weight: (N, K), the dtype of `x` or float32; or several, (N1, K), (N2, K) ..., that are concatenated along dim 0
            to N = N1 + N2 + ... rows.
        bias: (N,), the dtype of `x` or float32, or None.
        activation: None, "gelu" (erf) or "gelu_tanh", its tanh approximation.
        impl: "auto", "reference", "triton", "cuda" or "cpu".

    Returns:
        (T, N) in the dtype of `x`, under autocast in autocast's.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a shape, a device, `activation` or `impl` is none of these, or `weight` is empty.
        ImplUnavailableError: the requested `impl` can't run here.

    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016, for the activations.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    check_floating("x", x, ("T", "K"))
    if not weights:
        raise ValueError("weight is empty; expected a tensor (N, K), or several")
    for index, part in enumerate(weights):
        check_floating("weight" if len(weights) == 1 else f"weight[{index}]", part, ("N", x.shape[1]), x)
    if bias is not None:
        check_floating("bias", bias, (sum(part.shape[0] for part in weights),), x)
    check_activation(activation)
    x = to_compute_dtype(x)
    size = size_of_rows(x.shape[0], sum(part.shape[0] for part in weights))  # of bias_gelu
    out: Tensor = OP.select(impl, x, size=size)(x, weights, bias, activation)
    return out
