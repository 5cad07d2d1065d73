"""The one place that launches Triton kernels, so that `benchmarks.reports.compile_report` can record the launches.

While recording, nothing runs: the launchers are called with tensors on the meta device and every launch is recorded
with its arguments. So the report compiles exactly the configurations that the launchers choose.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common import records
from bert_fast.kernels._common.dispatch import device_family


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name (constexprs among them), and its options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


_recorded: list[Launch] | None = None
# The architecture that launchers choose for while recording and on the CPU, in Triton's interpreter.
_assumed = 90


@contextmanager
def recording(architecture: int = 90) -> Iterator[list[Launch]]:
    """Within the block launches are appended to the list instead of being run.

    Args:
        architecture: the compute capability that the launchers choose for, such as 90.
    """
    global _recorded
    _recorded = []
    try:
        with assumed_architecture(architecture):
            yield _recorded
    finally:
        _recorded = None


@contextmanager
def assumed_architecture(architecture: int) -> Iterator[None]:
    """Within the block `family` answers for this compute capability where the device is not a GPU."""
    global _assumed
    before, _assumed = _assumed, architecture
    try:
        yield
    finally:
        _assumed = before


def family(device: torch.device) -> int:
    """The matrix instructions of `device`, as `records.family` numbers them."""
    return device_family(device) if device.type == "cuda" else records.family(_assumed // 10)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
    **constexprs: Any,
) -> None:
    """Run `kernel` over `grid` on the device of its first tensor argument; an empty grid runs nothing.

    Args:
        kernel: a function decorated with @triton.jit.
        grid: one to three sizes; only the first may exceed 2^16.
        arguments: the kernel's arguments that are not constexpr, in order.
        num_warps, num_stages: warps of a program, stages of its software pipelining.
        maxnreg: the most registers that a thread may take, so that more programs fit an SM; None for the compiler's.
        constexprs: by name.
    """
    if 0 in grid:
        return
    if _recorded is not None:
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constexprs
        _recorded.append(Launch(kernel, grid, named, num_warps, num_stages, maxnreg))
        return
    options = {"num_warps": num_warps, "num_stages": num_stages, "maxnreg": maxnreg}
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, **options, **constexprs)
    else:
        kernel[grid](*arguments, **options, **constexprs)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def row_parts(rows: int, smallest: int = 16, most: int = 128) -> tuple[int, int]:
    """Split `rows` for a sum over rows: (parts, rows of a part), which depend on `rows` alone.

    They don't depend on the device: the order of additions, and so the bits of the sum, must not change with the number
    of SMs. 128 parts of several column blocks each occupy any current GPU.
    """
    each = max(smallest, ceil_div(rows, most))
    return ceil_div(rows, each), each


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` (T, E) itself where its rows are contiguous, with any stride between them; else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
