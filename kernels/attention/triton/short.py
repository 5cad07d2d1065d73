"""Short regime of attention in Triton: all keys of a sequence at once.

A program owns one head of a sequence of up to 128 tokens, or of several neighbouring sequences of up to 16 or 32: row r
of its tile is position r % BLOCK_S of sequence first + r // BLOCK_S. Products of several sequences are batched, so that
no sequence reads another's NaN. The softmax needs no running maximum, and one program computes dq, dk and dv of its
sequences from one recomputed P.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_fast.kernels.attention.triton.dropout import keep_scores
from bert_fast.kernels.attention.triton.long import (
    LOG2_E,
    dot,
    dot_transposed,
    load_top,
    load_vector,
    probabilities,
    rounded,
    tile_mask,
    transpose,
    zero_tail,
)


@triton.jit
def _rows(cu_seqlens, first, B, T, max_seqlen, TILE: tl.constexpr, BLOCK_S: tl.constexpr):
    """(TILE,) the token of each row and whether it exists; within the packed batch for any cu_seqlens."""
    r = tl.arange(0, TILE)
    b = first + r // BLOCK_S
    start = tl.load(cu_seqlens + b, mask=b < B, other=0).to(tl.int64)
    end = tl.load(cu_seqlens + b + 1, mask=b < B, other=0).to(tl.int64)
    start = tl.minimum(tl.maximum(start, 0), T)
    token = start + r % BLOCK_S
    return token, (token < tl.minimum(end, T)) & (r % BLOCK_S < max_seqlen)


@triton.jit
def _split(x, TILE: tl.constexpr, BLOCK_S: tl.constexpr):
    """(TILE, ...) unchanged for one sequence; (sequences, BLOCK_S, ...) for several."""
    if BLOCK_S < TILE:
        if len(x.shape) == 1:
            x = x.reshape(TILE // BLOCK_S, BLOCK_S)
        else:
            x = x.reshape(TILE // BLOCK_S, BLOCK_S, x.shape[1])
    return x


@triton.jit
def _tile(x, bias, token, inside, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr):
    """x + bias of the rows, rounded to the dtype of x: (TILE, BLOCK_D), split by sequence."""
    d = tl.arange(0, BLOCK_D)
    tile = tl.load(x + token[:, None] * stride + d[None, :], mask=tile_mask(inside, d, D, BLOCK_D), other=0.0)
    if bias is not None:
        tile = rounded(tile.to(tl.float32) + load_vector(bias, d, D, BLOCK_D)[None, :], tile.dtype)
    return _split(tile, token.shape[0], BLOCK_S)


@triton.jit
def _keep(rng_state, n, token, threshold, TILE: tl.constexpr, BLOCK_S: tl.constexpr):
    return _split(keep_scores(rng_state, n, token, 0, threshold, TILE, BLOCK_S, False), TILE, BLOCK_S)


@triton.jit
def fwd_kernel(
    qkv, bias, cu_seqlens, rng_state, out, stats, B, N, T, max_seqlen, stride_t, stride_s, stride_n,
    scale, sign, threshold, multiplier,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    zero_tail(out, stats, cu_seqlens, B, N, T, tl.program_id(0), tl.num_programs(0), N * D)
    n = tl.program_id(0) % N
    token, inside = _rows(cu_seqlens, tl.program_id(0) // N * (TILE // BLOCK_S), B, T, max_seqlen, TILE, BLOCK_S)
    base = qkv + n.to(tl.int64) * stride_n
    bias_q = bias if bias is None else bias + n * D
    bias_k = bias if bias is None else bias + (N + n) * D
    bias_v = bias if bias is None else bias + (2 * N + n) * D
    q = _tile(base, bias_q, token, inside, stride_t, D, BLOCK_D, BLOCK_S)
    k = _tile(base + stride_s, bias_k, token, inside, stride_t, D, BLOCK_D, BLOCK_S)
    v = _tile(base + 2 * stride_s, bias_v, token, inside, stride_t, D, BLOCK_D, BLOCK_S)
    real = _split(inside, TILE, BLOCK_S)
    scores = dot_transposed(q, k) * sign
    scores = tl.where(tl.expand_dims(real, -2), scores, float("-inf"))  # NaN in rows without a key, not stored
    m = tl.max(scores, axis=-1)
    probs = tl.exp2((scores - tl.expand_dims(m, -1)) * (scale * LOG2_E))
    total = tl.sum(probs, axis=-1)
    if rng_state is not None:
        probs = tl.where(_keep(rng_state, n, token, threshold, TILE, BLOCK_S), probs, 0.0)
    acc = dot(probs, v, None) * tl.expand_dims(multiplier / total, -1)
    d = tl.arange(0, BLOCK_D)
    at = out + (token * N + n)[:, None] * D + d[None, :]
    acc = rounded(acc.reshape(TILE, BLOCK_D), out.dtype.element_ty)
    tl.store(at, acc, mask=tile_mask(inside, d, D, BLOCK_D))
    at_row = stats + n.to(tl.int64) * T + token
    tl.store(at_row, m.reshape(TILE), mask=inside)
    tl.store(at_row + tl.cast(N, tl.int64) * T, tl.log2(total).reshape(TILE), mask=inside)


@triton.jit
def bwd_one_kernel(
    dout, qkv, bias, stats, cu_seqlens, rng_state, dqkv, partial,
    B, N, T, max_seqlen, stride_t, stride_s, stride_n, scale, threshold, multiplier,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """A program owns one sequence: it holds the keys, dk and dv and iterates over the queries, CHUNK at a time.

    Tiles of scores are transposed, a row for each key, so that P and dZ are register operands of the products for dv
    and dk. delta is the sum of P M dP over the keys, all in the tile: exact for one token, and `out` isn't read.
    """
    zero_tail(dqkv, None, cu_seqlens, B, N, T, tl.program_id(0), tl.num_programs(0), 3 * N * D)
    n = tl.program_id(0) % N
    b = tl.program_id(0) // N
    token, inside = _rows(cu_seqlens, b, B, T, max_seqlen, TILE, TILE)
    first, length = tl.min(token, axis=0), tl.sum(inside.to(tl.int32), axis=0)
    base = qkv + n.to(tl.int64) * stride_n
    bias_q = bias if bias is None else bias + n * D
    bias_k = bias if bias is None else bias + (N + n) * D
    bias_v = bias if bias is None else bias + (2 * N + n) * D
    k = _tile(base + stride_s, bias_k, token, inside, stride_t, D, BLOCK_D, TILE)
    v = _tile(base + 2 * stride_s, bias_v, token, inside, stride_t, D, BLOCK_D, TILE)
    dk = tl.zeros((TILE, BLOCK_D), tl.float32)
    dv = tl.zeros((TILE, BLOCK_D), tl.float32)
    dbias_q = tl.zeros((BLOCK_D,), tl.float32)
    d = tl.arange(0, BLOCK_D)
    for i in range(0, length, CHUNK):
        query = i + tl.arange(0, CHUNK)
        row, query_inside = first + query, query < length
        q = _tile(base, bias_q, row, query_inside, stride_t, D, BLOCK_D, CHUNK)
        do = _tile(dout + n * D, None, row, query_inside, N * D, D, BLOCK_D, CHUNK)
        # Probabilities of rows without a token are 0: by the mask as keys, by log2_sum as queries.
        at_row = stats + (n.to(tl.int64) * T + first + i) + tl.arange(0, CHUNK)
        top = load_top(at_row, scale, query_inside)
        log2_sum = tl.load(at_row + tl.cast(N, tl.int64) * T, mask=query_inside, other=float("inf"))
        probs = probabilities(dot_transposed(k, q), scale * LOG2_E, top[None, :], log2_sum[None, :])
        probs = tl.where(inside[:, None], probs, 0.0)
        dp = dot_transposed(v, do)
        if rng_state is not None:
            keep = keep_scores(rng_state, n, row, 0, threshold, CHUNK, TILE, True)
            dv = dot(tl.where(keep, probs, 0.0), do, dv)
            dp = tl.where(keep, dp, 0.0)
        else:
            dv = dot(probs, do, dv)
        delta = tl.sum(probs * dp, axis=0)
        dz = rounded(probs * (dp - delta[None, :]), q.dtype)
        dk = dot(dz, q, dk)
        dq = dot(tl.trans(dz), k, None) * (scale * multiplier)
        at = dqkv + (row * 3 * N + n)[:, None] * D + d[None, :]
        tl.store(at, rounded(dq, dqkv.dtype.element_ty), mask=tile_mask(query_inside, d, D, BLOCK_D))
        dbias_q += tl.sum(dq, axis=0)  # rows without a token hold zeros, here and below
    dk *= scale * multiplier
    dv *= multiplier
    at = dqkv + (token * 3 * N + n)[:, None] * D + d[None, :]
    mask = tile_mask(inside, d, D, BLOCK_D)
    tl.store(at + N * D, rounded(dk, dqkv.dtype.element_ty), mask=mask)
    tl.store(at + 2 * N * D, rounded(dv, dqkv.dtype.element_ty), mask=mask)
    if partial is not None:
        sums = partial + (b.to(tl.int64) * 3 * N + n) * D + d
        tl.store(sums, dbias_q, mask=d < D)
        tl.store(sums + N * D, tl.sum(dk, axis=0), mask=d < D)
        tl.store(sums + 2 * N * D, tl.sum(dv, axis=0), mask=d < D)


@triton.jit
def bwd_several_kernel(
    dout, qkv, bias, stats, cu_seqlens, rng_state, dqkv, partial,
    B, N, T, max_seqlen, stride_t, stride_s, stride_n, scale, threshold, multiplier,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """As `bwd_one_kernel`, with several sequences per program and all queries at once."""
    zero_tail(dqkv, None, cu_seqlens, B, N, T, tl.program_id(0), tl.num_programs(0), 3 * N * D)
    n = tl.program_id(0) % N
    group = tl.program_id(0) // N
    token, inside = _rows(cu_seqlens, group * (TILE // BLOCK_S), B, T, max_seqlen, TILE, BLOCK_S)
    base = qkv + n.to(tl.int64) * stride_n
    bias_q = bias if bias is None else bias + n * D
    bias_k = bias if bias is None else bias + (N + n) * D
    bias_v = bias if bias is None else bias + (2 * N + n) * D
    q = _tile(base, bias_q, token, inside, stride_t, D, BLOCK_D, BLOCK_S)
    k = _tile(base + stride_s, bias_k, token, inside, stride_t, D, BLOCK_D, BLOCK_S)
    v = _tile(base + 2 * stride_s, bias_v, token, inside, stride_t, D, BLOCK_D, BLOCK_S)
    do = _tile(dout + n * D, None, token, inside, N * D, D, BLOCK_D, BLOCK_S)
    at_row = stats + n.to(tl.int64) * T + token
    top = tl.expand_dims(_split(load_top(at_row, scale, inside), TILE, BLOCK_S), -2)
    log2_sum = tl.load(at_row + tl.cast(N, tl.int64) * T, mask=inside, other=float("inf"))
    log2_sum = tl.expand_dims(_split(log2_sum, TILE, BLOCK_S), -2)
    real = tl.expand_dims(_split(inside, TILE, BLOCK_S), -1)
    probs = tl.where(real, probabilities(dot_transposed(k, q), scale * LOG2_E, top, log2_sum), 0.0)
    dp = dot_transposed(v, do)
    masked = probs
    if rng_state is not None:
        keep = transpose(_keep(rng_state, n, token, threshold, TILE, BLOCK_S))
        masked = tl.where(keep, probs, 0.0)
        dp = tl.where(keep, dp, 0.0)
    dv = dot(masked, do, None) * multiplier
    delta = tl.expand_dims(tl.sum(probs * dp, axis=-2), -2)
    dz = rounded(probs * (dp - delta), q.dtype)
    dk = dot(dz, q, None) * (scale * multiplier)
    dq = dot(transpose(dz), k, None) * (scale * multiplier)
    dq, dk, dv = dq.reshape(TILE, BLOCK_D), dk.reshape(TILE, BLOCK_D), dv.reshape(TILE, BLOCK_D)
    d = tl.arange(0, BLOCK_D)
    at = dqkv + (token * 3 * N + n)[:, None] * D + d[None, :]
    mask = tile_mask(inside, d, D, BLOCK_D)
    tl.store(at, rounded(dq, dqkv.dtype.element_ty), mask=mask)
    tl.store(at + N * D, rounded(dk, dqkv.dtype.element_ty), mask=mask)
    tl.store(at + 2 * N * D, rounded(dv, dqkv.dtype.element_ty), mask=mask)
    if partial is not None:
        # Rows without a token hold zeros.
        sums = partial + (group.to(tl.int64) * 3 * N + n) * D + d
        tl.store(sums, tl.sum(dq, axis=0), mask=d < D)
        tl.store(sums + N * D, tl.sum(dk, axis=0), mask=d < D)
        tl.store(sums + 2 * N * D, tl.sum(dv, axis=0), mask=d < D)
