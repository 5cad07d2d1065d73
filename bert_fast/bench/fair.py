"""What keeps a kernel from looking faster than it is.

- Each timed call has other inputs than the one before, and all of them together are larger than the caches.
- After the timing, unless the calls change what the next ones compute, the result of one timed call, drawn at random,
  is compared with float64, and so is a call on inputs that the variant has not seen, which then take the place of
  others in the same memory: a result that is replayed, by the last call or by the address of its inputs, and work that
  is left out once the first comparison has passed, give a wrong result here.
- Nothing is faster than the device: a time is not reported in which the operations would run at 1.5 times the ceiling
  of the same run, or the bytes at 2.5 times it (results stay in a cache, since their memory is used again).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from bert_fast.bench.devices import Call, Machine, Timing, reason
from bert_fast.testing import max_error

if TYPE_CHECKING:
    from bert_fast.bench.runner import Case, Variant

FEWEST, MOST = 2, 64  # cases with the same sizes
CACHES = 4.0  # bytes of all cases, over those of the last level cache
IMPOSSIBLE = "impossible"  # how the reason of a time that can't be begins
POSSIBLE_BYTES, POSSIBLE_FLOPS = 2.5, 1.5  # speed over that of the ceiling, which has noise


def cases(case: Case, machine: Machine) -> list[Case]:
    """The case and others of the same sizes with other inputs, together larger than the caches."""
    if case.again is None:
        return [case]
    size = max(
        case.traffic, case.resident, *(sum(x.nbytes for x in variant.inputs) for variant in case.variants.values()), 1
    )
    count = min(MOST, max(FEWEST, int(CACHES * machine.cache_bytes() / size) + 1))
    return [case, *(case.again() for _ in range(count - 1))]


def prepare(made: Sequence[Case], runs: Mapping[str, Sequence[Call]]) -> None:
    """Call everything but the first, which the comparison has called: a compiler compiles, and the backward pass alone
    gets its forward pass."""
    for calls in runs.values():
        for call in calls[1:] if len(calls) == len(made) else calls:
            call()


def faults(
    made: Sequence[Case], timing: Timing, errors: Mapping[str, float | None], limits: Mapping[str, float], gflops: float
) -> dict[str, str]:
    """The reasons why variants that were timed are refused all the same.

    Args:
        made: the cases that were timed.
        timing: their times and kept results.
        errors: of the comparison before the timing; None for variants whose results are random.
        limits: the ceilings of the run.
        gflops: that of the matrix product in the dtype of the case.
    """
    case = made[0]
    unseen = None if case.again is None else case.again()
    found: dict[str, str] = {}
    for label in timing.times.keys() & case.variants.keys():
        why = impossible(case, label, timing, limits, gflops)
        if not why and unseen is not None and errors[label] is not None:
            kept = timing.kept[label]
            why = _wrong(made[kept.number], label, kept.result, "in a timed call")
            why = why or wrong_on_unseen(unseen, case, label)
        found[label] = why
    return {label: why for label, why in found.items() if why}


def impossible(case: Case, label: str, timing: Timing, limits: Mapping[str, float], gflops: float) -> str:
    """Why the time of a variant can't be, or ""."""
    gflops = limits.get(f"{case.variants[label].precision}_gemm_gflops", gflops)
    seconds = timing.times[label].median
    bandwidth = max(limits["copy_gbytes_per_s"], limits.get("read_gbytes_per_s", 0.0))
    for amount, ceiling, factor, what in (
        (case.traffic, bandwidth, POSSIBLE_BYTES, "GB/s"),
        (case.flops, gflops, POSSIBLE_FLOPS, "GFLOP/s"),
    ):
        if amount / 1e9 > factor * ceiling * seconds:
            return (
                f"{IMPOSSIBLE}: {seconds * 1e3:.3g} ms would be {amount / seconds / 1e9:,.0f} {what}, and the ceiling "
                f"of this run is {ceiling:,.0f}"
            )
    return ""


def wrong_on_unseen(unseen: Case, case: Case, label: str) -> str:
    """Why the result of a variant is wrong on the inputs of `unseen`, or ""; those of `case` are overwritten."""
    fresh, seen = unseen.variants[label], case.variants[label]
    try:
        if why := _wrong(unseen, label, fresh.run(), "on inputs that it had not seen"):
            return why
        if not _rewrite(seen, fresh):
            return ""
        return _wrong(unseen, label, seen.run(), "where its inputs were changed in place")
    except Exception as problem:
        return f"after the timing: {reason(problem)}"


def _rewrite(seen: Variant, fresh: Variant) -> bool:
    """Copy the inputs of `fresh` into those of `seen`; False where a graph of a forward pass has saved them."""
    if not seen.inputs or seen.saves_inputs:
        return False
    with torch.no_grad():
        for target, source in zip(seen.inputs, fresh.inputs, strict=True):
            target.copy_(source)
    return True


def _wrong(case: Case, label: str, result: Any, when: str) -> str:
    exact = case.exact()
    variant = case.variants[label]
    error = max_error(variant.result(result), exact) / (float(exact.abs().max()) or 1.0)
    tolerance = case.tolerance if variant.tolerance is None else variant.tolerance
    return "" if error <= tolerance else f"wrong {when}: error {error:.3g} exceeds {tolerance:.3g}"
