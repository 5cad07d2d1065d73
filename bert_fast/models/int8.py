"""A linear layer of a quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.kernels import Int8Weight, feed_forward_int8, linear_int8, quantize_weight


class Int8Linear(nn.Module):
    """An nn.Linear with weights of 8 bits, for inference on the CPU.

    Activations are quantized by token, or within `input_range` (2,) once `calibrated` has set it.
    """

    values: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor
    input_range: Tensor | None

    def __init__(self, weight: Int8Weight, bias: Tensor) -> None:
        super().__init__()
        for name, x in zip(Int8Weight._fields, weight, strict=True):
            self.register_buffer(name, x, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.register_buffer("input_range", None, persistent=False)
        self.observed: tuple[float, float] | None = None  # what calibration has seen; None where none is running

    @classmethod
    def of(cls, denses: Sequence[nn.Linear]) -> Int8Linear:
        """The layer of one nn.Linear, or of several that read the same input, beneath each other."""
        with torch.no_grad():
            bias = torch.cat([dense.bias for dense in denses])
            return cls(quantize_weight(torch.cat([dense.weight for dense in denses])), bias)

    def part(self, first: int, last: int) -> Int8Linear:
        """The layer of the outputs from `first` to below `last`; the memory is shared."""
        return Int8Linear(Int8Weight(*(x[first:last] for x in self._weight())), self.bias[first:last])

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    def _weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scale, self.sums)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), with the bias."""
        return self.run(x.flatten(0, -2), self.bias).unflatten(0, x.shape[:-1])

    def run(self, x: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
        """(T, K) -> (T, N): act(x weight^T + bias)."""
        self._observe(x)
        return linear_int8(x, self._weight(), bias, activation=activation, input_range=self.input_range)

    def feed_forward(self, x: Tensor, down: Int8Linear, activation: str) -> Tensor:
        """(T, K) -> (T, down.out_features): act(x weight^T + bias) down^T, without the bias of `down`."""
        if self.observed is not None:
            return down.run(self.run(x, self.bias, activation), None)
        self._check()
        return feed_forward_int8(
            x,
            self._weight(),
            self.bias,
            down._weight(),
            activation=activation,
            up_range=self.input_range,
            down_range=down.input_range,
        )

    def _check(self) -> None:
        if self.training:
            raise ValueError("the model's linear layers are int8 and can't be trained; call model.eval() first")

    def _observe(self, x: Tensor) -> None:
        self._check()
        if self.observed is not None and x.numel():
            low, high = (float(bound) for bound in torch.aminmax(x.detach()))
            self.observed = min(low, self.observed[0]), max(high, self.observed[1])

    def observe(self) -> None:
        """Begin to note the smallest and the largest input."""
        self.observed, self.input_range = (float("inf"), -float("inf")), None

    def calibrated(self) -> None:
        """Quantize inputs within what was noted from now on; by token as before where nothing was."""
        assert self.observed is not None
        low, high = self.observed
        self.input_range = torch.tensor([low, high], device=self.values.device) if low <= high else None
        self.observed = None

    def _save_to_state_dict(self, *_: Any) -> None:
        raise ValueError(
            "the model's linear layers are int8 and no longer have the float weights that a checkpoint holds; save the "
            "model before bert_fast.quantize and quantize it after loading, which takes a second"
        )

    def extra_repr(self) -> str:
        how = "by token" if self.input_range is None else "calibrated"
        return f"in_features={self.in_features}, out_features={self.out_features}, activations {how}"
