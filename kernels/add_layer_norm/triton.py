"""add_layer_norm in Triton: one pass forward; one pass backward with the sums over rows in registers, then their sum.

Bytes: forward 3 T E elements, backward 5 T E, and 24 E bytes for each part of the rows, which stay in L2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels._common.triton_launch import ceil_div, launch, rows_contiguous
from bert_fast.kernels._common.triton_layer_norm import (
    bwd_tile,
    dropout_arguments,
    fwd_tile,
    grad_parts,
    layer_norm_grad,
    row_statistics,
    sum_parts,
)
from bert_fast.kernels._common.triton_philox import keep_tile, load_rng_state

# From this BLOCK_E on a backward program has registers for two sums over rows and for no parameter.
WIDE = 8192
COLUMN_ROWS, COLUMNS = 8, 512


@triton.jit
def _fwd_kernel(
    x, residual, weight, bias, x_bias, rng_state, out, mean, rstd,
    T, stride_x, stride_residual, threshold, scale, eps,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    columns = e < E
    inside = columns & (t < T)[:, None]
    if ROWS == 1:
        inside = columns
    s = tl.load(x + t[:, None] * stride_x + e, mask=inside, other=0.0).to(tl.float32)
    r = tl.load(residual + t[:, None] * stride_residual + e, mask=inside, other=0.0).to(tl.float32)
    if x_bias is not None:
        s += tl.load(x_bias + e, mask=columns, other=0.0).to(tl.float32)
    if rng_state is not None:
        key0, key1, offset = load_rng_state(rng_state)
        keep = keep_tile(key0, key1, offset, tl.full((), 0, tl.int32), t, 0, threshold, ROWS, BLOCK_E)
        s = tl.where(keep, s * scale, 0.0)
    s += r
    m, rs = row_statistics(s, columns, E, eps)
    w = tl.load(weight + e, mask=columns, other=0.0).to(tl.float32)
    b = tl.load(bias + e, mask=columns, other=0.0).to(tl.float32)
    y = (s - m[:, None]) * rs[:, None] * w + b
    tl.store(out + t[:, None] * E + e, y.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + t, m, mask=t < T)
    tl.store(rstd + t, rs, mask=t < T)


@triton.jit
def _bwd_kernel(
    dout, x, residual, weight, x_bias, mean, rstd, rng_state, dx, dresidual, partial,
    T, stride_dout, stride_x, stride_residual, stride_partial, threshold, scale, rows,
    SUMS: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr,
    HELD: tl.constexpr,
):  # fmt: skip
    """A program owns `rows` rows, a multiple of ROWS, and a row of `partial`: dweight, dbias and, with SUMS 3, dx_bias.

    The parameters stay in registers if HELD, else every step of the loop reads them again, from cache.
    """
    e = tl.arange(0, BLOCK_E)[None, :]
    columns = e < E
    if HELD:
        w = tl.load(weight + e, mask=columns, other=0.0).to(tl.float32)
        if x_bias is not None:
            b = tl.load(x_bias + e, mask=columns, other=0.0).to(tl.float32)
    dweight = tl.zeros((1, BLOCK_E), tl.float32)
    dbias = tl.zeros((1, BLOCK_E), tl.float32)
    if SUMS == 3:
        dx_bias = tl.zeros((1, BLOCK_E), tl.float32)
    if rng_state is not None:
        key0, key1, offset = load_rng_state(rng_state)
    first = tl.program_id(0).to(tl.int64) * rows
    for start in tl.range(0, rows, ROWS, num_stages=STAGES):
        t = first + start + tl.arange(0, ROWS)
        inside = columns & (t < T)[:, None]
        s = tl.load(x + t[:, None] * stride_x + e, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(residual + t[:, None] * stride_residual + e, mask=inside, other=0.0).to(tl.float32)
        m = tl.load(mean + t, mask=t < T, other=0.0)
        rs = tl.load(rstd + t, mask=t < T, other=0.0)
        if x_bias is not None:
            if not HELD:
                b = tl.load(x_bias + e, mask=columns, other=0.0).to(tl.float32)
            s += b
        if rng_state is not None:
            keep = keep_tile(key0, key1, offset, tl.full((), 0, tl.int32), t, 0, threshold, ROWS, BLOCK_E)
            s = tl.where(keep, s * scale, 0.0)
        xhat = tl.where(columns, (s + r - m[:, None]) * rs[:, None], 0.0)
        d = tl.load(dout + t[:, None] * stride_dout + e, mask=inside, other=0.0).to(tl.float32)
        dweight += tl.sum(d * xhat, axis=0, keep_dims=True)
        dbias += tl.sum(d, axis=0, keep_dims=True)
        if not HELD:
            w = tl.load(weight + e, mask=columns, other=0.0).to(tl.float32)
        ds = layer_norm_grad(d * w, xhat, rs, E)
        tl.store(dresidual + t[:, None] * E + e, ds.to(dresidual.dtype.element_ty), mask=inside)
        if rng_state is not None:
            ds = tl.where(keep, ds * scale, 0.0)
        tl.store(dx + t[:, None] * E + e, ds.to(dx.dtype.element_ty), mask=inside)
        if SUMS == 3:
            dx_bias += tl.sum(ds, axis=0, keep_dims=True)
    sums = partial + tl.program_id(0).to(tl.int64) * stride_partial + e
    tl.store(sums, dweight, mask=columns)
    tl.store(sums + E, dbias, mask=columns)
    if SUMS == 3:
        tl.store(sums + 2 * E, dx_bias, mask=columns)


@triton.jit
def _column_sum_kernel(x, sums, T, rows, stride_sums, E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """Row i of `sums` is the sum over `rows` rows, a multiple of ROWS, of the contiguous x (T, E)."""
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)[None, :]
    first = tl.program_id(0).to(tl.int64) * rows
    total = tl.zeros((ROWS, BLOCK_E), tl.float32)
    for start in range(0, rows, ROWS):
        t = first + start + tl.arange(0, ROWS)[:, None]
        total += tl.load(x + t * E + e, mask=(t < T) & (e < E), other=0.0).to(tl.float32)
    tl.store(sums + tl.program_id(0).to(tl.int64) * stride_sums + e, tl.sum(total, axis=0, keep_dims=True), mask=e < E)


def add_layer_norm_fwd(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    eps: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    x, residual = rows_contiguous(x), rows_contiguous(residual)
    state, threshold, scale = dropout_arguments(dropout_p, rng_state)
    T, E = x.shape
    out, mean = x.new_empty(x.shape), x.new_empty(T, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tile = fwd_tile(E)
    launch(
        _fwd_kernel, (ceil_div(T, tile["ROWS"]),),
        x, residual, weight.contiguous(), bias.contiguous(), None if x_bias is None else x_bias.contiguous(), state,
        out, mean, rstd, T, x.stride(0), residual.stride(0), threshold, scale, eps, E=E, **tile,
    )  # fmt: skip
    return out, mean, rstd


def add_layer_norm_bwd(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    x_bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dout, x, residual = rows_contiguous(dout), rows_contiguous(x), rows_contiguous(residual)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    state, threshold, scale = dropout_arguments(dropout_p, rng_state)
    T, E = x.shape
    tile = bwd_tile(E)
    parts, rows = grad_parts(T, tile["ROWS"], tile["num_warps"])
    dx, dresidual = x.new_empty(x.shape), x.new_empty(x.shape)
    partial = x.new_empty((parts, 2 if x_bias is None else 3, E), dtype=torch.float32)
    held = tile["BLOCK_E"] < WIDE
    separate_dx_bias = x_bias is not None and not held
    launch(
        _bwd_kernel, (parts,),
        dout, x, residual, weight.contiguous(), None if x_bias is None else x_bias.contiguous(), mean, rstd, state,
        dx, dresidual, partial, T, dout.stride(0), x.stride(0), residual.stride(0), partial.stride(0), threshold,
        scale, rows, SUMS=2 if separate_dx_bias else partial.shape[1], HELD=held, E=E, **tile,
    )  # fmt: skip
    if separate_dx_bias:
        launch(
            _column_sum_kernel, (parts, ceil_div(E, COLUMNS)), dx, partial[:, 2], T, rows, partial.stride(0),
            E=E, ROWS=COLUMN_ROWS, BLOCK_E=COLUMNS,
        )  # fmt: skip
    sums = sum_parts(partial)
    return dx, dresidual, sums[0], sums[1], partial.new_empty(0) if x_bias is None else sums[2]
