"""The learning rate of every step, exactly."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest

from bert_fast.optim.schedule import lr_factor


def test_warm_up_then_linear_decay_exactly() -> None:
    factors = [lr_factor(step, warmup=4, total=10) for step in range(1, 11)]
    assert factors == [1 / 4, 2 / 4, 3 / 4, 4 / 4, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]


def test_without_warm_up_it_falls_from_the_first_step() -> None:
    assert [lr_factor(step, 0, 4) for step in range(1, 5)] == [4 / 5, 3 / 5, 2 / 5, 1 / 5]


def test_without_decay_it_stays_at_the_peak() -> None:
    assert [lr_factor(step, 2, 5, "none") for step in range(1, 6)] == [1 / 2, 1, 1, 1, 1]


@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (1, 2), (10, 1000), (999, 1000)])
def test_peak_once_and_zero_only_after_the_end(warmup: int, total: int) -> None:
    factors = [lr_factor(step, warmup, total) for step in range(1, total + 1)]
    assert all(0 < factor <= 1 for factor in factors)
    assert lr_factor(total + 1, warmup, total) == 0
    if warmup:
        assert factors.index(1.0) == warmup - 1
    # Equal steps down after the peak.
    after = [Fraction(factor).limit_denominator(10**6) for factor in factors[warmup:]]
    assert all(a - b == Fraction(1, total + 1 - warmup) for a, b in pairwise(after))


def test_cosine_falls_slowly_at_both_ends_and_constant_stays() -> None:
    factors = [lr_factor(step, 2, 9, "cosine") for step in range(1, 10)]
    assert factors[:2] == [0.5, 1.0]
    assert factors[5] == pytest.approx(0.5)  # half of the way from the peak to 0
    assert factors[2] == pytest.approx((1 + math.cos(math.pi / 8)) / 2)
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert factors[-1] > 0
    assert lr_factor(9, 2, 9, "constant") == 1.0
