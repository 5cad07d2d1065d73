"""What tools know about an op, described once in `kernels/<op>/cases.py` (in the manner of PyTorch's OpInfo).

`bert-fast verify`, tests/kernels/test_contract.py, the compile reports, the sanitizer run and the benchmarks iterate
over these descriptions; none of them describes an op a second time.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Fn = Callable[..., Any]


@dataclass(frozen=True)
class Sample:
    """One valid call of an op.

    Args:
        name: the edge that the sample covers.
        call: called with `inputs` as keywords and impl=...; returns a tensor or a tuple of tensors.
        inputs: CPU tensors; floating-point ones are float64 and are cast to the dtype under test.
        parameters: names of the inputs that stay float32 in a low precision, as weights do under autocast.
        gradients: False for an op without a gradient.
        mean_of: number of rows that the only output is the float32 mean of, 0 if it is none: each row may be off by one
            unit in the last place of the dtype under test, independently, so the bound gets eps / sqrt(rows).
    """

    name: str
    call: Fn
    inputs: Mapping[str, Tensor]
    parameters: tuple[str, ...] = ()
    gradients: bool = True
    mean_of: int = 0


@dataclass(frozen=True)
class Malformed:
    """One invalid call of the public function and the error it raises: `match` is a regular expression."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class Benchmark:
    """One size of an op to time.

    Args:
        name: shape, dtype, pass and options.
        call: called with `inputs` as positional arguments and impl=...; returns a tensor.
        inputs: tensors on the device; floating-point ones get gradients where `which` includes the backward pass.
        dout: the gradient of the output.
        which: "forward", "backward" or "forward + backward".
        peers: other ways to compute the same, by name; called with `inputs`. Ours are not among them.
        traffic: bytes that must be read and written (the floor).
        flops: floating-point operations that must be done (the floor).
        tolerance: on the largest absolute error over the largest value of the float64 result.
        comparable_peers: False where the peers' results are random (dropout masks of their own).
    """

    name: str
    call: Fn
    inputs: Sequence[Tensor]
    dtype: torch.dtype
    dout: Tensor | None = None
    which: str = "forward"
    peers: Mapping[str, Fn] = field(default_factory=dict)
    traffic: int = 0
    flops: int = 0
    tolerance: float = 0.0
    comparable_peers: bool = True


@dataclass(frozen=True)
class OpCases:
    """The one description of an op.

    Args:
        op: its name.
        samples: small valid calls, with the edges: `bert-fast verify`, the contract tests and the sanitizer run them.
        malformed: invalid calls of the public function, with the error expected.
        hostile: (operators, device) -> calls of the raw operators with wrong values (indices, lengths): they may raise,
            but must not read or write memory that is not theirs. The sanitizer runs them.
        launches: calls the op's Triton launchers on meta tensors in every configuration that dispatch can choose; the
            compile report records what they launch.
        extra: (impl, device): launches that the samples are too small for; the sanitizer runs it.
    """

    op: str
    samples: Callable[[], list[Sample]]
    malformed: Callable[[], list[Malformed]]
    hostile: Callable[[Any, str], list[Callable[[], Any]]] | None = None
    launches: Callable[[], None] | None = None
    extra: Callable[[str, str], None] | None = None


def load(op: str) -> OpCases:
    """The cases of the op named `op`.

    Raises:
        ModuleNotFoundError: there is no such op.
    """
    cases: OpCases = importlib.import_module(f"bert_fast.kernels.{op}.cases").CASES
    return cases
