"""The activation functions that `hidden_act` may name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.kernels._common.activation import activate

# hidden_act -> the `activation` argument of the kernels
GELU_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
# hidden_act -> eager PyTorch
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: partial(activate, activation=gelu) for name, gelu in GELU_ACTIVATIONS.items()},
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}
