"""gelu(x + bias) in eager PyTorch: the definition."""

from torch import Tensor
from torch.nn import functional as F


def bias_gelu_reference(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    return F.gelu(x + bias.to(x.dtype), approximate="tanh" if tanh else "none")
