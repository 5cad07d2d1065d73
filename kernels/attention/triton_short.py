"""Short regime of attention in Triton: all keys of a sequence at once.

A program owns a head of one sequence of up to 128 tokens, or of several neighbouring ones of up to 16 or 32: row r of
its tile is position r % BLOCK_S of sequence first + r // BLOCK_S, and what lies off the diagonal blocks is masked. The
softmax needs no running maximum, and one program makes dq, dk and dv of its sequences from one recomputed P.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_fast.kernels._common.triton_philox import keep_tile, load_rng_state
from bert_fast.kernels.attention.triton_long import (
    LN_2,
    LOG2_E,
    dot,
    dot_transposed,
    load_vector,
    tile_mask,
    zero_tail,
)


@triton.jit
def _rows(cu_seqlens, first, B, T, max_seqlen, TILE: tl.constexpr, BLOCK_S: tl.constexpr):
    """(TILE,) packed token of each row, and whether there is one; within the pack whatever cu_seqlens holds."""
    r = tl.arange(0, TILE)
    b = first + r // BLOCK_S
    start = tl.load(cu_seqlens + b, mask=b < B, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + b + 1, mask=b < B, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), T)
    token = start + r % BLOCK_S
    return token, (token < tl.minimum(end, T)) & (r % BLOCK_S < max_seqlen)


@triton.jit
def _tile(x, bias, token, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """x + bias of the rows, rounded to the dtype of x, (TILE, BLOCK_D)."""
    d = tl.arange(0, BLOCK_D)
    tile = tl.load(x + token[:, None] * stride + d[None, :], mask=tile_mask(inside, d, D, BLOCK_D), other=0.0)
    if bias is not None:
        tile = (tile.to(tl.float32) + load_vector(bias, d, D, BLOCK_D)[None, :]).to(tile.dtype)
    return tile


@triton.jit
def _together(inside, TILE: tl.constexpr, BLOCK_S: tl.constexpr):
    """(TILE, TILE): the column is a key of the row's sequence."""
    together = inside[None, :]
    if BLOCK_S < TILE:
        sequence = tl.arange(0, TILE) // BLOCK_S
        together = together & (sequence[:, None] == sequence[None, :])
    return together


@triton.jit
def _keep(rng_state, n, token, threshold, TILE: tl.constexpr, BLOCK_S: tl.constexpr):
    """(TILE, TILE): dropout keeps the probability; right on the diagonal blocks, unread elsewhere."""
    key0, key1, counter = load_rng_state(rng_state)
    keep = keep_tile(key0, key1, counter, n, token, 0, threshold, TILE, BLOCK_S)
    if BLOCK_S < TILE:
        keep = tl.broadcast_to(keep[:, None, :], (TILE, TILE // BLOCK_S, BLOCK_S)).reshape(TILE, TILE)
    return keep


@triton.jit
def fwd_kernel(
    qkv, bias, cu_seqlens, rng_state, out, lse, B, N, T, max_seqlen, stride_t, stride_s, stride_n,
    scale, sign, threshold, multiplier,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    zero_tail(out, lse, cu_seqlens, B, N, T, tl.program_id(0), tl.num_programs(0), N * D)
    n = tl.program_id(0) % N
    token, inside = _rows(cu_seqlens, tl.program_id(0) // N * (TILE // BLOCK_S), B, T, max_seqlen, TILE, BLOCK_S)
    base = qkv + n.to(tl.int64) * stride_n
    bias_q = bias if bias is None else bias + n * D
    bias_k = bias if bias is None else bias + (N + n) * D
    bias_v = bias if bias is None else bias + (2 * N + n) * D
    q = _tile(base, bias_q, token, inside, stride_t, D, BLOCK_D)
    k = _tile(base + stride_s, bias_k, token, inside, stride_t, D, BLOCK_D)
    v = _tile(base + 2 * stride_s, bias_v, token, inside, stride_t, D, BLOCK_D)
    zeros = tl.zeros((TILE, BLOCK_D), tl.float32)
    scores = dot_transposed(q, k) * sign
    scores = tl.where(_together(inside, TILE, BLOCK_S), scores, -1e38)  # finite: a row may have no key
    m = tl.max(scores, axis=1)
    probs = tl.exp2((scores - m[:, None]) * (scale * LOG2_E))
    total = tl.sum(probs, axis=1)
    if rng_state is not None:
        probs = tl.where(_keep(rng_state, n, token, threshold, TILE, BLOCK_S), probs, 0.0)
    acc = dot(probs.to(v.dtype), v, zeros) * (multiplier / total)[:, None]
    d = tl.arange(0, BLOCK_D)
    at = out + (token * N + n)[:, None] * D + d[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=tile_mask(inside, d, D, BLOCK_D))
    tl.store(lse + n.to(tl.int64) * T + token, m * scale + tl.log2(total) * LN_2, mask=inside)


@triton.jit
def bwd_kernel(
    dout, qkv, bias, lse, cu_seqlens, rng_state, dqkv, partial,
    B, N, T, max_seqlen, stride_t, stride_s, stride_n, scale, threshold, multiplier,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Tiles of scores are transposed, a row a key: so that P and dZ go from registers into the products for dv and dk.

    delta is the sum of P M dP over the keys, all at hand: exact for a sequence of one token, and `out` isn't read.
    """
    zero_tail(dqkv, None, cu_seqlens, B, N, T, tl.program_id(0), tl.num_programs(0), 3 * N * D)
    n = tl.program_id(0) % N
    group = tl.program_id(0) // N
    token, inside = _rows(cu_seqlens, group * (TILE // BLOCK_S), B, T, max_seqlen, TILE, BLOCK_S)
    base = qkv + n.to(tl.int64) * stride_n
    bias_q = bias if bias is None else bias + n * D
    bias_k = bias if bias is None else bias + (N + n) * D
    bias_v = bias if bias is None else bias + (2 * N + n) * D
    q = _tile(base, bias_q, token, inside, stride_t, D, BLOCK_D)
    k = _tile(base + stride_s, bias_k, token, inside, stride_t, D, BLOCK_D)
    v = _tile(base + 2 * stride_s, bias_v, token, inside, stride_t, D, BLOCK_D)
    do = _tile(dout + n * D, None, token, inside, N * D, D, BLOCK_D)
    # Probabilities of rows without a token become 0, by the mask as keys and by lse as queries.
    lse2 = tl.load(lse + n.to(tl.int64) * T + token, mask=inside, other=float("inf")) * LOG2_E
    probs = tl.exp2(dot_transposed(k, q) * (scale * LOG2_E) - lse2[None, :])
    probs = tl.where(tl.trans(_together(inside, TILE, BLOCK_S)), probs, 0.0)
    dp = dot_transposed(v, do)
    kept = probs
    if rng_state is not None:
        keep = tl.trans(_keep(rng_state, n, token, threshold, TILE, BLOCK_S))
        kept = tl.where(keep, probs, 0.0)
        dp = tl.where(keep, dp, 0.0)
    zeros = tl.zeros((TILE, BLOCK_D), tl.float32)
    dv = dot(kept.to(do.dtype), do, zeros) * multiplier
    delta = tl.sum(probs * dp, axis=0)
    dz = (probs * (dp - delta[None, :])).to(q.dtype)
    dk = dot(dz, q, zeros) * (scale * multiplier)
    dq = dot(tl.trans(dz), k, zeros) * (scale * multiplier)
    d = tl.arange(0, BLOCK_D)
    at = dqkv + (token * 3 * N + n)[:, None] * D + d[None, :]
    mask = tile_mask(inside, d, D, BLOCK_D)
    tl.store(at, dq.to(dqkv.dtype.element_ty), mask=mask)
    tl.store(at + N * D, dk.to(dqkv.dtype.element_ty), mask=mask)
    tl.store(at + 2 * N * D, dv.to(dqkv.dtype.element_ty), mask=mask)
    if partial is not None:
        # Rows without a token hold zeros.
        sums = partial + (group.to(tl.int64) * 3 * N + n) * D + d
        tl.store(sums, tl.sum(dq, axis=0), mask=d < D)
        tl.store(sums + N * D, tl.sum(dk, axis=0), mask=d < D)
        tl.store(sums + 2 * N * D, tl.sum(dv, axis=0), mask=d < D)
