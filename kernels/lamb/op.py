"""Implementations of lamb and auto rules: plain functions on lists of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, FunctionSpec, Implementation, Op, Outputs
from bert_fast.kernels._common.library import (
    NATIVE_CPU_DTYPES,
    TRITON_DTYPES,
    native_cpu,
    triton_function,
    triton_implementation,
)
from bert_fast.kernels.lamb import cpu_backends
from bert_fast.kernels.lamb.reference import clip_scale_reference, lamb_step_reference


class Functions(NamedTuple):
    """The functions of an implementation of this op; reference.py documents each."""

    clip_scale: Callable[..., tuple[Tensor, Tensor]]
    lamb_step: Callable[..., None]


def _reference() -> Functions:
    return Functions(clip_scale_reference, lamb_step_reference)


_TRITON = Functions(*(triton_function("lamb", name) for name in Functions._fields))


def _triton() -> Functions:
    return _TRITON


def _clip_outputs(grads: list[Tensor], max_norm: float) -> Outputs:
    """norm, scale."""
    dtype = torch.float64 if all(grad.dtype == torch.float64 for grad in grads) else torch.float32
    return ((), dtype), ((), dtype)


def _cpu(_: Any) -> Functions:
    return Functions(cpu_backends.clip_scale, cpu_backends.lamb_step)


OP = Op(
    "lamb",
    {
        "reference": Implementation(_reference, None, None),
        "triton": triton_implementation(_triton, "lamb"),
        "cpu": native_cpu(_cpu, "lamb_norm", "lamb_step"),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            NATIVE_CPU_DTYPES,
            measured="2 layers of BERT-base, 39 M float32 parameters, one step: 30 ms, the reference 341 ms; CPU time "
            "of one thread of an AMD EPYC (Zen 5), not idle, 2026-11-30 (the recorded benchmark is pending)",
        ),
        AutoRule(
            "triton",
            "cuda",
            TRITON_DTYPES,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); by count of bytes: 10 passes over the "
            "parameters where the reference makes about 20, in 3 launches",
        ),
    ),
    functions={
        "clip_scale": FunctionSpec(clip_scale_reference, _clip_outputs, gradient=False),
        "lamb_step": FunctionSpec(lamb_step_reference, lambda *_: (), gradient=False),
    },
    group=Functions,
)
