"""`bert-fast verify`: whether every implementation computes the right thing on this machine.

Each sample of each op (`kernels/<op>/cases.py`) takes the three-way test of `bert_fast.testing`: outputs and every
gradient against the reference in float64. It takes seconds wherever the package is installed; the tests cover more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bert_fast.kernels  # noqa: F401  (fills OPS)
from bert_fast.kernels._common import cases, records
from bert_fast.kernels._common.cases import Sample
from bert_fast.kernels._common.dispatch import OPS, known_impls
from bert_fast.testing.three_way import Comparison, sample_triples

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Result:
    """The comparisons of one case; `error` instead where it raised."""

    op: str
    impl: str
    device: str
    dtype: str
    case: str
    comparisons: tuple[Comparison, ...]
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error and all(comparison.ok for comparison in self.comparisons)

    @property
    def worst(self) -> Comparison | None:
        """The output or gradient that is nearest to its bound, or furthest over it."""
        return max(self.comparisons, key=lambda c: c.ours / c.bound if c.bound else c.ours, default=None)


class Part(NamedTuple):
    """What one process can verify independently of others: an implementation of an op on a device in a dtype."""

    op: str
    impl: str
    device: str
    dtype: torch.dtype


def parts(ops: list[str] | None = None, impls: list[str] | None = None) -> list[Part]:
    """Every available implementation of `ops` in every dtype on every device of this machine.

    Args:
        ops: names of ops; None for all.
        impls: names of implementations; None for all that are available.

    Raises:
        ValueError: a name is unknown.
    """
    for name, requested, known in (("ops", ops, sorted(OPS)), ("impls", impls, known_impls())):
        unknown = sorted(set(requested or []) - set(known))
        if unknown:
            raise ValueError(f"{name} has {', '.join(unknown)}; expected some of {', '.join(known)}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [
        Part(op, impl, device, dtype)
        for op in ops or sorted(OPS)
        for impl, implementation in OPS[op].impls.items()
        if implementation.availability.ok and (impls is None or impl in impls)
        for device in devices
        if implementation.device in (None, device)
        for dtype in DTYPES
        if implementation.dtypes is None or dtype in implementation.dtypes
    ]


def verify(ops: list[str] | None = None, impls: list[str] | None = None, seed: int = 0) -> Iterator[Result]:
    """Run the `parts` of `ops` and `impls` one after the other, with inputs from `seed`."""
    for part in parts(ops, impls):
        yield from verify_part(part, seed)


def record(results: list[Result]) -> Path:
    """Write the passing runs on this machine's GPU, for `auto` to rely on; returns the file.

    In a checkout the file is part of the project (bert_fast/verified), else it is in the user's cache. An
    implementation is recorded when every one of its cases passed, and removed from the file when one failed.

    Raises:
        ValueError: there is no result of a GPU kernel.
    """
    runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if (
            result.device == "cuda"
            and result.impl in records.RECORDED
            and not OPS[result.op].impls[result.impl].built_on
        ):
            runs.setdefault((result.op, result.impl), []).append(result)
    if not runs:
        raise ValueError(
            "nothing to record: records are of Triton and CUDA kernels on a CUDA device, and none of them ran here"
        )
    passed = {
        key: [_entry(result) for result in group] if all(result.ok for result in group) else None
        for key, group in runs.items()
    }
    return records.write(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), passed)


def _entry(result: Result) -> dict[str, Any]:
    worst = result.worst
    assert worst is not None
    return {
        "case": result.case,
        "dtype": result.dtype,
        "worst": worst.name,
        "error": float(f"{worst.ours:.3g}"),
        "bound": float(f"{worst.bound:.3g}"),
    }


def verify_part(part: Part, seed: int = 0) -> Iterator[Result]:
    """Every sample of the op; one that raises gives a failed result."""
    op, impl, device, dtype = part
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for sample in cases.load(op).samples():
            row = (op, impl, device, str(dtype).removeprefix("torch."), sample.name)
            try:
                yield Result(*row, tuple(compare_sample(sample, impl, device, dtype)))
            except Exception as error:  # an implementation that raises is a failed row, not the end of the table
                yield Result(*row, (), f"{type(error).__name__}: {error}")


def compare_sample(sample: Sample, impl: str, device: str, dtype: torch.dtype) -> list[Comparison]:
    """The three-way test of `impl` on `sample` in `dtype`: each output and gradient."""
    return [comparison for _, comparison in sample_triples(sample, impl, device, dtype).values()]
