"""embedding_layer_norm in Triton: gathers, LayerNorm and dropout in one pass; backward one pass over the tokens for the
gradient ds of their sums, then the sums of ds over the tokens of each table row (segments.py).
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
from bert_fast.kernels.embedding_layer_norm.triton.segments import key_dtype, table_gradients

# From this BLOCK_E on a backward program has registers for two sums over rows and for no parameter.
WIDE = 8192


@triton.jit
def _ids(ids, t, T, rows):
    """Rows of a table to read, clamped to it."""
    return tl.minimum(tl.maximum(tl.load(ids + t, mask=t < T, other=0), 0), rows - 1).to(tl.int32)


@triton.jit
def _row(table, stride, id, e, inside):
    return tl.load(table + id[:, None].to(tl.int64) * stride + e, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _fwd_kernel(
    input_ids, token_type_ids, position_ids, word, token_type, position, weight, bias, rng_state, out, mean, rstd,
    T, words, types, positions, stride_word, stride_type, stride_position, threshold, scale, eps,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, BLOCK_E)[None, :]
    columns = e < E
    inside = columns & (t < T)[:, None]
    if ROWS == 1:
        inside = columns
    s = _row(word, stride_word, _ids(input_ids, t, T, words), e, inside)
    s += _row(position, stride_position, _ids(position_ids, t, T, positions), e, inside)
    s += _row(token_type, stride_type, _ids(token_type_ids, t, T, types), e, inside)
    m, rs = row_statistics(s, columns, E, eps)
    w = tl.load(weight + e, mask=columns, other=0.0).to(tl.float32)
    b = tl.load(bias + e, mask=columns, other=0.0).to(tl.float32)
    y = (s - m[:, None]) * rs[:, None] * w + b
    if rng_state is not None:
        key0, key1, offset = load_rng_state(rng_state)
        keep = keep_tile(key0, key1, offset, tl.full((), 0, tl.int32), t, 0, threshold, ROWS, BLOCK_E)
        y = tl.where(keep, y * scale, 0.0)
    tl.store(out + t[:, None] * E + e, y.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + t, m, mask=t < T)
    tl.store(rstd + t, rs, mask=t < T)


@triton.jit
def _bwd_kernel(
    dout, input_ids, token_type_ids, position_ids, word, token_type, position, weight, mean, rstd, rng_state,
    ds, keys, present, partial,
    T, words, types, positions, stride_dout, stride_word, stride_type, stride_position, threshold, scale, rows,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, STAGES: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """A program owns `rows` tokens, a multiple of ROWS: their ds and keys, and in `partial` a dweight and a dbias.

    `present` (rows of the three tables,) uint8 becomes 1 where a token reads the row.

    The weight stays in registers if HELD, else every step of the loop reads it again, from cache.
    """
    e = tl.arange(0, BLOCK_E)[None, :]
    columns = e < E
    if HELD:
        w = tl.load(weight + e, mask=columns, other=0.0).to(tl.float32)
    dweight = tl.zeros((1, BLOCK_E), tl.float32)
    dbias = tl.zeros((1, BLOCK_E), tl.float32)
    if rng_state is not None:
        key0, key1, offset = load_rng_state(rng_state)
    first = tl.program_id(0).to(tl.int64) * rows
    for start in tl.range(0, rows, ROWS, num_stages=STAGES):
        t = first + start + tl.arange(0, ROWS)
        inside = columns & (t < T)[:, None]
        id = _ids(input_ids, t, T, words)
        type_id = _ids(token_type_ids, t, T, types)
        position_id = _ids(position_ids, t, T, positions)
        # A key is a row of the three tables, concatenated. Several programs may store the same 1.
        type_key, position_key = words + type_id, words + types + position_id
        tl.store(keys + t, id.to(keys.dtype.element_ty), mask=t < T)
        tl.store(keys + T + t, type_key.to(keys.dtype.element_ty), mask=t < T)
        tl.store(keys + 2 * T + t, position_key.to(keys.dtype.element_ty), mask=t < T)
        one = tl.full((ROWS,), 1, tl.uint8)
        tl.store(present + id, one, mask=t < T)
        tl.store(present + type_key, one, mask=t < T)
        tl.store(present + position_key, one, mask=t < T)
        d = tl.load(dout + t[:, None] * stride_dout + e, mask=inside, other=0.0).to(tl.float32)
        s = _row(word, stride_word, id, e, inside)
        s += _row(position, stride_position, position_id, e, inside)
        s += _row(token_type, stride_type, type_id, e, inside)
        m = tl.load(mean + t, mask=t < T, other=0.0)
        rs = tl.load(rstd + t, mask=t < T, other=0.0)
        if rng_state is not None:
            keep = keep_tile(key0, key1, offset, tl.full((), 0, tl.int32), t, 0, threshold, ROWS, BLOCK_E)
            d = tl.where(keep, d * scale, 0.0)
        xhat = tl.where(columns, (s - m[:, None]) * rs[:, None], 0.0)
        if not HELD:
            w = tl.load(weight + e, mask=columns, other=0.0).to(tl.float32)
        dweight += tl.sum(d * xhat, axis=0, keep_dims=True)
        dbias += tl.sum(d, axis=0, keep_dims=True)
        dsum = layer_norm_grad(d * w, xhat, rs, E)
        tl.store(ds + t[:, None] * E + e, dsum.to(ds.dtype.element_ty), mask=inside)
    sums = partial + tl.program_id(0).to(tl.int64) * 2 * E + e
    tl.store(sums, dweight, mask=columns)
    tl.store(sums + E, dbias, mask=columns)


def embedding_layer_norm_fwd(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float,
    eps: float,
    padding_idx: int | None,
    rng_state: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    ids, tables = _inputs((input_ids, token_type_ids, position_ids), (word, token_type, position))
    state, threshold, scale = dropout_arguments(dropout_p, rng_state)
    T, E = input_ids.shape[0], word.shape[1]
    out, mean = word.new_empty((T, E), dtype=out_dtype), word.new_empty(T, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tile = fwd_tile(E)
    launch(
        _fwd_kernel, (ceil_div(T, tile["ROWS"]),),
        *ids, *tables, weight.contiguous(), bias.contiguous(), state, out, mean, rstd, T,
        *(table.shape[0] for table in tables), *(table.stride(0) for table in tables), threshold, scale, eps,
        E=E, **tile,
    )  # fmt: skip
    return out, mean, rstd


def embedding_layer_norm_bwd(
    dout: Tensor,
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout_p: float,
    padding_idx: int | None,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ids, tables = _inputs((input_ids, token_type_ids, position_ids), (word, token_type, position))
    dout, mean, rstd = rows_contiguous(dout), mean.contiguous(), rstd.contiguous()
    state, threshold, scale = dropout_arguments(dropout_p, rng_state)
    T, E = dout.shape
    sizes = [table.shape[0] for table in tables]
    tile = bwd_tile(E)
    tile["ROWS"] = max(1, tile["ROWS"] // 2)  # four inputs, and pointers of gathered rows
    parts, rows = grad_parts(T, tile["ROWS"], tile["num_warps"])
    ds, keys = word.new_empty((T, E)), input_ids.new_empty(3 * T, dtype=key_dtype(sum(sizes)))
    present = word.new_zeros(sum(sizes), dtype=torch.uint8)
    partial = word.new_empty((parts, 2, E), dtype=torch.float32)
    launch(
        _bwd_kernel, (parts,),
        dout, *ids, *tables, weight.contiguous(), mean, rstd, state, ds, keys, present, partial,
        T, *sizes, dout.stride(0), *(table.stride(0) for table in tables), threshold, scale, rows,
        HELD=tile["BLOCK_E"] < WIDE, E=E, **tile,
    )  # fmt: skip
    dword, dtoken_type, dposition = table_gradients(ds, keys, present, sizes, padding_idx)
    dweight, dbias = sum_parts(partial)
    return dword, dtoken_type, dposition, dweight, dbias


def _inputs(ids: tuple[Tensor, ...], tables: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """Contiguous ids, and tables with contiguous rows. Raises ValueError for tokens and an empty table."""
    if ids[0].shape[0] and not all(table.shape[0] for table in tables):
        raise ValueError(f"the tables have {[table.shape[0] for table in tables]} rows; expected at least one each")
    return [index.contiguous() for index in ids], [rows_contiguous(table) for table in tables]
