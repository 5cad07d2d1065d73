"""The door of linear: checks, then the chosen implementation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bert_fast.kernels._common.checks import autocast, check_floating
from bert_fast.kernels.linear.op import OP

_ACTIVATIONS = (None, "gelu", "gelu_tanh")


def linear(
    x: Tensor,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    impl: str = "auto",
) -> Tensor:
    """A linear layer, and GeLU behind it on request: out = act(x weight^T + bias).

    On the CPU a weight that is not being trained is packed once (or, where bfloat16 has no units, kept in float32) and
    the packed copy is used again until the weight changes or dies: README.md says how a change is seen. On a GPU the
    product is cuBLAS's, with bias_gelu behind it.

    Args:
        x: (T, K) float32, bfloat16, float16 or float64.
        weight: (N, K), the dtype of `x` or float32; or several of them, (N1, K), (N2, K) ..., that lie beneath each
            other in one weight of N = N1 + N2 + ... rows.
        bias: (N,), the dtype of `x` or float32, or None.
        activation: None, "gelu" (with erf) or "gelu_tanh".
        impl: "auto", "reference", "triton", "cuda" or "cpu".

    Returns:
        (T, N) in the dtype of `x`, under autocast in autocast's.

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: a shape, a device, `activation` or `impl` is none of the above.
        ImplUnavailableError: the `impl` asked for can't run here.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    check_floating("x", x, ("T", "K"))
    if not weights:
        raise ValueError("weight is empty; expected a tensor (N, K), or several")
    for index, part in enumerate(weights):
        check_floating("weight" if len(weights) == 1 else f"weight[{index}]", part, ("N", x.shape[1]), x)
    if bias is not None:
        check_floating("bias", bias, (sum(part.shape[0] for part in weights),), x)
    if activation not in _ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected None, 'gelu' or 'gelu_tanh'")
    x = autocast(x)
    out: Tensor = OP.select(impl, x)(x, weights, bias, activation)
    return out
