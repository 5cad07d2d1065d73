"""Operators of add_layer_norm: schema, fake, gradient. The kernels register themselves for the dispatch keys."""

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
from bert_fast.kernels.add_layer_norm.reference import add_layer_norm_reference


def _fwd_fake(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    eps: float,
    rng_state: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


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
    dweight, dbias = (x.new_empty(x.shape[1], dtype=torch.float32) for _ in range(2))
    dx_bias = x.new_empty(0 if x_bias is None else x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), dweight, dbias, dx_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, x_bias, ctx.dropout_p, _, rng_state = inputs
    _, mean, rstd = output
    ctx.bias_dtype = bias.dtype
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, residual, weight, x_bias, mean, rstd, rng_state)


def _backward(ops: Any, ctx: Any, dout: Tensor, _dmean: Tensor, _drstd: Tensor) -> tuple[Tensor | None, ...]:
    x, residual, weight, x_bias, mean, rstd, rng_state = ctx.saved_tensors
    dx, dresidual, dweight, dbias, dx_bias = ops.add_layer_norm_bwd(
        dout, x, residual, weight, x_bias, mean, rstd, ctx.dropout_p, rng_state
    )
    return (
        dx,
        dresidual,
        dweight.to(weight.dtype),
        dbias.to(ctx.bias_dtype),
        None if x_bias is None else dx_bias.to(x_bias.dtype),
        None,
        None,
        None,
    )


# dx_bias is empty where there is no x_bias.
define(
    "add_layer_norm_bwd",
    "(Tensor dout, Tensor x, Tensor residual, Tensor weight, Tensor? x_bias, Tensor mean, Tensor rstd, "
    "float dropout_p, Tensor? rng_state) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias, Tensor dx_bias)",
    fake=_bwd_fake,
    cuda=True,
)
define(
    "add_layer_norm_fwd",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, Tensor? x_bias, float dropout_p, float eps, "
    "Tensor? rng_state) -> (Tensor out, Tensor mean, Tensor rstd)",
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    cuda=True,
)


def _run(
    ops: Any,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    x_bias: Tensor | None,
    dropout_p: float,
    eps: float,
    rng_state: Tensor | None,
) -> Tensor:
    out: Tensor = ops.add_layer_norm_fwd(x, residual, weight, bias, x_bias, dropout_p, eps, rng_state)[0]
    return out


OP = Op(
    "add_layer_norm",
    {
        "reference": Implementation(add_layer_norm_reference, None, None),
        "triton": triton_kernels(_run, "add_layer_norm", "add_layer_norm_fwd", "add_layer_norm_bwd"),
        "cuda": cuda_kernels(_run, "add_layer_norm", "add_layer_norm_fwd", "add_layer_norm_bwd"),
        "cpu": native_cpu(_run, "add_layer_norm_fwd", "add_layer_norm_bwd"),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            NATIVE_CPU_DTYPES,
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
)
