"""Long regime of attention in Triton: online softmax forward; backward a kernel for dq and one for dk and dv.

A program owns a block of queries (or of keys) of one (sequence, head) and iterates over the keys (or queries). No two
programs write the same element, so there are no atomics and the bits don't depend on the order of programs.

Tiles that are loaded in a loop go from memory to the tensor cores unchanged: the biases of keys and values are applied
through vectors (README, "The bias without touching the tiles"). Names ending in 2 are logarithms to base 2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_fast.kernels._common.triton_support import INTERPRETED as _INTERPRETED
from bert_fast.kernels.attention.triton.dropout import keep_scores

INTERPRETED = tl.constexpr(_INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def rounded(x, dtype):
    """x in `dtype`, its own or a narrower one, rounded to nearest."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        # Triton 3.6's interpreter truncates, which biases sums of one sign.
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + ((bits >> 16) & 1) + 0x7FFF) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b, a rounded to the dtype of b, accumulated in float32; None for an acc of zeros."""
    if b.dtype == tl.float32:
        acc = tl.dot(a, b, acc, input_precision="ieee")  # not rounded to tf32
    elif INTERPRETED:
        # Triton 3.6's interpreter multiplies the bits of bfloat16 as integers.
        acc = tl.dot(rounded(a, b.dtype).to(tl.float32), b.to(tl.float32), acc)
    else:
        acc = tl.dot(a.to(b.dtype), b, acc)
    return acc


@triton.jit
def transpose(x):
    """Swaps the last two dimensions."""
    if len(x.shape) == 3:
        x = tl.permute(x, (0, 2, 1))
    else:
        x = tl.trans(x)
    return x


@triton.jit
def dot_transposed(a, b):
    """a b^T, of one dtype. An element has the same bits in every tile, and in b a^T (`probabilities` relies on it)."""
    if INTERPRETED:
        # A GPU adds in an order that depends on the summed index alone, numpy's product in one of the shapes.
        products = tl.expand_dims(a.to(tl.float32), -2) * tl.expand_dims(b.to(tl.float32), -3)
        product = tl.sum(products, axis=-1)
    else:
        product = dot(a, transpose(b), None)
    return product


@triton.jit
def tile_mask(inside, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(rows, BLOCK_D): the row is inside and the column is below D."""
    if D == BLOCK_D:
        mask = inside[:, None] & (d >= 0)[None, :]
    else:
        mask = inside[:, None] & (d < D)[None, :]
    return mask


@triton.jit
def load_vector(x, d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """(BLOCK_D,) float32."""
    if D == BLOCK_D:
        vector = tl.load(x + d)
    else:
        vector = tl.load(x + d, mask=d < D, other=0.0)
    return vector.to(tl.float32)


@triton.jit
def probabilities(scores, scale2, top, log2_sum):
    """P, with the scores that the forward pass computed: the exponent is exactly -log2_sum at the highest of a row.

    For that the difference comes first: scores * scale2 and top * scale2 alone have rounding errors that pass any bound
    of exp2 where scores are large. The limit of 0 holds where another order of sums makes a score exceed `top`.
    """
    return tl.exp2(tl.minimum((scores - top) * scale2 - log2_sum, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def load_top(stats, scale, mask):
    """The score of each row whose product with `scale` is the highest; `stats` holds its product with scale's sign.

    Where there is no row it is higher than any score, and the second of `stats` is to be infinite: P is 0 then.
    """
    top = tl.load(stats, mask=mask, other=3e38)
    return tl.where(scale < 0, -top, top)


@triton.jit
def zero_tail(x, stats, cu_seqlens, B, N, T, index, count, ROW: tl.constexpr):
    """Zero the rows of `x` (T, ROW) and `stats` (2, N, T) after the last sequence; each program takes a share.

    A packed batch of static shape ends in rows of no sequence. Without such rows the loops do nothing.
    """
    tail = tl.minimum(tl.maximum(tl.load(cu_seqlens + B).to(tl.int64), 0), T)
    lane = tl.arange(0, 256)
    size = (T - tail) * ROW
    for e in range(index.to(tl.int64) * 256, size, count * 256):
        tl.store(x + tail * ROW + e + lane, tl.zeros((256,), x.dtype.element_ty), mask=lane < size - e)
    if stats is not None:
        for t in range(tail + index.to(tl.int64) * 256, T, count * 256):
            at = stats + t + lane
            for _ in range(2 * N):
                tl.store(at, tl.zeros((256,), tl.float32), mask=lane < T - t)
                at += T


@triton.jit
def _program(cu_seqlens, N, T, max_seqlen, blocks, BLOCK: tl.constexpr):
    """(sequence, head, block, the block's first row, first token, length) of a program.

    For any cu_seqlens tokens first to first + length - 1 are within the packed batch and length <= max_seqlen.
    """
    index = tl.program_id(0)
    block = index % blocks
    n = index // blocks % N
    b = index // blocks // N
    first = tl.load(cu_seqlens + b).to(tl.int64)
    first = tl.minimum(tl.maximum(first, 0), T)
    end = tl.load(cu_seqlens + b + 1).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.minimum(end, T) - first, 0), max_seqlen).to(tl.int32)
    return b, n, block, block * BLOCK, first, length


@triton.jit
def _tile(x, rows, stride, length, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a sequence, (rows, BLOCK_D); zeros past its end, where another sequence may have a NaN."""
    d = tl.arange(0, BLOCK_D)
    pointers = x + rows[:, None] * stride + d[None, :]
    if MASKED:
        tile = tl.load(pointers, mask=tile_mask(rows < length, d, D, BLOCK_D), other=0.0)
    elif D == BLOCK_D:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(d < D)[None, :], other=0.0)
    return tile


@triton.jit
def _query_tile(q, bias, n, rows, stride, length, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """q + bias, rounded to the dtype of q."""
    tile = _tile(q, rows, stride, length, D, BLOCK_D, True)
    if bias is not None:
        vector = load_vector(bias + n * D, tl.arange(0, BLOCK_D), D, BLOCK_D)
        tile = rounded(tile.to(tl.float32) + vector[None, :], tile.dtype)
    return tile


@triton.jit
def _fwd_step(
    m, total, kept_sum, acc, q, k, v, j, stride_t, length, scale2, rng_state, n, tokens, threshold,
    HAS_BIAS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running maximum m, the sums total of P and kept_sum of P M, and acc = (P M) V."""
    columns = tl.arange(0, BLOCK_N)
    offset = tl.cast(j, tl.int64) * stride_t
    keys = _tile(k + offset, columns, stride_t, length - j, D, BLOCK_D, MASKED)
    scores = dot_transposed(q, keys)
    if MASKED:
        scores = tl.where((columns < length - j)[None, :], scores, float("-inf"))
    new_m = tl.maximum(m, tl.max(scores, axis=1))
    probs = tl.exp2((scores - new_m[:, None]) * scale2)  # not s * scale2 - m * scale2, whose rounding error grows
    decay = tl.exp2((m - new_m) * scale2)
    total = total * decay + tl.sum(probs, axis=1)
    if rng_state is not None:
        keep = keep_scores(rng_state, n, tokens, j // 16, threshold, tokens.shape[0], BLOCK_N, False)
        probs = tl.where(keep, probs, 0.0)
        if HAS_BIAS:
            kept_sum = kept_sum * decay + tl.sum(probs, axis=1)
    values = _tile(v + offset, columns, stride_t, length - j, D, BLOCK_D, MASKED)
    acc = dot(probs, values, acc * decay[:, None])
    return new_m, total, kept_sum, acc


@triton.jit
def fwd_kernel(
    qkv, bias, cu_seqlens, rng_state, out, stats, B, N, T, max_seqlen, blocks, stride_t, stride_s, stride_n,
    scale, sign, threshold, multiplier,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries and iterates over the keys."""
    zero_tail(out, stats, cu_seqlens, B, N, T, tl.program_id(0), tl.num_programs(0), N * D)
    _, n, _, i, first, length = _program(cu_seqlens, N, T, max_seqlen, blocks, BLOCK_M)
    if i >= length:
        return
    scale2 = scale * LOG2_E
    rows, d = i + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    base = qkv + first * stride_t + n.to(tl.int64) * stride_n
    local = tl.arange(0, BLOCK_M)
    q = _query_tile(base + tl.cast(i, tl.int64) * stride_t, bias, n, local, stride_t, length - i, D, BLOCK_D)
    q = (q.to(tl.float32) * sign).to(q.dtype)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    kept_sum = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tokens = (first + rows).to(tl.uint32)
    k, v = base + stride_s, base + 2 * stride_s
    # Full blocks of keys need no mask; in float32 and at large D registers suffice for one copy of the step only.
    FULL: tl.constexpr = qkv.dtype.element_ty != tl.float32 and BLOCK_D <= 128
    full = length
    if FULL:
        full = length // BLOCK_N * BLOCK_N
    for j in range(0, full, BLOCK_N):
        m, total, kept_sum, acc = _fwd_step(
            m, total, kept_sum, acc, q, k, v, j, stride_t, length, scale2, rng_state, n, tokens, threshold,
            bias is not None, D, BLOCK_D, BLOCK_N, not FULL,
        )  # fmt: skip
    if full < length:
        m, total, kept_sum, acc = _fwd_step(
            m, total, kept_sum, acc, q, k, v, full, stride_t, length, scale2, rng_state, n, tokens, threshold,
            bias is not None, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    acc = acc * (multiplier / total)[:, None]
    if bias is not None:
        bias_v = load_vector(bias + (2 * N + n) * D, d, D, BLOCK_D)
        if rng_state is not None:
            acc += (kept_sum * multiplier / total)[:, None] * bias_v[None, :]
        else:
            acc += bias_v[None, :]
    at = out + ((first + rows) * N + n)[:, None] * D + d[None, :]
    tl.store(at, rounded(acc, out.dtype.element_ty), mask=tile_mask(rows < length, d, D, BLOCK_D))
    at_row = stats + n.to(tl.int64) * T + first + rows
    tl.store(at_row, m, mask=rows < length)
    tl.store(at_row + tl.cast(N, tl.int64) * T, tl.log2(total), mask=rows < length)


@triton.jit
def _dz(probs, dp, shift, dropped, keep, DROPOUT: tl.constexpr):
    """dZ / multiplier = P (M' dP - delta'), M' the keep mask: shift adds the bias terms, dropped is -delta'."""
    if DROPOUT:
        dz = probs * tl.where(keep, dp + shift, dropped)
    else:
        dz = probs * (dp + shift)
    return dz


@triton.jit
def _dq_step(
    acc, total, excess, weighted, q, dout, k, v, j, stride_t, length, scale2, top, log2_sum, shift, dropped,
    rng_state, n, tokens, threshold,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block of keys: acc = dZ K; for float32 also the sums total of P and excess of dZ, and weighted = P K.

    With an exact log2_sum and delta, total is 1 and excess 0: their deviations measure the rounding errors of the two.
    """
    columns = tl.arange(0, BLOCK_N)
    offset = tl.cast(j, tl.int64) * stride_t
    keys = _tile(k + offset, columns, stride_t, length - j, D, BLOCK_D, MASKED)
    scores = dot_transposed(q, keys)
    probs = probabilities(scores, scale2, top[:, None], log2_sum[:, None])
    if MASKED:
        probs = tl.where((columns < length - j)[None, :], probs, 0.0)
    values = _tile(v + offset, columns, stride_t, length - j, D, BLOCK_D, MASKED)
    dp = dot_transposed(dout, values)
    if rng_state is not None:
        keep = keep_scores(rng_state, n, tokens, j // 16, threshold, tokens.shape[0], BLOCK_N, False)
        dz = _dz(probs, dp, shift[:, None], dropped[:, None], keep, True)
    else:
        dz = _dz(probs, dp, shift[:, None], 0.0, 0, False)
    if keys.dtype == tl.float32:
        total += tl.sum(probs, axis=1)
        excess += tl.sum(dz, axis=1)
        weighted = tl.dot(probs, keys, weighted, input_precision="tf32")  # excess is a few eps, so 11 bits suffice
    return dot(dz, keys, acc), total, excess, weighted


@triton.jit
def dq_kernel(
    dout, qkv, bias, out, stats, cu_seqlens, rng_state, dqkv, partial, statistics, biased_q,
    B, N, T, max_seqlen, blocks, stride_t, stride_s, stride_n, scale, threshold, multiplier,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries and iterates over the keys.

    For `dkv_kernel` it also writes q + bias to `biased_q` (T, N, D), and to `statistics` (N, 5, T) float32: the two
    vectors of `probabilities`, the two of `_dz`, and for float32 the factor that makes the sum of P 1.
    """
    zero_tail(dqkv, None, cu_seqlens, B, N, T, tl.program_id(0), tl.num_programs(0), 3 * N * D)
    b, n, block, i, first, length = _program(cu_seqlens, N, T, max_seqlen, blocks, BLOCK_M)
    rows, d = i + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    sums = partial if partial is None else partial + ((b.to(tl.int64) * blocks + block) * N + n) * D
    if i >= length:
        if sums is not None:
            tl.store(sums + d, tl.zeros((BLOCK_D,), tl.float32), mask=d < D)
        return
    inside = rows < length
    base = qkv + first * stride_t + n.to(tl.int64) * stride_n
    local = tl.arange(0, BLOCK_M)
    q = _query_tile(base + tl.cast(i, tl.int64) * stride_t, bias, n, local, stride_t, length - i, D, BLOCK_D)
    packed = ((first + i) * N + n) * D
    do = _tile(dout + packed, local, N * D, length - i, D, BLOCK_D, True)
    o = _tile(out + packed, local, N * D, length - i, D, BLOCK_D, True)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), axis=1) / multiplier
    shift = -delta
    # Probabilities of rows past the end are 0.
    at_row = stats + n.to(tl.int64) * T + first + rows
    top = load_top(at_row, scale, inside)
    log2_sum = tl.load(at_row + tl.cast(N, tl.int64) * T, mask=inside, other=float("inf"))
    scale2 = scale * LOG2_E
    if bias is not None:
        bias_v = load_vector(bias + (2 * N + n) * D, d, D, BLOCK_D)
        shift += tl.sum(do.to(tl.float32) * bias_v[None, :], axis=1)
        at = biased_q + packed + (local * N * D)[:, None] + d[None, :]
        tl.store(at, q, mask=tile_mask(inside, d, D, BLOCK_D))
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    excess = tl.zeros((BLOCK_M,), tl.float32)
    weighted = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    tokens = (first + rows).to(tl.uint32)
    k, v = base + stride_s, base + 2 * stride_s
    FULL: tl.constexpr = qkv.dtype.element_ty != tl.float32 and BLOCK_D <= 128
    full = length
    if FULL:
        full = length // BLOCK_N * BLOCK_N
    for j in range(0, full, BLOCK_N):
        acc, total, excess, weighted = _dq_step(
            acc, total, excess, weighted, q, do, k, v, j, stride_t, length, scale2, top, log2_sum, shift, -delta,
            rng_state, n, tokens, threshold, D, BLOCK_D, BLOCK_N, not FULL,
        )  # fmt: skip
    if full < length:
        acc, total, excess, weighted = _dq_step(
            acc, total, excess, weighted, q, do, k, v, full, stride_t, length, scale2, top, log2_sum, shift, -delta,
            rng_state, n, tokens, threshold, D, BLOCK_D, BLOCK_N, True,
        )  # fmt: skip
    row_statistics = statistics + 5 * n.to(tl.int64) * T + first + rows
    if dqkv.dtype.element_ty == tl.float32:
        normal = 1.0 / tl.where(inside, total, 1.0)
        excess *= normal
        acc = (acc - excess[:, None] * weighted) * normal[:, None]
        shift -= excess
        delta += excess
        tl.store(row_statistics + 4 * tl.cast(T, tl.int64), normal, mask=inside)
    tl.store(row_statistics, top, mask=inside)
    tl.store(row_statistics + T, log2_sum, mask=inside)
    tl.store(row_statistics + 2 * tl.cast(T, tl.int64), shift, mask=inside)
    if rng_state is not None:
        tl.store(row_statistics + 3 * tl.cast(T, tl.int64), -delta, mask=inside)
    acc *= scale * multiplier
    at = dqkv + ((first + rows) * 3 * N + n)[:, None] * D + d[None, :]
    tl.store(at, rounded(acc, dqkv.dtype.element_ty), mask=tile_mask(inside, d, D, BLOCK_D))
    if sums is not None:
        tl.store(sums + d, tl.sum(acc, axis=0), mask=d < D)  # rows past the end hold zeros


@triton.jit
def dkv_kernel(
    dout, query, qkv, cu_seqlens, rng_state, dqkv, partial, statistics,
    B, N, T, max_seqlen, blocks, stride_t, stride_s, stride_n, query_stride_t, query_stride_n,
    scale, threshold, multiplier,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N keys and iterates over the queries; its tiles are transposed, a row for each key.

    `query` holds q + bias: `biased_q` of `dq_kernel`, or without a bias `qkv`.
    """
    b, n, block, j, first, length = _program(cu_seqlens, N, T, max_seqlen, blocks, BLOCK_N)
    rows, d = j + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    sums = partial if partial is None else partial + ((b.to(tl.int64) * blocks + block) * 2 * N + n) * D
    if j >= length:
        if sums is not None:
            tl.store(sums + d, tl.zeros((BLOCK_D,), tl.float32), mask=d < D)
            tl.store(sums + N * D + d, tl.zeros((BLOCK_D,), tl.float32), mask=d < D)
        return
    base = qkv + first * stride_t + n.to(tl.int64) * stride_n
    keys, local = base + tl.cast(j, tl.int64) * stride_t, tl.arange(0, BLOCK_N)
    k = _tile(keys + stride_s, local, stride_t, length - j, D, BLOCK_D, True)
    v = _tile(keys + 2 * stride_s, local, stride_t, length - j, D, BLOCK_D, True)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    scale2 = scale * LOG2_E
    queries = tl.arange(0, BLOCK_M)
    for i in range(0, length, BLOCK_M):
        inside = queries < length - i
        token = first + i + queries
        at = statistics + (5 * n.to(tl.int64) * T + first + i)
        # Past the end probabilities are 0, whatever the other values.
        top = tl.load(at + queries, mask=inside, other=0.0)
        log2_sum = tl.load(at + T + queries, mask=inside, other=float("inf"))
        shift = tl.load(at + 2 * tl.cast(T, tl.int64) + queries, mask=inside, other=0.0)
        q = _tile(
            query + (first + i) * query_stride_t + tl.cast(n, tl.int64) * query_stride_n,
            queries, query_stride_t, length - i, D, BLOCK_D, True,
        )  # fmt: skip
        scores = dot_transposed(k, q)
        probs = probabilities(scores, scale2, top[None, :], log2_sum[None, :])
        if q.dtype == tl.float32:
            probs *= tl.load(at + 4 * tl.cast(T, tl.int64) + queries, mask=inside, other=0.0)[None, :]
        do = _tile(dout + ((first + i) * N + n) * D, queries, N * D, length - i, D, BLOCK_D, True)
        dp = dot_transposed(v, do)
        if rng_state is not None:
            keep = keep_scores(rng_state, n, token, j // 16, threshold, BLOCK_M, BLOCK_N, True)
            dropped = tl.load(at + 3 * tl.cast(T, tl.int64) + queries, mask=inside, other=0.0)
            dv = dot(tl.where(keep, probs, 0.0), do, dv)
            dz = _dz(probs, dp, shift[None, :], dropped[None, :], keep, True)
        else:
            dv = dot(probs, do, dv)
            dz = _dz(probs, dp, shift[None, :], 0.0, 0, False)
        dk = dot(dz, q, dk)
    dk *= scale * multiplier
    dv *= multiplier
    mask = tile_mask(rows < length, d, D, BLOCK_D)
    at = dqkv + ((first + rows) * 3 * N + n)[:, None] * D + d[None, :]
    tl.store(at + N * D, rounded(dk, dqkv.dtype.element_ty), mask=mask)
    tl.store(at + 2 * N * D, rounded(dv, dqkv.dtype.element_ty), mask=mask)
    if sums is not None:
        tl.store(sums + d, tl.sum(tl.where(mask, dk, 0.0), axis=0), mask=d < D)
        tl.store(sums + N * D + d, tl.sum(tl.where(mask, dv, 0.0), axis=0), mask=d < D)
