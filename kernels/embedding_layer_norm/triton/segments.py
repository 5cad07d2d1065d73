"""The gradients of the tables: sums of rows of ds over the tokens that read one table row, in a fixed order.

A stable sort by key puts the tokens of a table row together. The sorted positions are cut into chunks of a fixed
length, one program a chunk (and column block), whatever the ids are: a table row whose tokens lie inside one chunk is
written by it; the sums of the first and the last table row of a chunk, where these go on outside, are entries of the
next level, two a chunk. There the same kernel runs again, until one chunk is left. So a row that all tokens read is as
parallel as rows that one token reads, no float is added by two programs in a race, and all shapes depend on T alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels._common.triton_launch import ceil_div, launch

# A program of one warp: eight columns a lane in 16 bits, and eight rows at a time where as many belong together. 16
# positions a chunk: the tokens of rare words are added one after the other, and 16 loads in a row (about 1 us each) are
# as long as a program should take. Upwards rows are few and belong together: longer chunks, fewer levels.
BLOCK_E, TILE = 256, 8
CHUNK, UPPER_CHUNK = 16, 32


@triton.jit
def _key(raw):
    """An entry below zero has no value and the key -1 - entry."""
    return tl.where(raw < 0, -1 - raw, raw)


@triton.jit
def _segment_kernel(
    keys, order, rows, dword, dtoken_type, dposition, upper_keys, upper_rows, N, T, words, types, skipped, dead, E,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Program (c, b): entries c CHUNK.. of `keys`, columns b BLOCK_E..; on the lowest level `order` tells their rows.

    The key `skipped` gets no gradient. `dead` is the key of what has none or is written already: a segment that ended,
    and the end of the list. No two entries of one segment have it between them.
    """
    c = tl.program_id(0)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    first = c * CHUNK
    i = tl.arange(0, CHUNK)
    key = _key(tl.load(keys + first + i, mask=first + i < N, other=dead).to(tl.int32))
    before = _key(tl.load(keys + first - 1, mask=c > 0, other=dead).to(tl.int32))
    after = _key(tl.load(keys + first + CHUNK, mask=first + CHUNK < N, other=dead).to(tl.int32))
    low = dead
    high = dead
    start = c * 0
    while start < CHUNK:
        k = tl.sum(tl.where(i == start, key, 0))
        end = tl.min(tl.where((i > start) & (key != k), i, CHUNK))
        if (k < dead) & (k != skipped):
            total = tl.zeros((1, BLOCK_E), tl.float32)
            for at in range(start, end, TILE):
                j = at + tl.arange(0, TILE)
                live = j < end
                if order is not None:
                    row = tl.load(order + first + j, mask=live, other=0)
                    if k >= words + types:
                        row -= 2 * T
                    elif k >= words:
                        row -= T
                else:
                    row = (first + j).to(tl.int64)
                    live = live & (tl.load(keys + first + j, mask=live, other=-1) >= 0)
                tile = tl.load(rows + row[:, None] * E + e, mask=live[:, None] & (e < E), other=0.0)
                total += tl.sum(tile.to(tl.float32), axis=0, keep_dims=True)
            from_before = (start == 0) & (before == k)
            goes_on = (end == CHUNK) & (after == k)
            if from_before | goes_on:
                slot = 2 * c.to(tl.int64)
                if start == 0:
                    low = k
                    if end == CHUNK:
                        high = -1 - k
                else:
                    high = k
                    slot += 1
                tl.store(upper_rows + slot * E + e, total, mask=e < E)
            else:
                out = dword + k.to(tl.int64) * E
                if k >= words + types:
                    out = dposition + (k - words - types).to(tl.int64) * E
                elif k >= words:
                    out = dtoken_type + (k - words).to(tl.int64) * E
                tl.store(out + e, total.to(dword.dtype.element_ty), mask=e < E)
        start = end
    if tl.program_id(1) == 0:
        tl.store(upper_keys + 2 * c, low)
        tl.store(upper_keys + 2 * c + 1, high)


def key_dtype(rows: int) -> torch.dtype:
    """Of keys up to `rows`, which is none: a radix sort passes once for each byte; BERT's vocabulary fits into two."""
    return torch.int16 if rows < 2**15 else torch.int32


def table_gradients(
    ds: Tensor, keys: Tensor, sizes: Sequence[int], padding_idx: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of word, token_type and position, in the dtype of `ds`; rows without tokens are zero.

    Args:
        ds: (T, E), gradient of each token's sum.
        keys: (3 T,), which row of the tables of `sizes` rows, one behind the other, each token reads of each.
        sizes: rows of the three tables.
        padding_idx: a row of the first that stays zero.
    """
    T, E = ds.shape
    gradients = tuple(ds.new_zeros((size, E)) for size in sizes)
    order: Tensor | None
    keys, order = torch.sort(keys, stable=True)
    rows, entries, chunk = ds, 3 * T, CHUNK
    while entries:
        chunks = ceil_div(entries, chunk)
        upper_keys = keys.new_empty(2 * chunks, dtype=torch.int32)
        upper_rows = ds.new_empty((2 * chunks, E), dtype=torch.float32)
        launch(
            _segment_kernel, (chunks, ceil_div(E, BLOCK_E)),
            keys, order, rows, *gradients, upper_keys, upper_rows, entries, T, sizes[0], sizes[1],
            -1 if padding_idx is None else padding_idx, sum(sizes), E,
            CHUNK=chunk, TILE=TILE, BLOCK_E=BLOCK_E, num_warps=1,
        )  # fmt: skip
        # Where one chunk is left every segment ended in it.
        keys, order, rows, entries, chunk = upper_keys, None, upper_rows, 2 * chunks if chunks > 1 else 0, UPPER_CHUNK
    return gradients[0], gradients[1], gradients[2]
