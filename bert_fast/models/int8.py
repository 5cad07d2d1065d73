"""The linear layer of a quantized model, and its tensors in a checkpoint."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.kernels import Int8Weight, feed_forward_int8, linear_int8, quantize_weight
from bert_fast.kernels._common import extensions
from bert_fast.kernels._common.checks import compute_dtype
from bert_fast.kernels.linear_int8.cpu_backends import weight_limit

QUANT_METHOD = "bert_fast"
# The layers of a BertLayer that are quantized.
ENCODER_LINEARS = ("attention.self.qkv", "attention.output.dense", "intermediate.dense", "output.dense")
VALUES, SCALE, RANGE = "weight_int8", "weight_scale", "input_range"  # names in a checkpoint; bias has its own


class CheckpointState(OrderedDict[str, Tensor]):
    """The destination of a state_dict for a checkpoint, which may have INT8 tensors; others may not."""


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
    def from_linears(cls, linears: Sequence[nn.Linear], limit: int | None = None) -> Int8Linear:
        """Quantize one nn.Linear, or several that read the same input, concatenated along the output features.

        Args:
            limit: see `quantize_weight`.
        """
        with torch.no_grad():
            bias = torch.cat([linear.bias for linear in linears])
            return cls(quantize_weight(torch.cat([linear.weight for linear in linears]), limit=limit), bias)

    @classmethod
    def empty_like(cls, linear: nn.Linear, *, calibrated: bool) -> Int8Linear:
        """A layer of the size of `linear`, on its device, whose tensors are to be set by `load`."""
        vector = torch.empty_like(linear.bias, dtype=torch.float32, requires_grad=False)
        values = torch.empty_like(linear.weight, dtype=torch.int8, requires_grad=False)
        layer = cls(Int8Weight(values, vector, torch.empty_like(vector)), linear.bias.detach())
        layer.input_range = vector.new_empty(2) if calibrated else None
        return layer

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

    def run(
        self, x: Tensor, bias: Tensor | None, activation: str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """act(x weight^T + bias): (T, K) -> (T, N) in `dtype`, by default that of `x`."""
        self._check_eval()
        if self.observed_range is not None and x.numel():
            low, high = (float(bound) for bound in torch.aminmax(x.detach()))
            self.observed_range = min(low, self.observed_range[0]), max(high, self.observed_range[1])
        how: dict[str, Any] = {"activation": activation, "input_range": self.input_range, "out_dtype": dtype}
        return linear_int8(x, self._weight(), bias, **how)

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

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """The tensors that a checkpoint has of this layer; `sums` follow from them."""
        tensors = {VALUES: self.values, SCALE: self.scale, "bias": self.bias}
        return tensors if self.input_range is None else {**tensors, RANGE: self.input_range}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if not isinstance(destination, CheckpointState):
            raise ValueError(
                "the model's linear layers are INT8 and have no float weights, which a state_dict holds; a bert_fast "
                "model writes them by save_pretrained"
            )
        destination.update({prefix + name: x for name, x in self.checkpoint_tensors().items()})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """As nn.Module's, but scale, sums and range stay float32, as half of the digits of a scale would change x."""
        names = ("scale", "sums", "input_range")
        precise = {name: x for name in names if (x := getattr(self, name)) is not None}
        super()._apply(fn, recurse)
        for name, x in precise.items():
            if (new := getattr(self, name)).dtype != x.dtype:
                setattr(self, name, x.to(new.device))
        return self

    def extra_repr(self) -> str:
        how = "by token" if self.input_range is None else "calibrated"
        return f"in_features={self.in_features}, out_features={self.out_features}, activations {how}"


def attention_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype of the queries, keys and values that INT8 layers compute from `x`; None for that of `x`.

    bfloat16 in place of float32 where the CPU multiplies that faster: its rounding, by up to 2^-9 of a value, is small
    beside the steps of 1/255 of a token's range in which the layer before reads its inputs.
    """
    precise = compute_dtype(x) == torch.float32 and x.device.type == "cpu"
    return torch.bfloat16 if precise and extensions.cpu_isa() == "avx512bf16" else None


def check_stored(stored: Mapping[str, Tensor]) -> None:
    """Check the tensors that a checkpoint has of INT8 layers, whose shapes are compared with the model's elsewhere.

    Raises:
        ValueError: a dtype is another than was saved, a scale is negative or not finite, or a range is not finite or
            ends below its start.
    """
    dtypes = {VALUES: torch.int8, SCALE: torch.float32, RANGE: torch.float32}
    for layer in (name.removesuffix(f".{VALUES}") for name in stored if name.endswith(f".{VALUES}")):
        for name, dtype in (
            (f"{layer}.{kind}", dtype) for kind, dtype in dtypes.items() if f"{layer}.{kind}" in stored
        ):
            x = stored[name]
            if x.dtype != dtype:
                given, expected = (str(each).removeprefix("torch.") for each in (x.dtype, dtype))
                raise ValueError(
                    f"{name} is {given} in the checkpoint; expected {expected} (of quantized checkpoints, those of "
                    "bert_fast.quantize are supported)"
                )
            if name.endswith(f".{SCALE}"):
                _check_each(name, x, x.isfinite() & (x >= 0), "a finite number of at least 0")
            elif name.endswith(f".{RANGE}"):
                _check_each(name, x, x.isfinite(), "a finite number")
                if x.shape == (2,) and x[0] > x[1]:
                    raise ValueError(f"{name} is {x.tolist()} in the checkpoint; expected the lowest input first")


def _check_each(name: str, x: Tensor, valid: Tensor, expected: str) -> None:
    """ValueError that names the first element of `x` that is not `valid`."""
    if not valid.all():
        index = (~valid).nonzero()[0].tolist()
        raise ValueError(f"{name}{index} is {x[tuple(index)].item()} in the checkpoint; expected {expected}")


def is_quantized(stored: Mapping[str, Tensor]) -> bool:
    """Whether the tensors of a checkpoint are those of a model that `bert_fast.quantize` made."""
    return any(name.endswith(f".{VALUES}") for name in stored)


def int8_layers(model: nn.Module) -> dict[str, Int8Linear]:
    """The INT8 layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What config.json says of a quantized model as `quantization_config`; None for a float model.

    It has no `quant_method` on purpose: transformers refuses a folder whose quantization has none, but loads one of a
    method that it doesn't know with random weights and a warning.

    Raises:
        ValueError: some of its layers are calibrated and some are not.
    """
    layers = int8_layers(model)
    if not layers:
        return None
    if len(calibrated := {layer.input_range is not None for layer in layers.values()}) > 1:
        raise ValueError("some INT8 layers of the model are calibrated and some are not; expected all or none")
    largest = max(_largest(layer.values) for layer in layers.values())
    return {
        "method": QUANT_METHOD,
        "bits": 8,
        "largest_weight": largest,
        "activations": "calibrated" if calibrated.pop() else "by token",
    }


def _largest(values: Tensor) -> int:
    return int(values.to(torch.int16).abs().max()) if values.numel() else 0


def prepare(layer: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Replace the linear layers of a BertLayer by INT8 ones without values."""
    calibrated = any(name.endswith(f".{RANGE}") for name in stored)
    for name in ENCODER_LINEARS:
        parent, _, child = name.rpartition(".")
        module = layer.get_submodule(parent)
        setattr(module, child, Int8Linear.empty_like(getattr(module, child), calibrated=calibrated))


def finish(model: nn.Module, source: object) -> None:
    """Derive what a checkpoint doesn't have, once the tensors that it has are set.

    Raises:
        ValueError: a value is too large for this CPU to multiply without saturation.
    """
    limit = weight_limit()
    for name, layer in int8_layers(model).items():
        if layer.values.device.type == "cpu" and (largest := _largest(layer.values)) > limit:
            raise ValueError(
                f"{source}: the INT8 weight of {name} has values up to {largest} in magnitude, and this CPU multiplies "
                f"up to {limit} exactly; quantize the float model with bert_fast.quantize(model, limit={limit})"
            )
        layer.sums.copy_(layer.values.sum(1, dtype=torch.int64))
