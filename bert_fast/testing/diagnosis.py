"""What a wrong result looks like: where it is wrong, and which of the usual mistakes computes the same."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from bert_fast.kernels._common import cases
from bert_fast.kernels._common.cases import Sample
from bert_fast.kernels._common.third_party import registered
from bert_fast.testing.three_way import Comparison, Triple, max_error, sample_triples

Triples = dict[str, tuple[Triple, Comparison]]


def describe(name: str, triple: Triple, comparison: Comparison, sample: Sample) -> str:
    """Which elements of an output or gradient are wrong, and a pattern in them."""
    ours, truth = triple.ours.double(), triple.truth.double()
    if ours.shape != truth.shape:
        return f"{name} has shape {tuple(ours.shape)}; expected {tuple(truth.shape)}"
    difference = (ours - truth).abs().nan_to_num(nan=torch.inf)
    worst = int(difference.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(worst), difference.shape)] if difference.dim() else []
    wrong = difference > comparison.bound
    text = (
        f"{name}: error {comparison.ours:.3g} > {comparison.bound:.3g} (eager PyTorch: {comparison.eager:.3g}), worst "
        f"at {index}: {float(ours.flatten()[worst]):.6g}, expected {float(truth.flatten()[worst]):.6g}; "
        f"{int(wrong.sum())} of {wrong.numel()} elements are wrong"
    )
    return text + _where(wrong, sample) + _pattern(ours, truth, comparison)


def _where(wrong: Tensor, sample: Sample) -> str:
    """The rows, sequences or columns that hold all wrong elements, if they are not all."""
    if wrong.dim() < 1:
        return ""
    rows = wrong.flatten(1).any(1) if wrong.dim() > 1 else wrong
    parts = []
    if not bool(rows.all()):
        cu_seqlens = sample.inputs.get("cu_seqlens")
        if cu_seqlens is not None and int(cu_seqlens[-1]) == len(rows):
            bounds = cu_seqlens.tolist()
            lengths = [end - start for start, end in itertools.pairwise(bounds) if bool(rows[start:end].any())]
            parts.append(f"in the sequences of length {', '.join(map(str, lengths))}")
        numbers = rows.nonzero().flatten().tolist()
        listed = f"rows {numbers[0]} to {numbers[-1]}" if len(numbers) > 4 else f"rows {', '.join(map(str, numbers))}"
        parts.append(f"in {len(numbers)} of {len(rows)} rows ({listed})")
    if wrong.dim() > 1:
        columns = wrong.flatten(0, -2).any(0).nonzero().flatten().tolist()
        if columns and len(columns) < wrong.shape[-1]:
            parts.append(f"in columns {columns[0]} to {columns[-1]} of {wrong.shape[-1]}")
    return "".join(f", {part}" for part in parts)


def _pattern(ours: Tensor, truth: Tensor, comparison: Comparison) -> str:
    nans = int(ours.isnan().sum())
    if nans:
        return f"; {nans} elements are NaN (memory that is not written, or 0 / 0)"
    if not bool(ours.any()):
        return "; it is zero everywhere"
    factor = float((ours * truth).sum() / truth.square().sum())
    if abs(factor - 1) > 1e-3 and max_error(ours, factor * truth) <= comparison.bound * max(1.0, abs(factor)):
        return f"; it is {factor:.6g} times what is expected"
    return ""


def likely_mistake(
    op: str, sample: Sample, device: str, dtype: torch.dtype, results: Triples, seed: int, *, gradients: bool = True
) -> str | None:
    """The usual mistake whose results are those of a kernel: outputs and, unless `gradients` is False, gradients.

    Args:
        results: of the kernel on `sample`, computed under `seed`.

    Returns:
        The name in the op's cases; None where no mistake is nearer to the kernel than twice its distance from the truth
        and within three times the bounds.
    """
    best, best_distance = None, 3.0
    for mistake, kernel in cases.load(op).mistakes.items():
        with registered(op, kernel) as impl:
            try:
                torch.manual_seed(seed)
                mistaken = sample_triples(sample, impl, device, dtype)
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
                continue  # a mistake that this sample has no place for
        distance = 0.0
        for name, (triple, comparison) in results.items():
            if name.startswith("d") and not gradients:
                continue
            error = max_error(triple.ours, mistaken[name][0].ours)
            if not comparison.ok and not 2 * error <= comparison.ours:
                distance = torch.inf
            distance = max(distance, error / (comparison.bound or 1e-300))
        if distance < best_distance:
            best, best_distance = mistake, distance
    return best
