"""Lengths of sequences for "half-full" batches: those of BERT's second phase in the MLPerf data, or evenly spaced."""

from __future__ import annotations

import random

FULL = 0.23  # of the sequences have the whole length
MEAN = 254 / 512  # of the whole length, over all sequences


def half_filled(batch: int, seqlen: int, seed: int = 0) -> list[int]:
    """`batch` lengths: 23 % of them `seqlen`, the rest spread evenly so that the mean is 254/512 of it, shuffled."""
    full = round(FULL * batch)
    rest = batch - full
    mean = (MEAN * seqlen * batch - full * seqlen) / rest
    low, high = 1.0, 2 * mean - 1
    lengths = [seqlen] * full
    lengths += [round(low + (high - low) * (index + 0.5) / rest) for index in range(rest)]
    random.Random(seed).shuffle(lengths)
    return lengths


def evenly_spaced(batch: int, shortest: int, longest: int) -> list[int]:
    """`batch` lengths from `shortest` to `longest`, rounded down."""
    return [shortest + (longest - shortest) * index // max(1, batch - 1) for index in range(batch)]
