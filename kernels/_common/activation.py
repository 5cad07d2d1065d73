"""The activations of a linear layer's epilogue, by the names that the public functions take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F


class Activation(NamedTuple):
    """One activation, as each callee names it."""

    code: int  # of the compiled operators (csrc/common/activation.h)
    approximate: str  # of torch.nn.functional.gelu; "" without an activation


ACTIVATIONS = {None: Activation(0, ""), "gelu": Activation(1, "none"), "gelu_tanh": Activation(2, "tanh")}


def check_activation(activation: str | None) -> None:
    """ValueError unless `activation` is a key of ACTIVATIONS."""
    if not isinstance(activation, str | None) or activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; expected None, 'gelu' or 'gelu_tanh'")


def activate(x: Tensor, activation: str | None) -> Tensor:
    """`activation` of `x` in eager PyTorch."""
    return x if activation is None else F.gelu(x, approximate=ACTIVATIONS[activation].approximate)
