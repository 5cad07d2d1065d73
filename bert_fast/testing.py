"""The three-way test: an implementation, the eager reference in the same dtype, and the reference in float64.

    error(implementation vs float64) <= 2 x error(eager vs float64) + floor(dtype)

A fixed tolerance would have to be guessed for every operation and size; this bound asks that a fused kernel is no
further from the truth than twice what ordinary PyTorch is. The floor covers results that eager PyTorch happens to
hit exactly: one unit in the last place of the largest value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bert_fast.kernels  # noqa: F401  (fills OPS)
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.kernels._common.library import simulated

FLOOR_ULPS = 1.0  # of the largest magnitude: one rounding of the output, and the order of additions
FACTOR = 2.0


class Comparison(NamedTuple):
    """Largest absolute errors against float64 of one output or gradient, and the bound that `ours` has to keep."""

    name: str
    ours: float
    eager: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.bound


def targets(
    op: str,
    cases: Sequence[tuple[Any, ...]] = ((),),
    *,
    interpreted: Sequence[tuple[Any, ...]] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
) -> list[tuple[Any, ...]]:
    """What to parametrise a test over: every implementation of `op` to be tested here, on its device, every case.

    Returns (impl, device, *case), or (impl, device, dtype, *case) where `dtypes` are given, for those that the
    implementation takes.

    The reference is among them on a GPU only: on the CPU it is what the others are held to.

    Args:
        op: the op's name.
        cases: tuples to test on; one empty one where there are none.
        interpreted: the cases for Triton's interpreter, which takes a millisecond a program and more, and for the CUDA
            kernels' emulator, which takes about as long for a block; None for `cases`.
        dtypes: to test in.
    """
    found: list[tuple[Any, ...]] = []
    for impl, slot in OPS[op].impls.items():
        device = slot.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not slot.availability.ok or (impl, device) == ("reference", "cpu"):
            continue
        for case in interpreted if simulated(impl) and interpreted is not None else cases:
            if dtypes is None:
                found.append((impl, device, *case))
            else:
                found += [(impl, device, d, *case) for d in dtypes if slot.dtypes is None or d in slot.dtypes]
    return found


def operators(impl: str) -> Any:
    """The namespace of torch.ops that holds the operators of `impl`."""
    namespaces = {"triton": "bert_fast_triton", "cuda": "bert_fast_cuda"}
    return getattr(torch.ops, namespaces.get(impl, "bert_fast"))


def max_error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; infinite where one is not finite and the other is, 0 for empty tensors."""
    if x.shape != truth.shape:
        return float("inf")
    if not x.numel():
        return 0.0
    difference = (x.detach().double() - truth.detach().double()).abs()
    return float(difference.nan_to_num(nan=float("inf")).max())


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    douts: tuple[Tensor, ...],
) -> dict[str, Tensor]:
    """Run `function(**inputs)` forward and backward on copies of the inputs cast to `dtypes`.

    Args:
        function: returns one tensor or a tuple of them, as many as `douts`.
        inputs: floating-point tensors get gradients, others are passed on.
        dtypes: the dtype for each floating-point input.
        douts: the gradient of each output, cast to the output's dtype.

    Returns:
        {"out", "out1", ... , "d<input>", ...}
    """
    leaves = {
        name: x.detach().to(dtypes[name]).requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()
    }
    outs = function(**leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    torch.autograd.backward(outs, [dout.to(out.dtype) for out, dout in zip(outs, douts, strict=True)])
    results = {f"out{index or ''}": out.detach() for index, out in enumerate(outs)}
    for name, leaf in leaves.items():
        if leaf.is_floating_point():
            assert leaf.grad is not None, f"{name} got no gradient"
            results[f"d{name}"] = leaf.grad
    return results


def three_way(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    douts: tuple[Tensor, ...],
    *,
    parameter_dtype: torch.dtype | None = None,
    parameters: tuple[str, ...] = (),
    factor: float = FACTOR,
    floor_ulps: float = FLOOR_ULPS,
) -> list[Comparison]:
    """Compare outputs and every gradient of `ours` with `reference` in `dtype` and in float64.

    Args:
        ours, reference: called with `inputs` as keywords, cast to `dtype` (the names in `parameters` to
            `parameter_dtype` where given); the truth is `reference` in float64 on the same rounded values.
        factor: how many times eager PyTorch's error ours may be: 2 for one operation, 3 for a model.
        floor_ulps: the floor, in units in the last place of the largest value.
    """
    low = {name: dtype for name, x in inputs.items() if x.is_floating_point()}
    low.update({name: parameter_dtype for name in parameters if parameter_dtype is not None})
    rounded = {name: x.to(low[name]) if name in low else x for name, x in inputs.items()}
    rounded_douts = tuple(dout.to(dtype) for dout in douts)
    truth = outputs_and_gradients(reference, rounded, dict.fromkeys(low, torch.float64), rounded_douts)
    found = outputs_and_gradients(ours, rounded, low, rounded_douts)
    eager = outputs_and_gradients(reference, rounded, low, rounded_douts)
    return [compare(name, found[name], eager[name], truth[name], factor, floor_ulps) for name in truth]


def compare(
    name: str,
    ours: Tensor,
    eager: Tensor,
    truth: Tensor,
    factor: float = FACTOR,
    floor_ulps: float = FLOOR_ULPS,
) -> Comparison:
    """One row of the three-way test."""
    scale = float(truth.abs().max()) if truth.numel() else 0.0
    floor = floor_ulps * torch.finfo(eager.dtype).eps * scale
    eager_error = max_error(eager, truth)
    return Comparison(name, max_error(ours, truth), eager_error, factor * eager_error + floor)


def assert_three_way(comparisons: list[Comparison]) -> None:
    """AssertionError that names each output or gradient over its bound."""
    wrong = [c for c in comparisons if not c.ok]
    assert not wrong, "; ".join(
        f"{c.name}: error {c.ours:.3g} > {c.bound:.3g} (eager PyTorch: {c.eager:.3g})" for c in wrong
    )
