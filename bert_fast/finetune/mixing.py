"""Batches of several tasks in one stream: how often each comes, and in which order.

A task with n batches an epoch comes with a chance in proportion to n^(1/T): with temperature T = 1 as often as it has
batches, with 2 by their square root, with infinity as often as every other (Arivazhagan et al., "Massively multilingual
neural machine translation in the wild", 2019). The counts of an epoch are exact, and not drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bert_fast.tasks.task import Example

if TYPE_CHECKING:
    from bert_fast.finetune.task_run import Part

_ORDER = 21  # a stream of random numbers of its own


def counts(sizes: Sequence[int], temperature: float) -> list[int]:
    """How many batches of each task an epoch has, that has as many as all of them: their sum is that of `sizes`.

    Args:
        sizes: batches that each task has.
        temperature: above 0; infinity is allowed.
    """
    chances = np.asarray(sizes, dtype=np.float64) ** (1.0 / temperature)
    wanted = chances / chances.sum() * sum(sizes)
    found = np.floor(wanted + 1e-9).astype(np.int64)
    missing = sum(sizes) - int(found.sum())
    found[np.argsort(found - wanted, kind="stable")[:missing]] += 1
    return [int(count) for count in found]


def mixed(parts: Sequence[Part], seed: int, temperature: float) -> Iterator[list[tuple[int, list[Example]]]]:
    """For each epoch its micro-batches, each with the number of its part; a pure function of the arguments.

    Each part goes through its own epochs one after the other: one that comes rarely is not through with its rows after
    an epoch of the run, and goes on with the rest. One part alone has its own batches in their order.
    """
    streams = [_endless(part) for part in parts]
    epoch = 0
    while True:
        if len(parts) == 1:
            yield [(0, batch) for batch in parts[0].batches(epoch)]
        else:
            wanted = counts([len(part.batcher.epoch(epoch)) for part in parts], temperature)
            order = np.random.default_rng([seed, _ORDER, epoch]).permutation(np.repeat(range(len(parts)), wanted))
            yield [(number, next(streams[number])) for number in order.tolist()]
        epoch += 1


def _endless(part: Part) -> Iterator[list[Example]]:
    epoch = 0
    while True:
        yield from part.batches(epoch)
        epoch += 1
