"""What kernels of bias_gelu get wrong: see kernels/_common/mistakes.py."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common.mistakes import straight_through


def _other_form(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x + bias.to(x.dtype), approximate="none" if approximate == "tanh" else "tanh")


def _tanh(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def _erf(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x + bias.to(x.dtype))


def _quick(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    u = x + bias.to(x.dtype)
    return u * (1.702 * u).sigmoid()


def _without_bias(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate) + 0 * bias.to(x.dtype)


def _bias_after(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x, approximate=approximate) + bias.to(x.dtype)


def _gradient_of_other_form(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    u = x + bias.to(x.dtype)
    return straight_through(F.gelu(u, approximate=approximate), _other_form(x, bias, approximate))


def _gradient_at_x(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    shifted = F.gelu(x + bias.to(x.dtype), approximate=approximate)
    # The derivative at x, for x and, summed over rows, for the bias.
    return straight_through(shifted, F.gelu(x + (bias - bias.detach()).to(x.dtype), approximate=approximate))


MISTAKES = {
    "tanh GeLU in place of erf GeLU": _tanh,
    "erf GeLU in place of its tanh approximation": _erf,
    "x sigmoid(1.702 x) (quick GeLU) in place of GeLU": _quick,
    "the bias is not added": _without_bias,
    "the bias is added after GeLU": _bias_after,
    "the gradient is that of GeLU's other form": _gradient_of_other_form,
    "the gradient is taken at x, not at x + bias": _gradient_at_x,
}
