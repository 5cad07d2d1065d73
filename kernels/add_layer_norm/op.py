"""Operators of add_layer_norm: fake, gradient, implementations and auto rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
from bert_fast.kernels.add_layer_norm.reference import add_layer_norm_reference


def _fwd_fake(x: Tensor, **_: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out, mean, rstd."""
    mean, rstd = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _bwd_fake(
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
    """dx, dresidual, dweight, dbias, dx_bias, the last empty without `x_bias`."""
    dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    dx_bias = x.new_empty(0 if x_bias is None else x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), dweight, dbias, dx_bias


def _setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, mean, rstd = output
    ctx.dropout_p, ctx.bias_dtype = inputs.dropout_p, inputs.bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(inputs.x, inputs.residual, inputs.weight, inputs.x_bias, mean, rstd, inputs.rng_state)


def _backward(ops: Any, ctx: Any, dout: Tensor, _dmean: Tensor, _drstd: Tensor) -> dict[str, Tensor | None]:
    *tensors, rng_state = ctx.saved_tensors
    _, _, weight, x_bias, _, _ = tensors
    dx, dresidual, dweight, dbias, dx_bias = ops.add_layer_norm_bwd(dout, *tensors, ctx.dropout_p, rng_state)
    return {
        "x": dx,
        "residual": dresidual,
        "weight": dweight.to(weight.dtype),
        "bias": dbias.to(ctx.bias_dtype),
        "x_bias": None if x_bias is None else dx_bias.to(x_bias.dtype),
    }


define("add_layer_norm_bwd", _bwd_fake, cuda=True)
define(
    "add_layer_norm_fwd",
    _fwd_fake,
    arguments_of=add_layer_norm_reference,
    setup_context=_setup_context,
    backward=_backward,
    cuda=True,
)
_OPERATORS = ("add_layer_norm_fwd", "add_layer_norm_bwd")
_call = call_operator("add_layer_norm_fwd")


def _outputs(x: Tensor, *_: Any) -> Outputs:
    return ((tuple(x.shape), x.dtype),)


OP = Op(
    "add_layer_norm",
    {
        "reference": Implementation(add_layer_norm_reference, None, None),
        "triton": triton_kernels(_call, "add_layer_norm", *_OPERATORS),
        "cuda": cuda_kernels(_call, "add_layer_norm", *_OPERATORS),
        "cpu": native_cpu(_call, *_OPERATORS, activations=2),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            WIDENED_CPU_DTYPES,
            # benchmarks/results/cpu-amd-epyc-2-threads-avx2/add_layer_norm.json
            measured="(1024, 768) and (2048, 1024), 2 AVX2 threads, 2026-11-21, against the better of eager and "
            "torch.compile: forward 1.3 to 1.7 times, forward + backward 1.1 to 1.4, with dropout 0.1 3.6 to 4.9; at "
            "(128, 768) 0.7 to 0.8 without dropout, where the call costs more than the work, and 2.0 to 2.3 with it",
        ),
        AutoRule(
            "triton",
            "cuda",
            TRITON_DTYPES,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); by count of bytes: 3 passes over (T, E) "
            "forward where the reference makes 8, 10 with dropout, and 5 backward where it makes 8, 10 with dropout",
        ),
        AutoRule(
            "cuda",
            "cuda",
            CUDA_DTYPES,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); as many bytes as triton: 3 passes over (T, E) "
            "forward, 5 backward",
        ),
    ),
    functions={"add_layer_norm": FunctionSpec(add_layer_norm_reference, _outputs)},
)
