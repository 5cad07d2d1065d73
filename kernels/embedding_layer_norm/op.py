"""Operators of embedding_layer_norm: schema, fake, gradient. The kernels register themselves for the dispatch keys."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, Implementation, Op
from bert_fast.kernels._common.library import NATIVE_CPU_DTYPES, TRITON_DTYPES, define, native_cpu, triton_kernels
from bert_fast.kernels.embedding_layer_norm.reference import embedding_layer_norm_reference


def _fwd_fake(
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
    statistics = word.new_empty(input_ids.shape[0], dtype=torch.float32)
    out = word.new_empty((input_ids.shape[0], word.shape[1]), dtype=out_dtype)
    return out, statistics, torch.empty_like(statistics)


def _bwd_fake(
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
    dweight, dbias = (word.new_empty(word.shape[1], dtype=torch.float32) for _ in range(2))
    return word.new_empty(word.shape), word.new_empty(token_type.shape), word.new_empty(position.shape), dweight, dbias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *indices_tables_weight, bias, ctx.dropout_p, _, ctx.padding_idx, rng_state, _ = inputs
    _, mean, rstd = output
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*indices_tables_weight, mean, rstd, rng_state)


def _backward(ops: Any, ctx: Any, dout: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    *saved, rng_state = ctx.saved_tensors
    weight = saved[6]
    dword, dtoken_type, dposition, dweight, dbias = ops.embedding_layer_norm_bwd(
        dout, *saved, ctx.dropout_p, ctx.padding_idx, rng_state
    )
    none_for_ids = (None, None, None)
    parameters = (dweight.to(weight.dtype), dbias.to(ctx.bias_dtype))
    return (*none_for_ids, dword, dtoken_type, dposition, *parameters, None, None, None, None, None)


# The gradients of the tables have the tables' dtype: they are added up in float32 and rounded once, and the largest of
# them is not written a second time for a cast.
define(
    "embedding_layer_norm_bwd",
    "(Tensor dout, Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor word, Tensor token_type, "
    "Tensor position, Tensor weight, Tensor mean, Tensor rstd, float dropout_p, int? padding_idx, Tensor? rng_state) "
    "-> (Tensor dword, Tensor dtoken_type, Tensor dposition, Tensor dweight, Tensor dbias)",
    fake=_bwd_fake,
)
define(
    "embedding_layer_norm_fwd",
    "(Tensor input_ids, Tensor token_type_ids, Tensor position_ids, Tensor word, Tensor token_type, Tensor position, "
    "Tensor weight, Tensor bias, float dropout_p, float eps, int? padding_idx, Tensor? rng_state, "
    "ScalarType out_dtype) -> (Tensor out, Tensor mean, Tensor rstd)",
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _run(ops: Any, *inputs: Any) -> Tensor:
    out: Tensor = ops.embedding_layer_norm_fwd(*inputs)[0]
    return out


OP = Op(
    "embedding_layer_norm",
    {
        "reference": Implementation(embedding_layer_norm_reference, None, None),
        "triton": triton_kernels(_run, "embedding_layer_norm", "embedding_layer_norm_fwd", "embedding_layer_norm_bwd"),
        "cpu": native_cpu(_run, "embedding_layer_norm_fwd", "embedding_layer_norm_bwd"),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            NATIVE_CPU_DTYPES,
            # benchmarks/results/cpu-amd-epyc-2-threads-avx2/embedding_layer_norm.json
            measured="1024 tokens, 2 AVX2 threads, 2026-11-21, against the better of eager and torch.compile: E 768, "
            "V 30522 forward 1.3 to 1.5 times, forward + backward 1.0 (zeroing the gradient of word decides); E 256, "
            "V 8192 0.8; with dropout 0.1 2.4 to 5.9 times eager at 4096 x 768 on one thread",
        ),
        AutoRule(
            "triton",
            "cuda",
            TRITON_DTYPES,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); by count of bytes: 4 passes over (T, E) "
            "forward where the reference makes 10, 12 with dropout, and a backward pass without atomics",
        ),
    ),
)
