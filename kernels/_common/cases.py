"""The description of an op for tools, in `kernels/<op>/cases.py` (in the manner of PyTorch's OpInfo).

`bert-fast verify`, tests/kernels/test_contract.py, the compile reports, the sanitizer run and the benchmarks iterate
over these descriptions; none of them describes an op a second time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.benchmarks import Benchmark, ModelCall, Plan
from bert_fast.kernels._common.mistakes import MaskProbe

Fn = Callable[..., Any]
Lengths = Sequence[int] | None
LENGTHS = (1, 2, 63, 64, 65, 0, 127, 33)  # around the sizes of vectors and tiles, and an empty sequence
E, F, N, D, V = 128, 512, 2, 32, 1000  # sizes of the samples: width, feed-forward width, heads, head dim, vocabulary
DROPOUT = 0.1
# Of the configurations that `launches` compiles: rows that are a multiple of no tile, and the BERT family's widths.
TOKENS, WIDTHS = 8192 + 7, (128, 256, 384, 512, 768, 1024)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
        float32_ulps: floor of the bound in float32, in units in the last place of the largest value. There the whole
            error is the order of additions, in eager PyTorch too, and which order is better is luck. A sum of K
            products of random sign grows as sqrt(k), and its k-th addition rounds by eps * sqrt(k / 12) on average
            (uniform within half a unit): in all by sqrt(K / 24) units of a typical sum, times the number of matrix
            products in sequence. Over thousands of sums the worst error and the largest value are both a few times the
            typical one.
    """

    name: str
    call: Fn
    inputs: Mapping[str, Tensor]
    parameters: tuple[str, ...] = ()
    gradients: bool = True
    mean_of: int = 0
    float32_ulps: float = 1.0

    def cast(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
        """The inputs on `device`: floating-point ones in `dtype`, or float32 where they are `parameters` and stay so.

        In float64 the parameters are float64 too.
        """
        low = torch.finfo(dtype).bits < 32
        return {
            name: x.to(device, torch.float32 if low and name in self.parameters else dtype)
            if x.is_floating_point()
            else x.to(device)
            for name, x in self.inputs.items()
        }


@dataclass(frozen=True)
class Malformed:
    """One invalid call of the public function and the error it raises: `match` is a regular expression."""

    name: str
    call: Callable[[], Any]
    error: type[Exception]
    match: str


@dataclass(frozen=True)
class OpCases:
    """The one description of an op.

    Args:
        op: its name.
        samples: small valid calls, with the edges: `bert-fast verify`, the contract tests and the sanitizer run them.
            samples(lengths) has sequences of those lengths instead of its own, and small weights: for simulators, or
            an empty batch. Called under a fixed seed.
        malformed: invalid calls of the public function, with the error expected.
        hostile: (operators, device) -> calls of the raw operators with wrong values (indices, lengths): they may raise,
            but must not read or write memory that is not theirs. The sanitizer runs them.
        launches: calls the op's Triton launchers on meta tensors in every configuration that dispatch can choose; the
            compile report records what they launch.
        extra: (impl, device): launches that the samples are too small for; the sanitizer runs it.
        mistakes: what wrong kernels compute, by the mistake (`mistakes.py`), each as `register` takes a kernel.
        mask_probe: a call that shows the dropout mask; None without dropout.
        benchmarks: (device, quick) -> what `bert-fast bench kernels` times there, the most important first;
            fewer sizes if quick is True.
        in_model: (device, call) -> what `bert-fast tune` times: the op's calls in a layer of a model, by name; of the
            ops that give their size to `Op.select`.
    """

    op: str
    samples: Callable[..., list[Sample]]
    malformed: Callable[[], list[Malformed]]
    hostile: Callable[[Any, str], list[Callable[[], Any]]] = lambda operators, device: []
    launches: Callable[[], None] = lambda: None
    extra: Callable[[str, str], None] = lambda impl, device: None
    mistakes: Mapping[str, Any] = field(default_factory=dict)
    mask_probe: MaskProbe | None = None
    benchmarks: Callable[[torch.device, bool], list[Plan]] = lambda device, quick: []
    in_model: Callable[[torch.device, ModelCall], dict[str, Callable[[], Benchmark]]] | None = None


def randn(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal float64 values times `scale`."""
    return scale * torch.randn(*shape, dtype=torch.float64)


def with_dropout(sample: Sample) -> list[Sample]:
    """`sample` without dropout and with it; its name follows "no dropout" or "dropout 0.1"."""
    rng_state = torch.tensor([1234, 5678])
    call = functools.partial(sample.call, dropout_p=DROPOUT)
    return [
        replace(sample, name=f"no dropout{sample.name}"),
        replace(
            sample, name=f"dropout {DROPOUT}{sample.name}", call=call, inputs={**sample.inputs, "rng_state": rng_state}
        ),
    ]


def malformed_calls(
    call: Fn, valid: Mapping[str, Any], changes: Mapping[str, tuple[Mapping[str, Any], type[Exception], str]]
) -> list[Malformed]:
    """`call(**valid)` with some arguments changed: by name, the changes, the error and its message's pattern."""
    return [
        Malformed(name, functools.partial(call, **{**valid, **changed}), error, match)
        for name, (changed, error, match) in changes.items()
    ]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def launchers(op: str) -> Any:
    """The module of the op's Triton launchers; imports triton."""
    return importlib.import_module(f"bert_fast.kernels.{op}.triton")


def invalid_ids(size: int, device: str, count: int = 67) -> Tensor:
    """`count` ids into `size` rows, some of them negative, some at or beyond `size`, some beyond 2^31."""
    ids = torch.arange(count) % size
    ids[1::7], ids[2::7], ids[3::7], ids[4::7] = -1, size, 2**31 + 5, -(2**40)
    return ids.to(device)


def load(op: str) -> OpCases:
    """The cases of the op named `op`.

    Raises:
        ModuleNotFoundError: there is no such op.
    """
    cases: OpCases = importlib.import_module(f"bert_fast.kernels.{op}.cases").CASES
    return cases
