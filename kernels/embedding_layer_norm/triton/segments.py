"""Gradients of the tables: a segmented reduction of the rows of ds over the tokens of each table row, in a fixed order.

A stable sort by key groups the tokens of each table row (a segment). The sorted positions are cut into chunks of fixed
length, a program for each chunk and column block. A segment inside one chunk is written by its program; partial sums of
the first and the last segment, where these continue outside the chunk, become entries of the next level, two for each
chunk. There the same kernel runs again, until one chunk is left. So a row that all tokens read is as parallel as rows
that one token reads, there are no atomics, and all shapes depend on T alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels._common.triton_launch import ceil_div, launch

# A program of one warp: 16-byte loads of eight columns per lane in 16-bit dtypes, and up to eight rows of a segment at
# once. 16 positions per chunk: segments of one token are serial, and 16 dependent loads (about 1 us each) are as long
# as a program should take. Higher levels have few entries in long segments: longer chunks, fewer levels.
BLOCK_E, TILE = 256, 8
CHUNK, UPPER_CHUNK = 16, 32
ZEROED_ROWS = 32  # table rows of a program that zeroes those without tokens


@triton.jit
def _key(raw):
    """A negative entry has no value; its key is -1 - entry."""
    return tl.where(raw < 0, -1 - raw, raw)


@triton.jit
def _segment_kernel(
    keys, order, rows, dword, dtoken_type, dposition, upper_keys, upper_rows, N, T, words, types, skipped, dead, E,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Program (c, b): entries c CHUNK.. of `keys`, columns b BLOCK_E..; on the lowest level `order` has their rows.

    The key `skipped` gets no gradient. `dead` is the key of entries past the end and of segments that are written
    already; it never separates two entries of one segment.
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
            continues = (end == CHUNK) & (after == k)
            if from_before | continues:
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


@triton.jit
def _zero_kernel(
    present, dword, dtoken_type, dposition, words, types, rows, skipped, E,
    ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Zeroes the rows of the gradients that no segment writes: those without tokens, and the key `skipped`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    empty = (tl.load(present + row, mask=row < rows, other=1) == 0) | ((row == skipped) & (row < rows))
    zeros = tl.zeros((ROWS, BLOCK_E), dword.dtype.element_ty)
    start = row.to(tl.int64) * E
    tl.store(dword + start[:, None] + e, zeros, mask=(empty & (row < words))[:, None] & (e < E))
    start -= tl.cast(words, tl.int64) * E
    is_type = (row >= words) & (row < words + types)
    tl.store(dtoken_type + start[:, None] + e, zeros, mask=(empty & is_type)[:, None] & (e < E))
    start -= tl.cast(types, tl.int64) * E
    tl.store(dposition + start[:, None] + e, zeros, mask=(empty & (row >= words + types))[:, None] & (e < E))


def key_dtype(rows: int) -> torch.dtype:
    """The dtype of keys 0 to `rows`: a radix sort makes a pass for each byte, and BERT's vocabulary fits into two."""
    return torch.int16 if rows < 2**15 else torch.int32


def table_gradients(
    ds: Tensor, keys: Tensor, present: Tensor, sizes: Sequence[int], padding_idx: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of word, token_type and position, in the dtype of `ds`; rows without tokens are zero.

    Args:
        ds: (T, E), gradient of each token's sum.
        keys: (3 T,), for each table the row that each token reads, in the concatenated tables.
        present: (rows of the tables,) uint8, 0 for the rows that no token reads.
        sizes: rows of the three tables.
        padding_idx: a row of the first table whose gradient stays zero.
    """
    T, E = ds.shape
    gradients = tuple(ds.new_empty((size, E)) for size in sizes)
    skipped = -1 if padding_idx is None else padding_idx
    launch(
        _zero_kernel, (ceil_div(present.shape[0], ZEROED_ROWS), ceil_div(E, BLOCK_E)),
        present, *gradients, sizes[0], sizes[1], present.shape[0], skipped, E,
        ROWS=ZEROED_ROWS, BLOCK_E=BLOCK_E, num_warps=4,
    )  # fmt: skip
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
            skipped, sum(sizes), E,
            CHUNK=chunk, TILE=TILE, BLOCK_E=BLOCK_E, num_warps=1,
        )  # fmt: skip
        # When one chunk is left, every segment ends in it.
        keys, order, rows, entries, chunk = upper_keys, None, upper_rows, 2 * chunks if chunks > 1 else 0, UPPER_CHUNK
    return gradients[0], gradients[1], gradients[2]
