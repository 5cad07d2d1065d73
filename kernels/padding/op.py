"""Operators of padding: fakes, gradients, implementations and auto rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, FunctionSpec, Implementation, Op, Outputs
from bert_fast.kernels._common.library import define, native_cpu, triton_kernels
from bert_fast.kernels.padding.reference import (
    gather_rows_reference,
    scatter_rows_reference,
    unpad_indices_reference,
)


class Functions(NamedTuple):
    """The functions of an implementation of this op; reference.py documents each."""

    unpad_indices: Callable[..., tuple[Tensor, Tensor]]
    gather_rows: Callable[..., Tensor]
    scatter_rows: Callable[..., Tensor]


def _unpad_indices_fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    """indices, cu_seqlens."""
    total = torch.library.get_ctx().new_dynamic_size()
    return mask.new_empty(total, dtype=torch.int64), mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)


def _gather_rows_fake(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(indices.shape[0], *x.shape[1:])


def _scatter_rows_fake(x: Tensor, rows: int, **_: Any) -> Tensor:
    return x.new_empty(rows, *x.shape[1:])


def _gather_setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.rows = inputs.x.shape[0]
    ctx.save_for_backward(inputs.indices)


def _gather_backward(ops: Any, ctx: Any, dout: Tensor) -> dict[str, Tensor | None]:
    (indices,) = ctx.saved_tensors
    return {"x": ops.scatter_rows(dout, indices, ctx.rows)}


def _scatter_setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs.indices)


def _scatter_backward(ops: Any, ctx: Any, dout: Tensor) -> dict[str, Tensor | None]:
    (indices,) = ctx.saved_tensors
    return {"x": ops.gather_rows(dout, indices)}


define("unpad_indices", _unpad_indices_fake, arguments_of=unpad_indices_reference)
define(
    "gather_rows",
    _gather_rows_fake,
    arguments_of=gather_rows_reference,
    setup_context=_gather_setup_context,
    backward=_gather_backward,
    higher_order=True,
)
define(
    "scatter_rows",
    _scatter_rows_fake,
    arguments_of=scatter_rows_reference,
    setup_context=_scatter_setup_context,
    backward=_scatter_backward,
    higher_order=True,
    symbolic=("rows",),
)


def _reference() -> Functions:
    return Functions(unpad_indices_reference, gather_rows_reference, scatter_rows_reference)


def _operators(ops: Any) -> Functions:
    return Functions(*(getattr(ops, name) for name in Functions._fields))


# The kernels move whole rows of bytes, so they take every dtype.
_ANY_DTYPE = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def _unpad_outputs(mask: Tensor) -> Outputs:
    return ((None,), torch.int64), ((mask.shape[0] + 1,), torch.int32)


def _gather_outputs(x: Tensor, indices: Tensor) -> Outputs:
    return (((indices.shape[0], *x.shape[1:]), x.dtype),)


def _scatter_outputs(x: Tensor, indices: Tensor, rows: int) -> Outputs:
    return (((rows, *x.shape[1:]), x.dtype),)


OP = Op(
    "padding",
    {
        "reference": Implementation(_reference, None, None),
        "triton": dataclasses.replace(triton_kernels(_operators, "padding", *Functions._fields), dtypes=None),
        "cpu": dataclasses.replace(native_cpu(_operators, *Functions._fields), dtypes=None),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            _ANY_DTYPE,
            measured="1 thread of 2 AVX2 cores, 2026-11-21, reference / cpu: (8, 512, 768) fp32 unpad 3.1, pad 2.6, "
            "bf16 3.1 and 3.6; (32, 128) int64 ids 0.9 and 0.7, 8 and 35 us; README.md has the table",
        ),
        AutoRule(
            "triton",
            "cuda",
            _ANY_DTYPE,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); by count of bytes: pad writes the result once "
            "where the reference fills it with zeros first, 1.5 B S rows at half fill where that moves 2",
        ),
    ),
    functions={
        "unpad_indices": FunctionSpec(unpad_indices_reference, _unpad_outputs, gradient=False),
        "gather_rows": FunctionSpec(gather_rows_reference, _gather_outputs),
        "scatter_rows": FunctionSpec(scatter_rows_reference, _scatter_outputs),
    },
    group=Functions,
)
