"""attention in Triton: the launchers, with their choice of kernel; tiles.py has the tiles.

For sequences of up to 128 tokens the kernels of short.py take all keys at once, one kernel forward and one backward;
for longer ones, and in float32, those of long.py iterate over blocks of keys: one kernel forward, two backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.philox import dropout_threshold
from bert_fast.kernels._common.triton_launch import ceil_div, family, launch, next_power_of_2
from bert_fast.kernels.attention.triton import long as triton_long
from bert_fast.kernels.attention.triton import short as triton_short
from bert_fast.kernels.attention.triton.tiles import long_launch, short_launch

LARGEST_D = 256
# Offsets within a tile are 32-bit: 128 rows of a stride below 2^24.
LARGEST_STRIDE = 1 << 24


class _Call:
    """The arguments of `attention_reference` as the kernels take them."""

    def __init__(
        self,
        qkv: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor,
        max_seqlen: int,
        softmax_scale: float,
        dropout_p: float,
        rng_state: Tensor | None,
    ) -> None:
        self.T, _, self.N, self.D = qkv.shape
        if self.D > LARGEST_D:
            raise ValueError(
                f"qkv has a head dimension D of {self.D}; the Triton kernels take at most {LARGEST_D}: "
                "use impl='reference'"
            )
        self.B = cu_seqlens.shape[0] - 1
        self.max_seqlen = min(max_seqlen, self.T)
        if (qkv.stride(3) != 1 and self.D > 1) or qkv.stride(0) >= LARGEST_STRIDE:
            qkv = qkv.contiguous()
        self.qkv, self.cu_seqlens = qkv, cu_seqlens.contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.scale = softmax_scale
        self.threshold = dropout_threshold(dropout_p)
        self.multiplier = 256 / (256 - self.threshold)
        self.rng_state = None if rng_state is None or not self.threshold else rng_state.contiguous()
        self.block_d = max(16, next_power_of_2(self.D))
        kind = (family(qkv.device), qkv.element_size())
        self.short = short_launch(*kind, self.block_d, self.max_seqlen)
        self.long = long_launch(*kind, self.D, self.block_d, self.rng_state is not None)

    @property
    def empty(self) -> bool:
        return not (self.B and self.max_seqlen and self.N)

    @property
    def strides(self) -> tuple[int, int, int]:
        return self.qkv.stride(0), self.qkv.stride(1), self.qkv.stride(2)

    def sizes(self, blocks: int | None = None) -> tuple[int, ...]:
        return (self.B, self.N, self.T, self.max_seqlen, *(() if blocks is None else (blocks,)), *self.strides)


def attention_fwd(*inputs: Any) -> tuple[Tensor, Tensor]:
    c = _Call(*inputs)
    out = c.qkv.new_empty(c.T, c.N, c.D)
    stats = c.qkv.new_empty(2, c.N, c.T, dtype=torch.float32)
    if c.empty:
        return out.zero_(), stats.zero_()
    # The running maximum needs a positive scale: its sign, or 0, is multiplied into the queries.
    sign = (c.scale > 0) - (c.scale < 0)
    scaling = (abs(c.scale) or 1.0, float(sign), c.threshold, c.multiplier)
    tensors = (c.qkv, c.bias, c.cu_seqlens, c.rng_state, out, stats)
    if c.short:
        launch(
            triton_short.fwd_kernel, (ceil_div(c.B, c.short.tile // c.short.block_s) * c.N,),
            *tensors, *c.sizes(), *scaling,
            D=c.D, BLOCK_D=c.block_d, TILE=c.short.tile, BLOCK_S=c.short.block_s, num_warps=c.short.fwd_warps,
        )  # fmt: skip
        return out, stats
    tiles = c.long.fwd
    blocks = ceil_div(c.max_seqlen, tiles.queries)
    launch(
        triton_long.fwd_kernel, (blocks * c.N * c.B,), *tensors, *c.sizes(blocks), *scaling,
        D=c.D, BLOCK_D=c.block_d, BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.maxnreg,
    )  # fmt: skip
    return out, stats


def attention_bwd(
    dout: Tensor, qkv: Tensor, bias: Tensor | None, out: Tensor, stats: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    c = _Call(qkv, bias, *settings)
    dqkv = qkv.new_empty(qkv.shape)
    if c.empty:
        return dqkv.zero_(), qkv.new_zeros(qkv.shape[1:], dtype=torch.float32)
    dout, out, stats = dout.contiguous(), out.contiguous(), stats.contiguous()
    run = _short_bwd if c.short else _long_bwd
    return dqkv, run(c, dout, out, stats, dqkv)


def _new_partial(c: _Call, shape: tuple[int, ...]) -> Tensor | None:
    return None if c.bias is None else c.qkv.new_empty(shape, dtype=torch.float32)


def _short_bwd(c: _Call, dout: Tensor, out: Tensor, stats: Tensor, dqkv: Tensor) -> Tensor:
    assert c.short
    groups = c.B if c.short.chunk else ceil_div(c.B, c.short.tile // c.short.block_s)
    partial = _new_partial(c, (groups, 3, c.N, c.D))
    tensors = (dout, c.qkv, c.bias, stats, c.cu_seqlens, c.rng_state, dqkv, partial)
    rest = (*c.sizes(), c.scale, c.threshold, c.multiplier)
    if c.short.chunk:
        kernel, shape = triton_short.bwd_one_kernel, {"TILE": c.short.block_s, "CHUNK": c.short.chunk}
    else:
        kernel, shape = triton_short.bwd_several_kernel, {"TILE": c.short.tile, "BLOCK_S": c.short.block_s}
    launch(kernel, (groups * c.N,), *tensors, *rest, D=c.D, BLOCK_D=c.block_d, **shape, num_warps=c.short.bwd_warps)
    return dqkv.new_zeros(dqkv.shape[1:], dtype=torch.float32) if partial is None else partial.sum(0)


def _long_bwd(c: _Call, dout: Tensor, out: Tensor, stats: Tensor, dqkv: Tensor) -> Tensor:
    statistics = stats.new_empty(c.N, 5, c.T)
    biased_q = None if c.bias is None else c.qkv.new_empty(out.shape)
    query = c.qkv if biased_q is None else biased_q  # the queries are the first third of qkv
    query_strides = (query.stride(0), query.stride(-2))
    scaling = (c.scale, c.threshold, c.multiplier)

    tiles = c.long.dq
    blocks = ceil_div(c.max_seqlen, tiles.queries)
    dq_partial = _new_partial(c, (c.B * blocks, 1, c.N, c.D))
    launch(
        triton_long.dq_kernel, (blocks * c.N * c.B,),
        dout, c.qkv, c.bias, out, stats, c.cu_seqlens, c.rng_state, dqkv, dq_partial, statistics, biased_q,
        *c.sizes(blocks), *scaling,
        D=c.D, BLOCK_D=c.block_d, BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.maxnreg,
    )  # fmt: skip

    tiles = c.long.dkv
    blocks = ceil_div(c.max_seqlen, tiles.keys)
    dkv_partial = _new_partial(c, (c.B * blocks, 2, c.N, c.D))
    launch(
        triton_long.dkv_kernel, (blocks * c.N * c.B,),
        dout, query, c.qkv, c.cu_seqlens, c.rng_state, dqkv, dkv_partial, statistics,
        *c.sizes(blocks), *query_strides, *scaling,
        D=c.D, BLOCK_D=c.block_d, BLOCK_M=tiles.queries, BLOCK_N=tiles.keys,
        num_warps=tiles.warps, num_stages=tiles.stages, maxnreg=tiles.maxnreg,
    )  # fmt: skip
    if dq_partial is None or dkv_partial is None:
        return dqkv.new_zeros(dqkv.shape[1:], dtype=torch.float32)
    return torch.cat([dq_partial.sum(0), dkv_partial.sum(0)])
