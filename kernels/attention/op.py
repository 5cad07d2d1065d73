"""Operators of attention: fake, gradient, implementations and auto rules."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common import extensions
from bert_fast.kernels._common.dispatch import AutoRule, FunctionSpec, Implementation, Op, Outputs
from bert_fast.kernels._common.library import (
    CUDA_DTYPES,
    TRITON_DTYPES,
    WIDENED_CPU_DTYPES,
    call_operator,
    cuda_kernels,
    define,
    native_cpu,
    triton_kernels,
)
from bert_fast.kernels.attention.reference import attention_reference

LARGEST_CUDA_D = 256  # kMaxDim of csrc/attention/cuda/common.h


def _fwd_fake(qkv: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    """out, and stats (2, N, T) float32: each row's softmax, for the backward pass of the same implementation.

    stats[0] is the highest score before it is multiplied by |softmax_scale|, stats[1] the base-2 logarithm of the sum
    of exp(|softmax_scale| (score - stats[0])): apart, since their sum's rounding error passes any bound with the
    scores. An implementation may leave out of both the bias of the keys, which cancels in softmax.
    """
    total, _three, heads, dim = qkv.shape
    return qkv.new_empty(total, heads, dim), qkv.new_empty(2, heads, total, dtype=torch.float32)


def _bwd_fake(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    out: Tensor,
    stats: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dqkv, dbias; without `bias` dbias is zeros."""
    return qkv.new_empty(qkv.shape), qkv.new_empty(qkv.shape[1:], dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.settings = inputs.max_seqlen, inputs.softmax_scale, inputs.dropout_p
    ctx.save_for_backward(inputs.qkv, inputs.bias, *output, inputs.cu_seqlens, inputs.rng_state)


def _backward(ops: Any, ctx: Any, dout: Tensor, _dstats: Tensor | None) -> dict[str, Tensor | None]:
    # stats is saved for this pass only: the public function doesn't return it, so it has no gradient.
    *tensors, rng_state = ctx.saved_tensors
    bias = tensors[1]
    dqkv, dbias = ops.attention_bwd(dout, *tensors, *ctx.settings, rng_state)
    return {"qkv": dqkv, "bias": None if bias is None else dbias.to(bias.dtype)}


define("attention_bwd", _bwd_fake, symbolic=("max_seqlen",), cuda=True)
define(
    "attention_fwd",
    _fwd_fake,
    arguments_of=attention_reference,
    setup_context=_setup_context,
    backward=_backward,
    symbolic=("max_seqlen",),
    cuda=True,
)
_OPERATORS = ("attention_fwd", "attention_bwd")
_call = call_operator("attention_fwd")


def _call_cuda(ops: Any, qkv: Tensor, *inputs: Any) -> Tensor:
    if qkv.shape[3] > LARGEST_CUDA_D:
        raise ValueError(
            f"qkv has a head dimension D of {qkv.shape[3]}; the CUDA kernels take at most {LARGEST_CUDA_D}: "
            "use impl='reference'"
        )
    return _call(ops, qkv, *inputs)


def _outputs(qkv: Tensor, *_: Any) -> Outputs:
    total, _three, heads, dim = qkv.shape
    return (((total, heads, dim), qkv.dtype),)


OP = Op(
    "attention",
    {
        "reference": Implementation(attention_reference, None, None),
        "triton": triton_kernels(_call, "attention", *_OPERATORS),
        "cuda": dataclasses.replace(
            cuda_kernels(_call_cuda, "attention", *_OPERATORS), limitation=extensions.refused_tensor_map
        ),
        "cpu": native_cpu(_call, *_OPERATORS, activations=1),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            WIDENED_CPU_DTYPES,
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
    functions={"attention": FunctionSpec(attention_reference, _outputs)},
)
