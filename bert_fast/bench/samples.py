"""What the times of repeated calls say: the median, its confidence interval, the spread and the outliers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

CONFIDENCE = Fraction("0.95")
WHISKER = 1.5  # interquartile ranges beyond the quartiles, as in Tukey's box plot


class Summary(NamedTuple):
    """Of the seconds of one call, repeated.

    Attributes:
        median: the middle one.
        low, high: a 95 % confidence interval of the median by order statistics, whatever the distribution. With fewer
            than six times it is the smallest and the largest, whose confidence is lower.
        iqr: distance of the quartiles.
        outliers: how many lie more than 1.5 `iqr` outside the quartiles.
        calls: how many times there are.
    """

    median: float
    low: float
    high: float
    iqr: float
    outliers: int
    calls: int


def summary(times: Sequence[float]) -> Summary:
    """The summary of at least one time."""
    ordered = sorted(times)
    low, high = _interval(len(ordered))
    first, third = statistics.quantiles(ordered, method="inclusive")[::2] if len(ordered) > 1 else ordered * 2
    iqr = third - first
    outliers = sum(not first - WHISKER * iqr <= time <= third + WHISKER * iqr for time in ordered)
    return Summary(statistics.median(ordered), ordered[low], ordered[high], iqr, outliers, len(ordered))


def _interval(count: int) -> tuple[int, int]:
    """The ranks, from 0, of the order statistics that enclose the median with `CONFIDENCE`: the number of times below
    the median is binomial with p 1/2."""
    rank, below = 0, 1  # below, over 2^count: the probability that up to `rank` times are below the median
    while 2 * (below + math.comb(count, rank + 1)) <= (1 - CONFIDENCE) * (1 << count):
        rank += 1
        below += math.comb(count, rank)
    return rank, count - 1 - rank
