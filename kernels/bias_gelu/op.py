"""Operators of bias_gelu: fake, gradient, implementations and auto rules."""

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
from bert_fast.kernels.bias_gelu.reference import bias_gelu_reference


def _fwd_fake(x: Tensor, **_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _bwd_fake(dout: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """dx, dbias."""
    return x.new_empty(x.shape), x.new_empty(bias.shape, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.tanh = inputs.tanh
    ctx.save_for_backward(inputs.x, inputs.bias)


def _backward(ops: Any, ctx: Any, dout: Tensor) -> dict[str, Tensor | None]:
    x, bias = ctx.saved_tensors
    dx, dbias = ops.bias_gelu_bwd(dout, x, bias, ctx.tanh)
    return {"x": dx, "bias": dbias.to(bias.dtype)}


define("bias_gelu_bwd", _bwd_fake, cuda=True)
define(
    "bias_gelu_fwd",
    _fwd_fake,
    arguments_of=bias_gelu_reference,
    setup_context=_setup_context,
    backward=_backward,
    cuda=True,
)
_OPERATORS = ("bias_gelu_fwd", "bias_gelu_bwd")
_call = call_operator("bias_gelu_fwd")


def _outputs(x: Tensor, *_: Any) -> Outputs:
    return ((tuple(x.shape), x.dtype),)


def _approximate(tanh: bool) -> str:
    return "tanh" if tanh else "none"


OP = Op(
    "bias_gelu",
    {
        "reference": Implementation(bias_gelu_reference, None, None),
        "triton": triton_kernels(_call, "bias_gelu", *_OPERATORS),
        "cuda": cuda_kernels(_call, "bias_gelu", *_OPERATORS),
        "cpu": native_cpu(_call, *_OPERATORS, activations=1),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            WIDENED_CPU_DTYPES,
            # benchmarks/results/cpu-amd-epyc-2-threads-avx2/bias_gelu.json
            measured="(128, 3072) to (1024, 3072), 2 AVX2 threads, 2026-11-21: 1.4 to 1.9 times the better of eager "
            "and torch.compile forward, 1.2 to 1.6 times forward + backward",
        ),
        AutoRule(
            "triton",
            "cuda",
            TRITON_DTYPES,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); by count of bytes: 2 passes over (T, F) "
            "forward where the reference makes 4, 3 backward where it makes 6",
        ),
        AutoRule(
            "cuda",
            "cuda",
            CUDA_DTYPES,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); as many bytes as triton: 2 passes over (T, F) "
            "forward, 3 backward",
        ),
    ),
    functions={"bias_gelu": FunctionSpec(bias_gelu_reference, _outputs, {"tanh": ("approximate", _approximate)})},
)
