"""Operators of linear: schema, fake, gradient.

`linear_fwd` and `linear_bwd` are the products alone, of those backends (cpu_backends.py) that are not torch's own;
`linear_pack` and `linear_tiles` are the compiled ones, for inference. Bias and GeLU that need a gradient are
bias_gelu's operator.
"""

from __future__ import annotations

import functools
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
    triton_slot,
)
from bert_fast.kernels.linear import cpu_backends
from bert_fast.kernels.linear.reference import linear_reference


def _fwd_fake(x: Tensor, weight: Tensor, keep: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _bwd_fake(dout: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if needs[0] else 0), weight.new_empty(weight.shape if needs[1] else 0)


def _pack_fake(weight: Tensor) -> Tensor:
    panels, panel = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))  # the instruction set's
    return weight.new_empty(panels, weight.shape[1], panel, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ops: Any, ctx: Any, dout: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    dx, dweight = ops.linear_bwd(dout, x, weight, needs)
    return dx if needs[0] else None, dweight if needs[1] else None, None


define(
    "linear_bwd",
    "(Tensor dout, Tensor x, Tensor weight, bool[] needs) -> (Tensor, Tensor)",
    fake=_bwd_fake,
    triton=False,
)
define(
    "linear_fwd",
    "(Tensor x, Tensor weight, bool keep) -> Tensor",
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
    triton=False,
)
define(
    "linear_pack",
    "(Tensor weight) -> Tensor",
    fake=_pack_fake,
    triton=False,
)
define(
    "linear_tiles",
    "(Tensor x, Tensor packed, int columns, Tensor? bias, int activation) -> Tensor",
    fake=lambda x, packed, columns, bias, activation: x.new_empty(x.shape[0], columns),
    triton=False,
)
cpu_backends.register()


def _run(_: Any, x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    return cpu_backends.run(x, weights, bias, activation)


OP = Op(
    "linear",
    {
        "reference": Implementation(linear_reference, None, None),
        # A GPU's product is cuBLAS's; what is Triton's or ours behind it is bias_gelu.
        "triton": triton_slot(functools.partial(cpu_backends.by_blas, torch.ops.bert_fast_triton), "bias_gelu"),
        "cuda": cuda_kernels(cpu_backends.by_blas, "bias_gelu", "bias_gelu_fwd", "bias_gelu_bwd"),
        "cpu": native_cpu(_run, "linear_tiles", "bias_gelu_fwd"),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            NATIVE_CPU_DTYPES,
            measured="which library computes is the table of cpu_backends.py, with its measurements; T = 1024, "
            "(768) -> (3072) with GeLU: float32 as eager, bfloat16 6.7 times, an AVX2 EPYC thread, 2026-11-21",
        ),
        AutoRule("triton", "cuda", TRITON_DTYPES, measured="bias_gelu's first choice behind cuBLAS; no GPU figure yet"),
        AutoRule("cuda", "cuda", CUDA_DTYPES, measured="bias_gelu's second choice behind cuBLAS; no GPU figure yet"),
    ),
)
