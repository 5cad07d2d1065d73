"""The three-way test: an implementation, the eager reference in the same dtype, and the reference in float64.

    error(implementation vs float64) <= 2 x error(eager vs float64) + floor(dtype)

A fixed tolerance would have to be guessed for every op and size; this bound requires that the error of a fused kernel
is at most twice that of eager PyTorch. The floor, one unit in the last place of the largest value, covers results that
eager PyTorch happens to hit exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import bert_fast.kernels  # noqa: F401  (fills OPS)
from bert_fast.kernels._common.cases import Sample
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.kernels._common.library import simulated

FLOOR_ULPS = 1.0  # of the largest magnitude: the rounding of the output and the order of additions
FACTOR = 2.0


class Triple(NamedTuple):
    """One output or gradient: of the implementation, of eager PyTorch in the same dtype, and in float64."""

    ours: Tensor
    eager: Tensor
    truth: Tensor


class Comparison(NamedTuple):
    """Largest absolute errors against float64 of one output or gradient, and the bound on `ours`."""

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
    """Parameters of a test: each available implementation of `op`, on its device, with each case.

    The reference is one of them on a GPU only: on the CPU the others are compared with it.

    Args:
        op: the op's name.
        cases: tuples of further parameters; by default one empty tuple.
        interpreted: the cases for Triton's interpreter and the CUDA kernels' emulator, which take a millisecond and
            more for each program or block; None for `cases`.
        dtypes: the dtypes to test, of those that an implementation takes; None for no such parameter.

    Returns:
        (impl, device, *case), or (impl, device, dtype, *case) with `dtypes`.
    """
    parameters: list[tuple[Any, ...]] = []
    for impl, implementation in OPS[op].impls.items():
        device = implementation.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if not implementation.availability.ok or (impl, device) == ("reference", "cpu"):
            continue
        for case in interpreted if simulated(impl) and interpreted is not None else cases:
            if dtypes is None:
                parameters.append((impl, device, *case))
            else:
                supported = implementation.dtypes or dtypes
                parameters += [(impl, device, dtype, *case) for dtype in dtypes if dtype in supported]
    return parameters


def operators(impl: str) -> Any:
    """The namespace of torch.ops with the operators of `impl`."""
    namespaces = {"triton": "bert_fast_triton", "cuda": "bert_fast_cuda"}
    return getattr(torch.ops, namespaces.get(impl, "bert_fast"))


def max_error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; inf where it is NaN or the shapes differ, 0 for empty tensors."""
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
        inputs: floating-point tensors get gradients, others are passed unchanged.
        dtypes: the dtype of each floating-point input.
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
        ours, reference: called with `inputs` as keywords, cast to `dtype` (those in `parameters` to `parameter_dtype`
            if it is not None); the truth is `reference` in float64 on the same rounded values.
        factor: the allowed ratio of our error to eager PyTorch's: 2 for an op, 3 for a model.
        floor_ulps: the floor, in units in the last place of the largest value.
    """
    triples = run_three_ways(
        ours, reference, inputs, dtype, douts, parameter_dtype=parameter_dtype, parameters=parameters
    )
    return [compare(name, *triple, factor, floor_ulps) for name, triple in triples.items()]


def run_three_ways(
    ours: Callable[..., Tensor | tuple[Tensor, ...]],
    reference: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    douts: tuple[Tensor, ...],
    *,
    parameter_dtype: torch.dtype | None = None,
    parameters: tuple[str, ...] = (),
) -> dict[str, Triple]:
    """The outputs and gradients that `three_way` compares; its arguments."""
    low = {name: dtype for name, x in inputs.items() if x.is_floating_point()}
    low.update({name: parameter_dtype for name in parameters if parameter_dtype is not None})
    rounded = {name: x.to(low[name]) if name in low else x for name, x in inputs.items()}
    rounded_douts = tuple(dout.to(dtype) for dout in douts)
    truth = outputs_and_gradients(reference, rounded, dict.fromkeys(low, torch.float64), rounded_douts)
    results = outputs_and_gradients(ours, rounded, low, rounded_douts)
    eager = outputs_and_gradients(reference, rounded, low, rounded_douts)
    return {name: Triple(results[name], eager[name], truth[name]) for name in truth}


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


def sample_triples(
    sample: Sample, impl: str, device: str, dtype: torch.dtype, factor: float = FACTOR, floor_ulps: float = FLOOR_ULPS
) -> dict[str, tuple[Triple, Comparison]]:
    """The three-way test of `impl` on `sample` in `dtype`: each output and gradient, and its comparison."""
    inputs = sample.cast(dtype, device)
    ours = functools.partial(sample.call, impl=impl)
    reference = functools.partial(sample.call, impl="reference")
    if not sample.gradients:
        exact = reference(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})
        outputs = zip(*map(as_tuple, (ours(**inputs), reference(**inputs), exact)), strict=True)
        triples = {f"out{index}": Triple(*triple) for index, triple in enumerate(outputs)}
        return {name: (triple, compare(name, *triple, factor, floor_ulps)) for name, triple in triples.items()}
    outs = reference(**inputs)
    triples = run_three_ways(
        ours,
        reference,
        inputs,
        dtype,
        tuple(map(torch.randn_like, as_tuple(outs))),
        parameter_dtype=torch.float32,
        parameters=sample.parameters,
    )
    floor_ulps = max(floor_ulps, sample.float32_ulps if dtype == torch.float32 else FLOOR_ULPS)
    rows = {name: (triple, compare(name, *triple, factor, floor_ulps)) for name, triple in triples.items()}
    if sample.mean_of:
        floor = torch.finfo(dtype).eps * float(outs) / sample.mean_of**0.5
        triple, comparison = rows["out"]
        rows["out"] = triple, comparison._replace(bound=comparison.bound + floor)
    return rows


def as_tuple(outs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs of an op of one or of several."""
    return outs if isinstance(outs, tuple) else (outs,)


def assert_three_way(comparisons: list[Comparison]) -> None:
    """AssertionError that names each output or gradient over its bound."""
    failures = [c for c in comparisons if not c.ok]
    assert not failures, "; ".join(
        f"{c.name}: error {c.ours:.3g} > {c.bound:.3g} (eager PyTorch: {c.eager:.3g})" for c in failures
    )
