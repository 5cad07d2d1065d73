"""Recorded times of GPU kernels, and which implementation they show to be faster for a call.

`make gpu-bench` adds them to the record of the device (records.py), beside the run that verified the same sources.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"


class Size(NamedTuple):
    """What the time of a call depends on, besides its dtype and pass.

    Attributes:
        amounts: the time of the nearest ones counts: tokens and length of the longest sequence, or rows.
        exact: a time counts only where these are equal: width of a row or head dimension, and whether there is dropout.
    """

    amounts: tuple[int, ...]
    exact: tuple[int, ...]

    def text(self) -> str:
        """For people, e.g. "16384 tokens, up to 512 a sequence, D 64, dropout"."""
        width, dropout = self.exact
        if len(self.amounts) == 1:
            words = f"({self.amounts[0]}, {width})"
        else:
            words = f"{self.amounts[0]} tokens, up to {self.amounts[1]} a sequence, D {width}"
        return words + ", dropout" * bool(dropout)


def size_of_rows(rows: int, width: int, dropout_p: float = 0.0) -> Size:
    """Of a call on `rows` rows of `width` numbers."""
    return Size((rows,), (width, int(dropout_p > 0)))


def size_of_sequences(tokens: int, longest: int, dim: int, dropout_p: float) -> Size:
    """Of a call on a packed batch with heads of `dim` numbers."""
    return Size((tokens, longest), (dim, int(dropout_p > 0)))


class Time(NamedTuple):
    """A measured time of one implementation; `which` is one of FORWARD, BACKWARD and BOTH."""

    dtype: str
    which: str
    size: Size
    ms: float

    def call(self) -> dict[str, Any]:
        """What was timed, as JSON values."""
        return {"dtype": self.dtype, "which": self.which, **self.size._asdict()}

    def entry(self) -> dict[str, Any]:
        """As it is stored in a record."""
        return {**self.call(), "ms": float(f"{self.ms:.4g}")}


def from_entry(entry: Mapping[str, Any]) -> Time:
    """A time as a record stores it."""
    size = Size(tuple(entry["amounts"]), tuple(entry["exact"]))
    return Time(entry["dtype"], entry["which"], size, float(entry["ms"]))


def merge(old: Sequence[Time], new: Sequence[Time]) -> list[Time]:
    """All of them; a new time replaces an old one of the same call."""
    return list({time[:3]: time for time in (*old, *new)}.values())


def of_step(times: Sequence[Time], dtype: str, training: bool) -> dict[Size, float]:
    """Milliseconds by size: of the forward pass, or of both passes for training, measured together or one by one."""
    ms = {(time.which, time.size): time.ms for time in times if time.dtype == dtype}
    if not training:
        return {size: value for (which, size), value in ms.items() if which == FORWARD}
    apart = {
        size: value + ms[BACKWARD, size]
        for (which, size), value in ms.items()
        if which == FORWARD and (BACKWARD, size) in ms
    }
    return apart | {size: value for (which, size), value in ms.items() if which == BOTH}


def fastest(times: Mapping[str, Sequence[Time]], dtype: str, training: bool, size: Size | None) -> str | None:
    """The implementation with the lowest time at the recorded size that is nearest to a call's.

    Args:
        times: of each implementation that may be chosen.
        dtype: of the call, e.g. "bfloat16".
        training: whether there will be a backward pass.
        size: of the call; None for the largest recorded one.

    Returns:
        None where no size was measured with at least two implementations.
    """
    by_impl = {impl: of_step(measured, dtype, training) for impl, measured in times.items()}
    sizes = {
        other
        for of_impl in by_impl.values()
        for other in of_impl
        if (size is None or (other.exact == size.exact and len(other.amounts) == len(size.amounts)))
        and sum(other in of for of in by_impl.values()) > 1
    }
    if not sizes:
        return None
    if size is None:
        nearest = max(sizes, key=lambda other: (math.prod(other.amounts), other))
    else:
        nearest = min(sizes, key=lambda other: (_distance(other, size), other))
    measured_there = {impl: of_impl[nearest] for impl, of_impl in by_impl.items() if nearest in of_impl}
    return min(measured_there, key=measured_there.__getitem__)


def table(times: Mapping[str, Sequence[Time]]) -> list[str]:
    """A line for each recorded call: the implementations, the fastest first."""
    calls: dict[tuple[Any, ...], list[tuple[float, str]]] = {}
    for impl, measured in times.items():
        for time in measured:
            calls.setdefault(time[:3], []).append((time.ms, impl))
    return [
        f"{dtype} {which}, {size.text()}: " + ", ".join(f"{impl} {ms:.4g} ms" for ms, impl in sorted(found))
        for (dtype, which, size), found in sorted(calls.items())
    ]


def _distance(size: Size, other: Size) -> float:
    """0 for equal amounts; doubling one of them counts the same whatever it is."""
    return sum(abs(math.log(max(1, a) / max(1, b))) for a, b in zip(size.amounts, other.amounts, strict=True))
