"""Operators of embedding_layer_norm: fake, gradient, implementations and auto rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, FunctionSpec, Implementation, Op, Outputs
from bert_fast.kernels._common.library import (
    NATIVE_CPU_DTYPES,
    TRITON_DTYPES,
    call_operator,
    define,
    native_cpu,
    triton_kernels,
)
from bert_fast.kernels.embedding_layer_norm.reference import embedding_layer_norm_reference


def _fwd_fake(input_ids: Tensor, word: Tensor, out_dtype: torch.dtype, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out, mean, rstd."""
    mean, rstd = (word.new_empty(input_ids.shape[0], dtype=torch.float32) for _ in range(2))
    return word.new_empty((input_ids.shape[0], word.shape[1]), dtype=out_dtype), mean, rstd


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
    """dword, dtoken_type, dposition, dweight, dbias.

    The gradients of the tables have the tables' dtype: they are summed in float32 and rounded once, without a second
    pass over the largest of them for a cast.
    """
    dweight, dbias = (word.new_empty(word.shape[1], dtype=torch.float32) for _ in range(2))
    return word.new_empty(word.shape), word.new_empty(token_type.shape), word.new_empty(position.shape), dweight, dbias


def _setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    ctx.dropout_p, ctx.padding_idx, ctx.bias_dtype = inputs.dropout_p, inputs.padding_idx, inputs.bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ids = (inputs.input_ids, inputs.token_type_ids, inputs.position_ids)
    tables = (inputs.word, inputs.token_type, inputs.position)
    ctx.save_for_backward(*ids, *tables, inputs.weight, mean, rstd, inputs.rng_state)


def _backward(ops: Any, ctx: Any, dout: Tensor, _dmean: Tensor, _drstd: Tensor) -> dict[str, Tensor | None]:
    *tensors, rng_state = ctx.saved_tensors
    weight = tensors[6]
    dword, dtoken_type, dposition, dweight, dbias = ops.embedding_layer_norm_bwd(
        dout, *tensors, ctx.dropout_p, ctx.padding_idx, rng_state
    )
    return {
        "word": dword,
        "token_type": dtoken_type,
        "position": dposition,
        "weight": dweight.to(weight.dtype),
        "bias": dbias.to(ctx.bias_dtype),
    }


define("embedding_layer_norm_bwd", _bwd_fake)
define(
    "embedding_layer_norm_fwd",
    _fwd_fake,
    arguments_of=embedding_layer_norm_reference,
    setup_context=_setup_context,
    backward=_backward,
)
_OPERATORS = ("embedding_layer_norm_fwd", "embedding_layer_norm_bwd")
_call = call_operator("embedding_layer_norm_fwd")


def _outputs(input_ids: Tensor, _types: Tensor, _positions: Tensor, word: Tensor, *_: Any) -> Outputs:
    return (((input_ids.shape[0], word.shape[1]), word.dtype),)  # the public function casts it to autocast's


OP = Op(
    "embedding_layer_norm",
    {
        "reference": Implementation(embedding_layer_norm_reference, None, None),
        "triton": triton_kernels(_call, "embedding_layer_norm", *_OPERATORS),
        "cpu": native_cpu(_call, *_OPERATORS),
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
    functions={"embedding_layer_norm": FunctionSpec(embedding_layer_norm_reference, _outputs, left_out=("out_dtype",))},
)
