"""Few numbers of rows for a library that prepares itself anew for each.

oneDNN makes a primitive (code for the shape) for every number of rows that it meets: milliseconds each, and kept, up to
1,024 of them. A server's batches have any number of tokens, so its first thousands would pay for some, in time and in
memory.
"""

from __future__ import annotations

from torch import Tensor

_STEP = 4  # one row alone goes through other code there, that adds up in another order


def few_sizes(rows: int) -> int:
    """The number of rows to compute in the place of `rows`: 32 of them up to 128, then 16 for each doubling.

    So above 64 at most a sixteenth of the work is for rows that nobody asked for.
    """
    step = max(_STEP, 1 << max(0, (rows - 1).bit_length() - 5))
    return -(-rows // step) * step


def fill_up(x: Tensor) -> Tensor:
    """x (T, K) with rows of zeros behind it, up to `few_sizes` rows; x itself where it has as many."""
    rows = x.shape[0]
    if (more := few_sizes(rows)) == rows:
        return x
    out = x.new_empty(more, x.shape[1])
    out[:rows].copy_(x)
    out[rows:].zero_()
    return out
