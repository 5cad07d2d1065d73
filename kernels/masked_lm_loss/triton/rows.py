"""The row-wise kernels of masked_lm_loss: labelled rows, GeLU and LayerNorm, the loss, column sums.

As in gemm.py the number of rows is read on the device, and each of P programs takes every P-th block of rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_fast.kernels._common.triton_gelu import gelu, gelu_derivative
from bert_fast.kernels.masked_lm_loss.triton.gemm import per_row, rounded, rows_left


@triton.jit
def _is_labelled(labels, t, T, V, ignore_index):
    label = tl.load(labels + t, mask=t < T, other=-1)
    return (label >= 0) & (label < V) & (label != ignore_index)


@triton.jit
def count_kernel(labels, counts, T, V, ignore_index, BLOCK: tl.constexpr):
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(counts + tl.program_id(0), tl.sum(_is_labelled(labels, t, T, V, ignore_index).to(tl.int32), axis=0))


@triton.jit
def index_kernel(labels, ends, index, T, V, ignore_index, BLOCK: tl.constexpr):
    """The labelled rows in rising order; `ends` are the running totals of `count_kernel`'s counts."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    labelled = _is_labelled(labels, t, T, V, ignore_index)
    one = labelled.to(tl.int32)
    place = tl.load(ends + tl.program_id(0)) - tl.sum(one, axis=0) + tl.cumsum(one, axis=0) - 1
    tl.store(index + place, t, mask=labelled)


@triton.jit
def _normalized_gelu(product, dense_bias, places, inside, e, E, eps):
    """u = product + bias, xhat = gelu(u) normalized, and rstd (rows, 1), of a block of rows."""
    u = tl.load(product + places, mask=inside, other=0.0).to(tl.float32)
    u += tl.load(dense_bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    activated = gelu(u)
    centred = tl.where((e < E)[None, :], activated - (tl.sum(activated, axis=1) / E)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) / E + eps)[:, None]
    return u, centred * rstd, rstd


@triton.jit
def transform_kernel(
    product, dense_bias, norm_weight, norm_bias, normed, count, rows, E, eps,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """normed = LayerNorm(gelu(product + dense_bias))."""
    e = tl.arange(0, BLOCK_E)
    weight = tl.load(norm_weight + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(norm_bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    rows = rows_left(count, 0, rows)
    for first in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        places = row[:, None].to(tl.int64) * E + e[None, :]
        inside = (row < rows)[:, None] & (e < E)[None, :]
        _, xhat, _ = _normalized_gelu(product, dense_bias, places, inside, e, E, eps)
        tl.store(normed + places, rounded(xhat * weight + bias, normed), mask=inside)


@triton.jit
def transform_bwd_kernel(
    gradient, product, dense_bias, norm_weight, partial, count, rows, E, eps,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Overwrites dnormed in `gradient` with dproduct.

    partial (programs, 3, E): the terms of dnorm_weight, dnorm_bias and ddense_bias, summed over each program's rows.
    """
    e = tl.arange(0, BLOCK_E)
    weight = tl.load(norm_weight + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_E,), tl.float32)
    dbias = tl.zeros((BLOCK_E,), tl.float32)
    ddense_bias = tl.zeros((BLOCK_E,), tl.float32)
    rows = rows_left(count, 0, rows)
    for first in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        places = row[:, None].to(tl.int64) * E + e[None, :]
        inside = (row < rows)[:, None] & (e < E)[None, :]
        u, xhat, rstd = _normalized_gelu(product, dense_bias, places, inside, e, E, eps)
        dnormed = tl.load(gradient + places, mask=inside, other=0.0).to(tl.float32)
        dweight += tl.sum(dnormed * xhat, axis=0)
        dbias += tl.sum(dnormed, axis=0)
        dxhat = dnormed * weight
        mean, mean_xhat = tl.sum(dxhat, axis=1) / E, tl.sum(dxhat * xhat, axis=1) / E
        dgelu = rstd * (dxhat - mean[:, None] - xhat * mean_xhat[:, None])
        dproduct = tl.where(inside, dgelu * gelu_derivative(u), 0.0)
        ddense_bias += tl.sum(dproduct, axis=0)
        tl.store(gradient + places, rounded(dproduct, gradient), mask=inside)
    scale = per_row(count)
    sums = partial + tl.program_id(0) * 3 * E + e
    tl.store(sums, dweight * scale, mask=e < E)
    tl.store(sums + E, dbias * scale, mask=e < E)
    tl.store(sums + 2 * E, ddense_bias * scale, mask=e < E)


@triton.jit
def _biased(lines, bias, labelled, v, V, VP):
    """Logits v of a block of rows with their bias, -inf from V on. Masking at the padded width VP keeps loads wide."""
    z = tl.load(lines + v[None, :], mask=labelled[:, None] & (v < VP)[None, :], other=0.0).to(tl.float32)
    z += tl.load(bias + v, mask=v < V, other=0.0).to(tl.float32)[None, :]
    return tl.where((v < V)[None, :], z, -float("inf"))


@triton.jit(do_not_specialize=["start", "rows"])
def loss_kernel(
    logits, bias, labels, index, losses, hits, count, start, rows, V, VP, label_smoothing, z_loss,
    GRAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Loss of each row of `logits` (rows, VP) and whether the label is predicted; with GRAD logits becomes dlogits.

    Three passes over a row, the second and third from cache: the maximum first, so that each exponential is computed
    once for the sum and once for the gradient, and no running sum is rescaled.
    """
    rows = rows_left(count, start, rows)
    for first in range(tl.program_id(0) * BLOCK_R, rows, tl.num_programs(0) * BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        labelled = row < rows
        lines = logits + row[:, None].to(tl.int64) * VP
        label = tl.load(labels + tl.load(index + start + row, mask=labelled, other=0), mask=labelled, other=0)[:, None]
        label_logit = tl.load(lines + label, mask=labelled[:, None], other=0.0).to(tl.float32)
        label_logit += tl.load(bias + label, mask=labelled[:, None], other=0.0).to(tl.float32)

        highest = tl.full((BLOCK_R, BLOCK_V), -float("inf"), tl.float32)
        for begin in range(0, V, BLOCK_V):
            highest = tl.maximum(highest, _biased(lines, bias, labelled, begin + tl.arange(0, BLOCK_V), V, VP))
        top = tl.max(highest, axis=1)[:, None]

        exps = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
        below = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
        earlier = tl.zeros((BLOCK_R, BLOCK_V), tl.int32)
        for begin in range(0, V, BLOCK_V):
            v = begin + tl.arange(0, BLOCK_V)
            z = _biased(lines, bias, labelled, v, V, VP)
            exps += tl.exp(z - top)
            below += tl.where((v < V)[None, :], z - top, 0.0)
            earlier += ((z == top) & (v[None, :] < label)).to(tl.int32)
        total = tl.sum(exps, axis=1)[:, None]
        lse = tl.log(total) + top
        loss = tl.log(total) - (1.0 - label_smoothing) * (label_logit - top) + z_loss * lse * lse
        # Selected, not multiplied by 0: with a logit of -inf the product would be NaN.
        loss -= tl.where(label_smoothing > 0.0, label_smoothing * (tl.sum(below, axis=1)[:, None] / V), 0.0)
        hit = (label_logit == top) & (tl.sum(earlier, axis=1)[:, None] == 0)
        tl.store(losses + start + row[:, None], loss, mask=labelled[:, None])
        tl.store(hits + start + row[:, None], hit.to(tl.int32), mask=labelled[:, None])

        if GRAD:
            # The label's logits are read before they are overwritten: the reductions above synchronize all threads.
            factor = (1.0 + 2.0 * z_loss * lse) / total
            for begin in range(0, V, BLOCK_V):
                v = begin + tl.arange(0, BLOCK_V)
                dz = tl.exp(_biased(lines, bias, labelled, v, V, VP) - top) * factor - label_smoothing / V
                dz -= tl.where(v[None, :] == label, 1.0 - label_smoothing, 0.0)
                tl.store(lines + v[None, :], rounded(dz, logits), mask=labelled[:, None] & (v < VP)[None, :])


@triton.jit(do_not_specialize=["start", "rows"])
def column_sum_kernel(
    dlogits, dbias, count, start, rows, VP, ACCUMULATE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_V: tl.constexpr
):
    """dbias (VP,) is the mean over all labelled rows, of which `dlogits` (rows, VP) has a chunk."""
    rows = rows_left(count, start, rows)
    if ACCUMULATE and rows == 0:
        return
    v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    c = tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_C, BLOCK_V), tl.float32)
    for first in range(0, rows, BLOCK_C):
        place = dlogits + (first + c)[:, None].to(tl.int64) * VP + v[None, :]
        sums += tl.load(place, mask=(c < rows - first)[:, None] & (v < VP)[None, :], other=0.0).to(tl.float32)
    total = tl.sum(sums, axis=0) * per_row(count)
    if ACCUMULATE:
        total += tl.load(dbias + v, mask=v < VP, other=0.0)
    tl.store(dbias + v, total, mask=v < VP)


@triton.jit
def multiply_kernel(x, factor, out, size, BLOCK: tl.constexpr):
    """out = factor x, computed in float32; x and out have `size` elements, factor is one number on the device."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(x + i, mask=i < size, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + i, rounded(product, out), mask=i < size)
