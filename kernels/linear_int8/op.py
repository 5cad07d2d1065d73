"""Operators of linear_int8: schema and fake. They have no gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, Availability, Implementation, Op
from bert_fast.kernels._common.library import NATIVE_CPU_DTYPES, define, native_cpu
from bert_fast.kernels.linear_int8 import cpu_backends
from bert_fast.kernels.linear_int8.reference import feed_forward_int8_reference, linear_int8_reference

_ROWS = "Tensor product, Tensor scale, Tensor low, Tensor weight_scale, Tensor weight_sums, Tensor? bias"


def _quantized(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), scale, torch.empty_like(scale)


def _finish_fake(product: Tensor, *others: Any) -> Tensor:
    return product.new_empty(product.shape, dtype=torch.bfloat16 if others[-1] else torch.float32)


def _pack_fake(values: Tensor) -> Tensor:
    panels, panel = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))  # the instruction set's
    return values.new_empty(panels, (values.shape[1] + 3) // 4, panel, 4)


def _tiles_fake(u: Tensor, packed: Tensor, columns: int, *others: Any) -> Tensor:
    return u.new_empty((u.shape[0], columns), dtype=torch.bfloat16 if others[-1] else torch.float32)


define(
    "linear_int8_quantize",
    "(Tensor x, Tensor? input_range) -> (Tensor, Tensor, Tensor)",
    fake=lambda x, input_range: _quantized(x),
    triton=False,
)
define(
    "linear_int8_product",
    "(Tensor u, Tensor values) -> Tensor",
    fake=lambda u, values: u.new_empty((u.shape[0], values.shape[0]), dtype=torch.float32),
    triton=False,
)
define("linear_int8_epilogue", f"({_ROWS}, int activation, bool bf16) -> Tensor", fake=_finish_fake, triton=False)
define(
    "linear_int8_epilogue_quantize",
    f"({_ROWS}, int activation, Tensor? input_range) -> (Tensor, Tensor, Tensor)",
    fake=lambda product, *others: _quantized(product),
    triton=False,
)
define(
    "linear_int8_pack",
    "(Tensor values) -> Tensor",
    fake=_pack_fake,
    triton=False,
)
define(
    "linear_int8_tiles",
    "(Tensor u, Tensor packed, int columns, Tensor scale, Tensor low, Tensor weight_scale, Tensor weight_sums, "
    "Tensor? bias, int activation, bool bf16) -> Tensor",
    fake=_tiles_fake,
    triton=False,
)
cpu_backends.register()


def _reference(x: Tensor, weight: tuple[Tensor, ...], *others: Any) -> Tensor:
    return linear_int8_reference(x, weight[0], weight[1], *others)


def _cpu() -> Implementation:
    names = ("linear_int8_quantize", "linear_int8_epilogue", "linear_int8_epilogue_quantize", "linear_int8_tiles")
    slot = native_cpu(cpu_backends.run, *names)
    if slot.availability.ok and (reason := cpu_backends.missing()):
        return Implementation(slot.call, "cpu", NATIVE_CPU_DTYPES, Availability(False, False, reason))
    return slot


OP = Op(
    "linear_int8",
    {"reference": Implementation(_reference, None, None), "cpu": _cpu()},
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            NATIVE_CPU_DTYPES,
            measured="products: 135 to 160 GOP/s a thread of an AVX2 EPYC, fp32's 70 to 80; with VNNI on AVX-512, 2 "
            "cores, 1730 to 1930, fp32's 480; 2026-11-22",
        ),
    ),
)
FEED_FORWARD: dict[Callable[..., Any], Callable[..., Any]] = {
    OP.impls["reference"].call: feed_forward_int8_reference,
    OP.impls["cpu"].call: functools.partial(cpu_backends.run_feed_forward, torch.ops.bert_fast),
}
