"""gelu(x + bias) in eager PyTorch: the definition."""

from torch import Tensor
from torch.nn import functional as F


def bias_gelu_reference(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    """out = gelu(x + bias).

    gelu(u) = u Phi(u), Phi the normal distribution function; with `tanh` its approximation
    0.5 u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))).

    Args:
        x: (T, F) floating point; its dtype is that of the computation and of the result.
        bias: (F,), cast to the dtype of `x`.
        tanh: use the approximation.

    Returns:
        (T, F) in the dtype of `x`.
    """
    return F.gelu(x + bias.to(x.dtype), approximate="tanh" if tanh else "none")
