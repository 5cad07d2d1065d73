"""The GEMM of masked_lm_loss in Triton: the number of rows is read on the device.

cuBLAS takes its sizes from the host, which would have to synchronize for the number of labelled rows, or to multiply
all T rows. Here every launch has a persistent loop: P programs, sized for the worst case, each take every P-th tile
of the labelled rows. So launches don't depend on the labels and can be captured in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels._common import triton_support
from bert_fast.kernels._common.triton_launch import ceil_div, launch

# Tiles. 16-bit dtypes: two warp groups of 64 x 128 by Hopper's wgmma, three stages of 32 KiB, within sm_120's 99 KiB.
# NARROW is for an (E, E) result, whose 128 x 128 tiles are too few to fill a GPU. EXACT is for float32: IEEE products
# without tensor cores. Chosen by counting registers and bytes, not measured yet.
WIDE: dict[str, int] = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}
NARROW: dict[str, int] = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}
EXACT: dict[str, int] = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 8, "num_stages": 2}

# Swizzle: tiles are ordered down bands of this height, so that concurrent tiles share rows of a and columns of b in L2:
# 8 by 33 tiles in flight read 41 strips, 1 by 264 would read 265.
BAND = 8
INTERPRETED = tl.constexpr(triton_support.INTERPRETED)


def programs(device: torch.device, each: int) -> int:
    """`each` programs for each SM. Results don't depend on it: one program computes a tile or a row."""
    if device.type != "cuda":  # the interpreter, where a program takes a millisecond
        return each
    return each * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def rows_left(count, start, rows):
    """The number of labelled rows among `rows` rows from `start` on."""
    return tl.maximum(tl.minimum(tl.load(count) - start, rows), 0).to(tl.int32)


@triton.jit
def per_row(count):
    """1 / count, the weight of a row in the mean; 1 without rows."""
    return 1.0 / tl.maximum(tl.load(count), 1).to(tl.float32)


@triton.jit
def _load_a(place, inside_m, k, left, FORM: tl.constexpr, TAIL: tl.constexpr):
    """A tile (BLOCK_M, BLOCK_K) of a; in the TAIL of the K loop only `left` columns exist."""
    if FORM == "TN":
        inside = inside_m[:, None] & (k < left)[None, :] if TAIL else inside_m[:, None]
        return tl.load(place, mask=inside, other=0.0)
    return tl.load(place, mask=(k < left)[None, :], other=0.0) if TAIL else tl.load(place)


@triton.jit
def _load_b(place, inside_n, k, left, FORM: tl.constexpr, TAIL: tl.constexpr):
    if FORM == "NT":
        return tl.load(place, mask=(k < left)[:, None], other=0.0) if TAIL else tl.load(place)
    inside = inside_n[None, :] & (k < left)[:, None] if TAIL else inside_n[None, :]
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def rounded(x, pointer):
    """float32 `x`, rounded to the dtype that `pointer` points to."""
    dtype: tl.constexpr = pointer.dtype.element_ty
    if INTERPRETED and dtype == tl.bfloat16:  # it truncates, where a GPU rounds to nearest even
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(x, y, total):
    if INTERPRETED:  # its tl.dot multiplies the bits of bfloat16 as integers
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, total, input_precision="ieee")


@triton.jit(do_not_specialize=["start", "rows", "rows_b"])
def _gemm_kernel(
    a, b, out, index, count, start, rows, cols_a, N, rows_b, stride_a, stride_b, stride_out,
    FORM: tl.constexpr, INDEXED: tl.constexpr, SCALED: tl.constexpr, ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """See `gemm`. In memory a is (rows, cols_a) and b (rows_b, ...); only labelled rows are read."""
    rows = rows_left(count, start, rows)
    M = cols_a if FORM == "TN" else rows
    K = rows if FORM == "TN" else tl.minimum(cols_a, rows_b) if FORM == "NN" else cols_a
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    if ACCUMULATE:
        tiles = tl.where(rows > 0, tiles, 0)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        top = tile // (BAND * tiles_n) * BAND
        height = tl.minimum(tiles_m - top, BAND)
        inside_band = tile % (BAND * tiles_n)
        first_m = (top + inside_band % height) * BLOCK_M
        first_n = inside_band // height * BLOCK_N
        m, n, k = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        # A 64-bit base advances; 32-bit offsets within the tile are loop-invariant. Rows past the last repeat the last,
        # since they are not stored: without a mask, whose predicates would take more registers than the offsets.
        if FORM == "TN":
            a_start, a_step = a + first_m, tl.cast(stride_a, tl.int64) * BLOCK_K
            a_place = tl.arange(0, BLOCK_M)[:, None] + k[None, :] * stride_a
        elif INDEXED == "a":
            a_start, a_step = a, BLOCK_K
            a_place = tl.load(index + tl.minimum(m, M - 1))[:, None].to(tl.int64) * stride_a + k[None, :]
        else:
            a_start, a_step = a + tl.cast(first_m, tl.int64) * stride_a, BLOCK_K
            a_place = tl.minimum(tl.arange(0, BLOCK_M), M - 1 - first_m)[:, None] * stride_a + k[None, :]
        if FORM == "NT":
            last = tl.minimum(first_n, rows_b - 1)
            b_start, b_step = b + tl.cast(last, tl.int64) * stride_b, BLOCK_K
            b_place = k[:, None] + tl.minimum(tl.arange(0, BLOCK_N), rows_b - 1 - last)[None, :] * stride_b
        else:
            b_start, b_step = b + first_n, tl.cast(stride_b, tl.int64) * BLOCK_K
            b_place = k[:, None] * stride_b + tl.arange(0, BLOCK_N)[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        full_k = K // BLOCK_K * BLOCK_K
        for start_k in range(0, full_k, BLOCK_K):
            x = _load_a(a_start + a_place, m < M, k, 0, FORM, False)
            if INDEXED == "b":
                k_b = tl.load(index + start_k + k)[:, None].to(tl.int64)
                y = _load_b(b + k_b * stride_b + n[None, :], n < N, k, 0, FORM, False)
            else:
                y = _load_b(b_start + b_place, n < N, k, 0, FORM, False)
            total = _dot(x, y, total)
            a_start += a_step
            b_start += b_step
        if full_k < K:
            x = _load_a(a_start + a_place, m < M, k, K - full_k, FORM, True)
            if INDEXED == "b":
                k_b = tl.load(index + full_k + k, mask=k < K - full_k, other=0)[:, None].to(tl.int64)
                y = _load_b(b + k_b * stride_b + n[None, :], n < N, k, K - full_k, FORM, True)
            else:
                y = _load_b(b_start + b_place, n < N, k, K - full_k, FORM, True)
            total = _dot(x, y, total)
        if SCALED:
            total *= per_row(count)
        inside = (m < M)[:, None] & (n < N)[None, :]
        m_out = tl.load(index + m, mask=m < M, other=0) if INDEXED == "out" else m
        target = out + m_out[:, None].to(tl.int64) * stride_out + n[None, :]
        if ACCUMULATE:
            total += tl.load(target, mask=inside, other=0.0)
        tl.store(target, rounded(total, out), mask=inside)


def gemm(
    form: str,
    a: Tensor,
    b: Tensor,
    out: Tensor,
    count: Tensor,
    *,
    start: int = 0,
    index: Tensor | None = None,
    indexed: str = "",
    scaled: bool = False,
    accumulate: bool = False,
    narrow: bool = False,
) -> None:
    """out = a b^T ("NT"), a b ("NN") or a^T b ("TN") of the rows numbered below `count`, accumulated in float32.

    Args:
        a: its first row has the number `start`. Rows of `a` ("TN": of `a` and `b`) from `count` on are not read.
        b: may have fewer rows than out has columns ("NT") or a has columns ("NN"): missing rows count as zero.
        out: written up to row `count` ("TN": all rows).
        count: int64 (), on the device.
        index: int32; the rows gathered from "a" or "b" or scattered to "out", whichever `indexed` names.
        scaled: multiply by 1 / max(count, 1).
        accumulate: add to the contents of `out`.
        narrow: smaller tiles, for a small result.
    """
    tile: dict[str, Any] = EXACT if a.dtype == torch.float32 else NARROW if narrow else WIDE
    rows, cols_a = (out if indexed == "a" else a).shape[0], a.shape[1]
    N = out.shape[1]
    tiles = ceil_div(cols_a if form == "TN" else rows, tile["BLOCK_M"]) * ceil_div(N, tile["BLOCK_N"])
    launch(
        _gemm_kernel, (min(tiles, programs(a.device, 4 if tile is EXACT else 2)),),
        a, b, out, index, count, start, rows, cols_a, N, b.shape[0], a.stride(0), b.stride(0), out.stride(0),
        FORM=form, INDEXED=indexed, SCALED=scaled, ACCUMULATE=accumulate, BAND=BAND, **tile,
    )  # fmt: skip
