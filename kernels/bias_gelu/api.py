"""Public function of bias_gelu: validates the arguments, dispatches to an implementation."""

from __future__ import annotations

from torch import Tensor

from bert_fast.kernels._common.checks import check_floating, to_compute_dtype
from bert_fast.kernels._common.times import size_of_rows
from bert_fast.kernels.bias_gelu.op import OP


def bias_gelu(x: Tensor, bias: Tensor, *, approximate: str = "none", impl: str = "auto") -> Tensor:
    """GeLU of a sum with a bias: out = gelu(x + bias).

    gelu(u) = u Phi(u), Phi the normal distribution function by erf, or its tanh approximation.

    Args:
        x: (T, F) float32, bfloat16, float16 or float64; the matrix product without its bias.
        bias: (F,), the dtype of `x` or float32.
        approximate: "none" for erf, "tanh" for 0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))).
        impl: "auto", "reference", "triton", "cuda" or "cpu".

    Returns:
        (T, F) in the dtype of `x`, under autocast in autocast's.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a shape, a device, `approximate` or `impl` is none of these.
        ImplUnavailableError: the requested `impl` can't run here.

    Source: Hendrycks and Gimpel, "Gaussian error linear units", 2016.
    """
    check_floating("x", x, ("T", "F"))
    check_floating("bias", bias, x.shape[1:], x)
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is {approximate!r}; expected 'none' or 'tanh'")
    x = to_compute_dtype(x)
    out: Tensor = OP.select(impl, x, size=size_of_rows(x.shape[0], x.shape[1]))(x, bias, approximate == "tanh")
    return out
