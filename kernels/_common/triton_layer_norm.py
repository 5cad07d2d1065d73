"""LayerNorm in Triton, for two ops: row statistics, the gradient through them, launch choices and sums over parts."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels._common.philox import dropout_threshold
from bert_fast.kernels._common.triton_launch import ceil_div, launch, next_power_of_2


@triton.jit
def row_statistics(s, columns, E, eps):
    """mean and 1 / sqrt(variance + eps) of each row of `s` (ROWS, BLOCK_E) float32, which is 0 outside `columns`.

    Two-pass variance over registers: the second pass sums deviations from the first mean, so nothing large cancels,
    and the mean deviation corrects the rounding error of the first sum. So the mean of a constant row is exact.
    """
    first = tl.sum(s, axis=1) / E
    d = tl.where(columns, s - first[:, None], 0.0)
    shift = tl.sum(d, axis=1) / E
    variance = tl.sum(d * d, axis=1) / E - shift * shift
    return first + shift, tl.rsqrt(tl.maximum(variance, 0.0) + eps)


@triton.jit
def layer_norm_grad(g, xhat, rstd, E):
    """rstd (g - mean(g) - xhat mean(g xhat)) of each row, for g = dout * weight; g and xhat are 0 outside the row."""
    # Both sums in one reduction: half the barriers where several warps share a row.
    mean_g, mean_g_xhat = tl.split(tl.sum(tl.join(g, g * xhat), axis=1) / E)
    return (g - mean_g[:, None] - xhat * mean_g_xhat[:, None]) * rstd[:, None]


@triton.jit
def _sum_parts_kernel(
    partial, first, second, third, parts, E,
    COUNT: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Program (i, k) sums columns i BLOCK_E.. of sum k over all parts, in an order that depends on `parts` alone."""
    which = tl.program_id(1)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_PARTS, BLOCK_E), tl.float32)
    for start in range(0, parts, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        inside = (part < parts)[:, None] & (e < E)[None, :]
        total += tl.load(partial + (part[:, None] * COUNT + which) * E + e[None, :], mask=inside, other=0.0)
    out = first
    if which == 1:
        out = second
    if which == 2:
        out = third
    tl.store(out + e, tl.sum(total, axis=0), mask=e < E)


def sum_parts(partial: Tensor) -> tuple[Tensor, ...]:
    """(parts, count, E) float32 -> `count` (2 or 3) tensors (E,) float32, each the sum over its parts.

    One launch, where `partial.sum(0)` and copies of its rows are several; the sums don't share memory.
    """
    parts, count, E = partial.shape
    # Many parts: narrow blocks, for more loads in flight. Few parts: wide blocks.
    rows, columns = (128, 32) if parts > 32 else (32, 128)
    sums = tuple(partial.new_empty(E) if parts else partial.new_zeros(E) for _ in range(count))
    if parts:
        launch(
            _sum_parts_kernel, (ceil_div(E, columns), count), partial, sums[0], sums[1], sums[-1], parts, E,
            COUNT=count, BLOCK_PARTS=rows, BLOCK_E=columns,
        )  # fmt: skip
    return sums


def fwd_tile(E: int) -> dict[str, int]:
    """ROWS, BLOCK_E and num_warps of a forward program: 1024 elements per warp, so 32 per thread.

    Up to E = 1024 one warp has a row: no barrier, the sums over the row are shuffles. 32 elements are four loads of 16
    bytes from each input in bf16, 4 KB per warp; with 16 to 32 programs on an SM at least 64 KB are in flight, where
    4.3 TB/s at a latency of 0.7 us need 23 KB.
    """
    block = max(16, next_power_of_2(E))
    return {"ROWS": max(1, min(16, 1024 // block)), "BLOCK_E": block, "num_warps": min(32, max(1, block // 1024))}


def bwd_tile(E: int) -> dict[str, int]:
    """ROWS, BLOCK_E, STAGES of the loop over rows, and num_warps of a backward program: 1024 elements at a time.

    The sums over rows stay in registers, so a thread owns few columns: eight, 256 per warp. Software pipelining
    prefetches STAGES - 1 steps to shared memory: at E = 1024 in bf16 two rows of three inputs, 12 KB per program and
    47 KB per SM. Wider tiles have fewer stages, for sm_120's 99 KB of shared memory and for registers.
    """
    block = max(16, next_power_of_2(E))
    return {
        "ROWS": max(1, min(16, 1024 // block)),
        "BLOCK_E": block,
        "STAGES": 3 if block <= 2048 else 2 if block <= 4096 else 1,
        "num_warps": min(16, max(1, block // 256)),
    }


def grad_parts(T: int, rows: int, num_warps: int) -> tuple[int, int]:
    """(parts, rows of a part), the latter a multiple of `rows` and of 8; depends on the shape alone.

    At most 512 parts: 3.9 programs of 4 warps for each of 132 SMs, one wave where four fit an SM; fewer where a program
    has more warps. The partial sums of 512 parts, three of 4 bytes for each column, written and read, are 15 % of the
    bytes of the rows at T = 8192 in bf16, but stay in L2.
    """
    multiple = max(8, rows)
    each = max(1, ceil_div(ceil_div(T, min(512, 2048 // num_warps)), multiple)) * multiple
    return ceil_div(T, each), each


def dropout_arguments(dropout_p: float, rng_state: Tensor | None) -> tuple[Tensor | None, int, float]:
    """(state or None, threshold, scale of kept elements). Raises ValueError where dropout has no `rng_state`."""
    threshold = dropout_threshold(dropout_p)
    if threshold == 0:
        return None, 0, 1.0
    if rng_state is None:
        raise ValueError(f"dropout_p is {dropout_p} and rng_state is None; expected an int64 (2,) tensor")
    return rng_state.contiguous(), threshold, 256.0 / (256 - threshold)
