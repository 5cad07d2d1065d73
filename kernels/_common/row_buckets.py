"""Row buckets: a bounded set of row counts for a library that prepares code for each number of rows.

oneDNN creates a primitive (code for the shape) for every number of rows, which takes milliseconds, and caches up to
1,024 of them. A server's batches have any number of tokens, so without buckets its first thousands of batches would
each create primitives, at a cost in time and memory.
"""

from __future__ import annotations

from torch import Tensor

_STEP = 4  # oneDNN computes a single row by other code, which adds in another order


def bucket(rows: int) -> int:
    """The smallest bucket of at least `rows` rows: multiples of 4 up to 128, then 16 buckets a doubling.

    Above 64 rows at most a sixteenth of the work is padding.
    """
    step = max(_STEP, 1 << max(0, (rows - 1).bit_length() - 5))
    return -(-rows // step) * step


def pad_rows(x: Tensor) -> Tensor:
    """x (T, K) with rows of zeros appended up to `bucket(T)` rows; x itself if T is a bucket."""
    rows = x.shape[0]
    padded = bucket(rows)
    if padded == rows:
        return x
    out = x.new_empty(padded, x.shape[1])
    out[:rows].copy_(x)
    out[rows:].zero_()
    return out
