"""What `kernels/<op>/cases.py` says of an op's speed: the sizes to time, the peers, and the work that must be done.

`bert-fast bench kernels <op>` runs these descriptions: it makes one benchmark at a time, several times with other
inputs, compares every variant with the float64 result and times those that match it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.times import Size

Fn = Callable[..., Any]
FULL = 0.23  # share of the sequences that have the full length in `half_filled`
MEAN = 254 / 512  # mean length over the full length in `half_filled`


def first(result: Any) -> Tensor:
    """An output itself; the first of several gradients."""
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


@dataclass(frozen=True)
class Peer:
    """Another way to compute a benchmark.

    Args:
        call: called with `inputs` as positional arguments; raises where it does not support the case.
        inputs, dout: in the peer's own layout or dtype; None for those of the benchmark.
        result: maps the output, or the tuple of gradients, to the tensor that is compared; not timed.
        comparable: False where the result is random (dropout with a mask of the peer's own).
        precision: where it isn't that of the benchmark's dtype: "int8".
    """

    call: Fn
    inputs: Sequence[Tensor] | None = None
    dout: Tensor | None = None
    result: Callable[[Any], Tensor] = first
    comparable: bool = True
    precision: str = ""


@dataclass(frozen=True)
class Benchmark:
    """One size of an op to time.

    Args:
        call: called with `inputs` as positional arguments and impl=...; returns a tensor.
        inputs: on the device; floating-point ones get gradients where `which` includes the backward pass.
        peers: other ways to compute the same, by name.
        tolerance: on the largest absolute error over the largest value of the exact result.
        dtype: chooses our implementations, and the matrix product whose speed is the ceiling.
        which: "forward", "backward" or "forward + backward".
        dout: gradient of the output.
        exact: returns the result in float64; None for that of the reference on `inputs` in float64.
        traffic: bytes that must be read and written.
        flops: floating-point operations that must be done.
        result: maps the output, or the tuple of gradients, to the tensor that is compared; not timed.
        graph: False where `call` waits for the device, so that it cannot be captured in a CUDA graph.
        also: further inputs to time our implementations with, by the suffix of the variant's name.
        precision: of our implementations where it isn't that of `dtype`: "int8".
        length: of the longest sequence; 0 for the number of rows of the first input.
        size: that `call` gives to `Op.select`, in ops with several GPU implementations: what a record has the time of.
    """

    call: Fn
    inputs: Sequence[Tensor]
    peers: Mapping[str, Peer]
    tolerance: float
    dtype: torch.dtype = torch.float32
    which: str = "forward"
    dout: Tensor | None = None
    exact: Callable[[], Tensor] | None = None
    traffic: int = 0
    flops: int = 0
    result: Callable[[Any], Tensor] = first
    graph: bool = True
    also: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    precision: str = ""
    length: int = 0
    size: Size | None = None


class ModelCall(NamedTuple):
    """What an op is called with in a model: the sizes of the model, the lengths of the batch, dtype, pass, dropout."""

    hidden: int
    intermediate: int
    heads: int
    lengths: list[int]
    dtype: torch.dtype
    which: str
    dropout_p: float


class Plan(NamedTuple):
    """A benchmark by name; `make` allocates its tensors, so that only one benchmark at a time is in memory."""

    name: str
    make: Callable[[], Any]


def eager_and_compiled(call: Fn, **options: Any) -> dict[str, Peer]:
    """`call` as it is, and through torch.compile; `options` are those of `Peer`."""
    return {"eager": Peer(call, **options), "torch.compile": Peer(torch.compile(call, dynamic=False), **options)}


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values on the device, drawn in float32 and rounded to `dtype`."""
    return torch.randn(shape, device=device).to(dtype)


def autocast_parameters(parameters: Sequence[Tensor]) -> list[Tensor]:
    """The parameters that our kernels get: float32 on a GPU, as in a model under autocast; unchanged on a CPU."""
    return [parameter.float() if parameter.is_cuda else parameter for parameter in parameters]


def rng_state(device: torch.device) -> Tensor:
    """A fixed state of the dropout generator, so that drawing one is not timed."""
    return torch.tensor([1234, 5678], device=device)


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def half_filled(batch: int, seqlen: int, seed: int = 0) -> list[int]:
    """`batch` lengths: 23 % of them `seqlen`, the others evenly spaced so that the mean is 254/512 of it, shuffled.

    These are the lengths of BERT's second phase in the MLPerf data.
    """
    full = round(FULL * batch)
    rest = batch - full
    mean = (MEAN * seqlen * batch - full * seqlen) / rest
    low, high = 1.0, 2 * mean - 1
    lengths = [seqlen] * full
    lengths += [round(low + (high - low) * (index + 0.5) / rest) for index in range(rest)]
    random.Random(seed).shuffle(lengths)
    return lengths


def evenly_spaced(batch: int, shortest: int, longest: int) -> list[int]:
    """`batch` lengths from `shortest` to `longest`, rounded down."""
    return [shortest + (longest - shortest) * index // max(1, batch - 1) for index in range(batch)]
