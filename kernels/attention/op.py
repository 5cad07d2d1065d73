"""Operators of attention: schema, fake, gradient. The kernels register themselves for the dispatch keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, Implementation, Op
from bert_fast.kernels._common.library import (
    CUDA_DTYPES,
    NATIVE_CPU_DTYPES,
    TRITON_DTYPES,
    cuda_kernels,
    define,
    native_cpu,
    triton_kernels,
)
from bert_fast.kernels.attention.reference import attention_reference

LARGEST_CUDA_D = 256  # kMaxDim of csrc/attention/cuda/common.h


def _fwd_fake(
    qkv: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    total, _, heads, dim = qkv.shape
    return qkv.new_empty(total, heads, dim), qkv.new_empty(heads, total, dtype=torch.float32)


def _bwd_fake(dout: Tensor, qkv: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[1:], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    qkv, bias, cu_seqlens, ctx.max_seqlen, ctx.softmax_scale, ctx.dropout_p, rng_state = inputs
    ctx.save_for_backward(qkv, bias, *output, cu_seqlens, rng_state)


def _backward(ops: Any, ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    # dlse is dropped: lse is there for the backward pass, and the door doesn't hand it out.
    qkv, bias, out, lse, cu_seqlens, rng_state = ctx.saved_tensors
    dqkv, dbias = ops.attention_bwd(
        dout, qkv, bias, out, lse, cu_seqlens, ctx.max_seqlen, ctx.softmax_scale, ctx.dropout_p, rng_state
    )
    return dqkv, None if bias is None else dbias.to(bias.dtype), None, None, None, None, None


_REST = "Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale, float dropout_p, Tensor? rng_state"
define(
    "attention_bwd",
    f"(Tensor dout, Tensor qkv, Tensor? bias, Tensor out, Tensor lse, {_REST}) -> (Tensor dqkv, Tensor dbias)",
    fake=_bwd_fake,
    cuda=True,
)
define(
    "attention_fwd",
    f"(Tensor qkv, Tensor? bias, {_REST}) -> (Tensor out, Tensor lse)",
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    cuda=True,
)


def _run(ops: Any, *arguments: Any) -> Tensor:
    out: Tensor = ops.attention_fwd(*arguments)[0]
    return out


def _run_cuda(ops: Any, qkv: Tensor, *arguments: Any) -> Tensor:
    if qkv.shape[3] > LARGEST_CUDA_D:
        raise ValueError(
            f"qkv has a head dimension D of {qkv.shape[3]}; the CUDA kernels take at most {LARGEST_CUDA_D}: "
            "use impl='reference'"
        )
    return _run(ops, qkv, *arguments)


OP = Op(
    "attention",
    {
        "reference": Implementation(attention_reference, None, None),
        "triton": triton_kernels(_run, "attention", "attention_fwd", "attention_bwd"),
        "cuda": cuda_kernels(_run_cuda, "attention", "attention_fwd", "attention_bwd"),
        "cpu": native_cpu(_run, "attention_fwd", "attention_bwd"),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            NATIVE_CPU_DTYPES,
            measured="1 thread of 2 AVX2 cores, 2026-11-21, N 12, D 64, forward + backward, reference / cpu: "
            "fp32 1.6 at 8 x 128 and 2.0 at 2 x 512, bf16 9.8 and 16.7; README.md has the table",
        ),
        AutoRule(
            "triton",
            "cuda",
            TRITON_DTYPES,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); by count of bytes: no (S, S) matrix in "
            "memory, S = 512, D 64, bf16: 0.5 KB a token and head forward where the reference moves 5 KB",
        ),
        AutoRule(
            "cuda",
            "cuda",
            CUDA_DTYPES,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); as many bytes as triton forward, and "
            "Hopper's wgmma for D 64 and 128 alone: so triton comes first",
        ),
    ),
)
