"""Operators of padding: schema, fake, gradient. The kernels register themselves for the dispatch keys."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, Implementation, Op
from bert_fast.kernels._common.library import define, native_cpu, triton_kernels
from bert_fast.kernels.padding.reference import (
    gather_rows_reference,
    scatter_rows_reference,
    unpad_indices_reference,
)


class Functions(NamedTuple):
    """What an implementation of this op consists of; the reference documents each."""

    unpad_indices: Callable[[Tensor], tuple[Tensor, Tensor]]
    gather_rows: Callable[[Tensor, Tensor], Tensor]
    scatter_rows: Callable[[Tensor, Tensor, int], Tensor]


def _unpad_indices_fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.library.get_ctx().new_dynamic_size()
    return mask.new_empty(total, dtype=torch.int64), mask.new_empty(mask.shape[0] + 1, dtype=torch.int32)


def _gather_rows_fake(x: Tensor, indices: Tensor) -> Tensor:
    return x.new_empty(indices.shape[0], *x.shape[1:])


def _scatter_rows_fake(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    return x.new_empty(rows, *x.shape[1:])


def _gather_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rows = inputs[0].shape[0]
    ctx.save_for_backward(inputs[1])


def _gather_backward(ops: Any, ctx: Any, dout: Tensor) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    return ops.scatter_rows(dout, indices, ctx.rows), None


def _scatter_setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _scatter_backward(ops: Any, ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return ops.gather_rows(dout, indices), None, None


define("unpad_indices", "(Tensor mask) -> (Tensor indices, Tensor cu_seqlens)", fake=_unpad_indices_fake)
define(
    "gather_rows",
    "(Tensor x, Tensor indices) -> Tensor",
    fake=_gather_rows_fake,
    setup_context=_gather_setup_context,
    backward=_gather_backward,
    higher_order=True,
)
define(
    "scatter_rows",
    "(Tensor x, Tensor indices, SymInt rows) -> Tensor",
    fake=_scatter_rows_fake,
    setup_context=_scatter_setup_context,
    backward=_scatter_backward,
    higher_order=True,
)


def _reference() -> Functions:
    return Functions(unpad_indices_reference, gather_rows_reference, scatter_rows_reference)


def _run(ops: Any) -> Functions:
    return Functions(ops.unpad_indices, ops.gather_rows, ops.scatter_rows)


# The kernels move whole rows of bytes, so they take every dtype.
_ANY_DTYPE = (
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
_OPERATORS = ("unpad_indices", "gather_rows", "scatter_rows")
OP = Op(
    "padding",
    {
        "reference": Implementation(_reference, None, None),
        "triton": dataclasses.replace(triton_kernels(_run, "padding", *_OPERATORS), dtypes=None),
        "cpu": dataclasses.replace(native_cpu(_run, *_OPERATORS), dtypes=None),
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
)
