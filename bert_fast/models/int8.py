"""The linear layer of a quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.kernels import Int8Weight, feed_forward_int8, linear_int8, quantize_weight


class Int8Linear(nn.Module):
    """An nn.Linear with INT8 weights, for inference on the CPU.

    Activations are quantized by token, or within `input_range` (2,) once a calibration has set it.
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
        self.observed_range: tuple[float, float] | None = None  # of the inputs, during a calibration
        self.concatenated: Int8Linear | None = None  # on the first of several that read the same input: all in one

    @classmethod
    def from_linears(cls, linears: Sequence[nn.Linear]) -> Int8Linear:
        """Quantize one nn.Linear, or several that read the same input, concatenated along the output features."""
        with torch.no_grad():
            bias = torch.cat([linear.bias for linear in linears])
            return cls(quantize_weight(torch.cat([linear.weight for linear in linears])), bias)

    def slice_outputs(self, start: int, stop: int) -> Int8Linear:
        """The layer of the output features from `start` to below `stop`; the memory is shared."""
        return Int8Linear(Int8Weight(*(x[start:stop] for x in self._weight())), self.bias[start:stop])

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    def _weight(self) -> Int8Weight:
        return Int8Weight(self.values, self.scale, self.sums)

    def forward(self, x: Tensor) -> Tensor:
        """x weight^T + bias: (..., K) -> (..., N)."""
        return self.run(x.flatten(0, -2), self.bias).unflatten(0, x.shape[:-1])

    def run(self, x: Tensor, bias: Tensor | None, activation: str | None = None) -> Tensor:
        """act(x weight^T + bias): (T, K) -> (T, N)."""
        self._check_eval()
        if self.observed_range is not None and x.numel():
            low, high = (float(bound) for bound in torch.aminmax(x.detach()))
            self.observed_range = min(low, self.observed_range[0]), max(high, self.observed_range[1])
        return linear_int8(x, self._weight(), bias, activation=activation, input_range=self.input_range)

    def feed_forward(self, x: Tensor, down: Int8Linear, activation: str) -> Tensor:
        """act(x weight^T + bias) down^T, without the bias of `down`: (T, K) -> (T, down.out_features)."""
        if self.observed_range is not None:
            return down.run(self.run(x, self.bias, activation), None)
        self._check_eval()
        return feed_forward_int8(
            x,
            self._weight(),
            self.bias,
            down._weight(),
            activation=activation,
            up_range=self.input_range,
            down_range=down.input_range,
        )

    def _check_eval(self) -> None:
        if self.training:
            raise ValueError("the model's linear layers are INT8 and can't be trained; call model.eval() first")

    def begin_calibration(self) -> None:
        """Record the range of the inputs from now on."""
        self.observed_range, self.input_range = (float("inf"), -float("inf")), None

    def end_calibration(self) -> None:
        """Quantize inputs within the recorded range from now on; by token where no input came."""
        assert self.observed_range is not None
        low, high = self.observed_range
        self.input_range = torch.tensor([low, high], device=self.values.device) if low <= high else None
        self.observed_range = None

    def _save_to_state_dict(self, *_: Any) -> None:
        raise ValueError(
            "the model's linear layers are INT8 and have no float weights, which a checkpoint holds; save the model "
            "before bert_fast.quantize and quantize it after loading, which takes a second"
        )

    def extra_repr(self) -> str:
        how = "by token" if self.input_range is None else "calibrated"
        return f"in_features={self.in_features}, out_features={self.out_features}, activations {how}"
