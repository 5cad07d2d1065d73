"""padding in Triton: rows are moved as integers of the widest size that fits them, whatever their dtype.

Bytes, with r bytes in a row: unpad_indices reads the mask twice and writes 8 T + 4 B; gather_rows 2 T r; scatter_rows
(T + rows) r in one pass that writes zeros and rows: a program owns a block of rows of the result and searches the
rising indices for its first.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels._common.triton_launch import ceil_div, launch, next_power_of_2

# Chosen by counting bytes, not measured on a GPU yet. MASK_BLOCK: 8 bytes of the mask per thread, on 4 warps.
MASK_BLOCK = 1024
# GATHER_TILE: elements, 64 bytes per thread. COLUMNS x 8 bytes are one 16-byte load per lane of a warp; rows of any
# E >= 256 in any dtype are a multiple of it or of its half.
GATHER_TILE, COLUMNS = 1024, 64
# Columns of a program of scatter_rows: 16 KB, whole rows up to E = 1024, so that each block searches once.
SCATTER_COLUMNS = 2048
SEARCH = 128  # indices that a step of the search for a program's first row reads: 2 steps up to T = 2^14


@triton.jit
def _count_kernel(mask, counts, S, parts, BLOCK: tl.constexpr):
    """A program counts the tokens of one part, BLOCK columns of a row."""
    program = tl.program_id(0)
    col = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    row = (program // parts).to(tl.int64)
    real = tl.load(mask + row * S + col, mask=col < S, other=0) != 0
    tl.store(counts + program, tl.sum(real.to(tl.int32)))


@triton.jit
def _write_kernel(mask, ends, indices, T, S, parts, BLOCK: tl.constexpr):
    """A program writes the flat positions of its part's tokens; ends: inclusive running totals of the parts' tokens."""
    program = tl.program_id(0)
    col = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    row = (program // parts).to(tl.int64)
    real = tl.load(mask + row * S + col, mask=col < S, other=0) != 0
    place = tl.load(ends + program) - tl.sum(real.to(tl.int32)) + tl.cumsum(real.to(tl.int32), 0) - 1
    tl.store(indices + place, row * S + col, mask=real & (place >= 0) & (place < T))


@triton.jit
def _gather_kernel(x, indices, out, R, T, W, column_blocks, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr):
    program = tl.program_id(0)
    t = (program // column_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    w = (program % column_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = (t < T)[:, None] & (w < W)[None, :]
    row = tl.load(indices + t, mask=t < T, other=0)
    readable = inside & ((row >= 0) & (row < R))[:, None]
    moved = tl.load(x + row[:, None] * W + w[None, :], mask=readable, other=0)
    tl.store(out + t[:, None] * W + w[None, :], moved, mask=inside)


@triton.jit
def _scatter_kernel(
    x, indices, out, T, rows, W, steps, column_parts,
    PART: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, SEARCH: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = (program // column_parts).to(tl.int64) * BLOCK_T
    # The number of indices below `first`: each step splits the remaining range into SEARCH pieces and keeps one.
    lane = tl.arange(0, SEARCH).to(tl.int64)
    low = tl.zeros((), tl.int64)
    piece = low + T
    for _ in range(0, steps):
        piece = (piece + SEARCH - 1) // SEARCH
        last = low + (lane + 1) * piece - 1
        low += tl.sum(((last < T) & (tl.load(indices + last, mask=last < T, other=0) < first)).to(tl.int64)) * piece
    # The indices rise, so the next BLOCK_T of them hold every row of this block that has one.
    candidate = low + tl.arange(0, BLOCK_T)
    index = tl.load(indices + candidate, mask=candidate < T, other=-1)
    row = first + tl.arange(0, BLOCK_T)
    source = tl.max(tl.where(row[:, None] == index[None, :], candidate[None, :], -1), axis=1)
    begin = (program % column_parts) * PART
    for start in range(begin, min(begin + PART, W), BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        moved = tl.load(x + source[:, None] * W + w[None, :], mask=(source >= 0)[:, None] & (w < W)[None, :], other=0)
        tl.store(out + row[:, None] * W + w[None, :], moved, mask=(row < rows)[:, None] & (w < W)[None, :])


def count_tokens(mask: Tensor) -> tuple[Tensor, int]:
    """mask bool (B, S), S > 0 -> inclusive running totals of the parts' tokens, int64 (B parts,); a part's columns."""
    B, S = mask.shape
    block = min(MASK_BLOCK, max(128, next_power_of_2(S)))
    parts = ceil_div(S, block)
    counts = mask.new_empty(B * parts, dtype=torch.int32)
    launch(_count_kernel, (B * parts,), mask.view(torch.uint8), counts, S, parts, BLOCK=block)
    return counts.cumsum(0), block


def write_indices(mask: Tensor, ends: Tensor, total: int, block: int) -> Tensor:
    """The flat positions of the `total` tokens, int64 (T,); `ends` and `block` from `count_tokens`."""
    indices = mask.new_empty(total, dtype=torch.int64)
    parts = ceil_div(mask.shape[1], block)
    launch(
        _write_kernel, ends.shape, mask.view(torch.uint8), ends, indices, total, mask.shape[1], parts, BLOCK=block
    )  # fmt: skip
    return indices


def unpad_indices(mask: Tensor) -> tuple[Tensor, Tensor]:
    B, S = mask.shape
    cu_seqlens = mask.new_zeros(B + 1, dtype=torch.int32)
    if not mask.numel():
        return mask.new_empty(0, dtype=torch.int64), cu_seqlens
    mask = mask.contiguous()
    ends, block = count_tokens(mask)
    total = int(ends[-1])  # the op's only synchronization with the device
    if total >= 2**31:
        raise RuntimeError(f"padding: the mask has {total} tokens; expected fewer than 2^31, as cu_seqlens is int32")
    parts = ceil_div(S, block)
    cu_seqlens[1:] = ends[parts - 1 :: parts]
    return write_indices(mask, ends, total, block), cu_seqlens


def _as_integers(x: Tensor) -> Tensor:
    """`x` (R, ...), not empty, as (R, W) integers of the widest size that divides a row and the memory's address."""
    x = x.contiguous().view(x.shape[0], math.prod(x.shape[1:]))
    size = x.element_size()
    for dtype in (torch.int64, torch.int32, torch.int16):
        if all(n % dtype.itemsize == 0 for n in (x.shape[1] * size, x.storage_offset() * size, x.data_ptr())):
            return x.view(dtype)
    return x.view(torch.int8)


def gather_rows(x: Tensor, indices: Tensor) -> Tensor:
    T = indices.shape[0]
    out = x.new_empty(T, *x.shape[1:])
    if not out.numel():
        return out
    if not x.numel():
        return out.zero_()  # x has no rows, so every index is out of range
    source = _as_integers(x)
    target = out.view(T, -1).view(source.dtype)
    W = source.shape[1]
    block_w = min(COLUMNS, next_power_of_2(W))
    block_t, column_blocks = GATHER_TILE // block_w, ceil_div(W, block_w)
    launch(
        _gather_kernel, (ceil_div(T, block_t) * column_blocks,),
        source, indices.contiguous(), target, x.shape[0], T, W, column_blocks, BLOCK_T=block_t, BLOCK_W=block_w,
    )  # fmt: skip
    return out


def scatter_rows(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    T = indices.shape[0]
    if not x.numel():
        return x.new_zeros(rows, *x.shape[1:])
    out = x.new_empty(rows, *x.shape[1:])
    if not out.numel():
        return out
    source = _as_integers(x)
    target = out.view(rows, -1).view(source.dtype)
    W = source.shape[1]
    block_w = min(COLUMNS, next_power_of_2(W))
    block_t = 16 if W > 16 else 64
    column_parts = ceil_div(W, SCATTER_COLUMNS)
    launch(
        _scatter_kernel, (ceil_div(rows, block_t) * column_parts,),
        source, indices.contiguous(), target, T, rows, W, _steps(T), column_parts,
        PART=SCATTER_COLUMNS, BLOCK_T=block_t, BLOCK_W=block_w, SEARCH=SEARCH,
    )  # fmt: skip
    return out


def _steps(T: int) -> int:
    """How often T can be divided by SEARCH, rounding up, until it is 1; at least once."""
    steps = 1
    while T > SEARCH:
        T, steps = ceil_div(T, SEARCH), steps + 1
    return steps
