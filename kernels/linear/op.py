"""Operators of linear: fakes, gradient, implementations and auto rules.

`linear_fwd` and `linear_bwd` are the matrix products alone, for those backends of cpu_backends.py that don't call
torch's own; `linear_unpacked` is the compiled product of inference, `linear_pack` and `linear_tiles` that of a frozen
weight. Bias and GeLU that need a gradient are bias_gelu's operator.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common import extensions
from bert_fast.kernels._common.dispatch import AutoRule, FunctionSpec, Implementation, Op, Outputs
from bert_fast.kernels._common.library import (
    CUDA_DTYPES,
    TRITON_DTYPES,
    WIDENED_CPU_DTYPES,
    cuda_kernels,
    define,
    native_cpu,
    triton_implementation,
)
from bert_fast.kernels.linear import cpu_backends
from bert_fast.kernels.linear.reference import linear_reference


def _fwd_fake(x: Tensor, weight: Tensor, cache_weight: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _bwd_fake(dout: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """dx, dweight; empty where `needs` is False."""
    return x.new_empty(x.shape if needs[0] else 0), weight.new_empty(weight.shape if needs[1] else 0)


def _pack_fake(weight: Tensor, bf16: bool) -> Tensor:
    panels, panel = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))  # depend on the instruction set
    if bf16 and extensions.cpu_isa() == "avx512bf16":
        return weight.new_empty(panels, (weight.shape[1] + 1) // 2, panel, 2, dtype=torch.bfloat16)
    return weight.new_empty(panels, weight.shape[1], panel, dtype=torch.float32)


def _tiles_fake(x: Tensor, packed: Tensor, columns: int, bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(x.shape[0], columns)


def _unpacked_fake(x: Tensor, weights: list[Tensor], bias: Tensor | None, activation: int) -> Tensor:
    return x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))


def _dx_fake(dout: Tensor, weight: Tensor) -> Tensor:
    return dout.new_empty(dout.shape[0], weight.shape[1])


def _dweight_fake(dout: Tensor, x: Tensor, dweight: Tensor, accumulate: bool) -> None:
    """dweight = dout^T x, or += if `accumulate`."""


def _setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs.x, inputs.weight)


def _backward(ops: Any, ctx: Any, dout: Tensor) -> dict[str, Tensor | None]:
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:2])
    dx, dweight = ops.linear_bwd(dout, x, weight, needs)
    return {"x": dx if needs[0] else None, "weight": dweight if needs[1] else None}


define("linear_bwd", _bwd_fake, triton=False)
define("linear_fwd", _fwd_fake, setup_context=_setup_context, backward=_backward, triton=False)
define("linear_dx", _dx_fake, triton=False)
define("linear_dweight", _dweight_fake, mutated=("dweight",), triton=False)
define("linear_pack", _pack_fake, triton=False)
define("linear_tiles", _tiles_fake, triton=False)
define("linear_unpacked", _unpacked_fake, triton=False)
cpu_backends.register()


def _on_gpu(implementation: Implementation) -> Implementation:
    return dataclasses.replace(implementation, built_on="cuBLAS, bias_gelu")


def _outputs(x: Tensor, weights: tuple[Tensor, ...], *_: Any) -> Outputs:
    return (((x.shape[0], sum(weight.shape[0] for weight in weights)), x.dtype),)


def _one_weight(weights: tuple[Tensor, ...]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(weights)


OP = Op(
    "linear",
    {
        "reference": Implementation(linear_reference, None, None),
        # On a GPU the product is cuBLAS's; bias_gelu is the epilogue, of its Triton or its CUDA kernels.
        "triton": _on_gpu(
            triton_implementation(functools.partial(cpu_backends.blas, torch.ops.bert_fast_triton), "bias_gelu")
        ),
        "cuda": _on_gpu(cuda_kernels(cpu_backends.blas, "bias_gelu", "bias_gelu_fwd", "bias_gelu_bwd")),
        "cpu": native_cpu(
            cpu_backends.run,
            "linear_tiles",
            "linear_unpacked",
            "linear_dx",
            "linear_dweight",
            "bias_gelu_fwd",
            activations=1,
        ),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            WIDENED_CPU_DTYPES,
            measured="cpu_backends.py has the rules of its backends, with their measurements; T = 1024, "
            "(768) -> (3072) with GeLU: float32 as eager, bfloat16 6.7 times, an AVX2 EPYC thread, 2026-11-21",
        ),
        AutoRule(
            "triton",
            "cuda",
            TRITON_DTYPES,
            measured="no GPU figure yet (results/PENDING.md); bias_gelu's first choice: 2 passes of (T, N)",
        ),
        AutoRule(
            "cuda",
            "cuda",
            CUDA_DTYPES,
            measured="no GPU figure yet (results/PENDING.md); bias_gelu's second choice: 2 passes of (T, N)",
        ),
    ),
    timed_as="bias_gelu",
    functions={"linear": FunctionSpec(linear_reference, _outputs, {"weights": ("weight", _one_weight)})},
)
