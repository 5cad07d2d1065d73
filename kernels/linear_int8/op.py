"""Operators of linear_int8, without gradients: fakes, implementations and auto rules."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, Availability, FunctionSpec, Implementation, Op, Outputs
from bert_fast.kernels._common.library import WIDENED_CPU_DTYPES, define, native_cpu, widened
from bert_fast.kernels.linear_int8 import cpu_backends
from bert_fast.kernels.linear_int8.reference import feed_forward_int8_reference, linear_int8_reference


def _quantize_fake(x: Tensor, input_range: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """u, scale, low of each row."""
    scale = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=torch.uint8), scale, torch.empty_like(scale)


def _product_fake(u: Tensor, values: Tensor) -> Tensor:
    return u.new_empty((u.shape[0], values.shape[0]), dtype=torch.float32)


def _epilogue_fake(
    product: Tensor,
    scale: Tensor,
    low: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    activation: int,
    bf16: bool,
) -> Tensor:
    return product.new_empty(product.shape, dtype=torch.bfloat16 if bf16 else torch.float32)


def _epilogue_quantize_fake(
    product: Tensor,
    scale: Tensor,
    low: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    activation: int,
    input_range: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The epilogue, its rows quantized before they are written to memory."""
    return _quantize_fake(product, input_range)


def _pack_fake(values: Tensor) -> Tensor:
    panels, panel = (torch.library.get_ctx().new_dynamic_size() for _ in range(2))  # depend on the instruction set
    return values.new_empty(panels, (values.shape[1] + 3) // 4, panel, 4)


def _tiles_fake(
    u: Tensor,
    packed: Tensor,
    columns: int,
    scale: Tensor,
    low: Tensor,
    weight_scale: Tensor,
    weight_sums: Tensor,
    bias: Tensor | None,
    activation: int,
    bf16: bool,
) -> Tensor:
    """The product of a packed weight with its epilogue."""
    return u.new_empty((u.shape[0], columns), dtype=torch.bfloat16 if bf16 else torch.float32)


define("linear_int8_quantize", _quantize_fake, triton=False)
define("linear_int8_product", _product_fake, triton=False)
define("linear_int8_epilogue", _epilogue_fake, triton=False)
define("linear_int8_epilogue_quantize", _epilogue_quantize_fake, triton=False)
define("linear_int8_pack", _pack_fake, triton=False)
define("linear_int8_tiles", _tiles_fake, triton=False)
cpu_backends.register()


def _cpu() -> Implementation:
    names = ("linear_int8_quantize", "linear_int8_epilogue", "linear_int8_epilogue_quantize", "linear_int8_tiles")
    implementation = native_cpu(cpu_backends.run, *names, activations=1)
    if implementation.availability.ok and (reason := cpu_backends.missing()):
        return dataclasses.replace(implementation, availability=Availability(False, False, reason))
    return implementation


def _outputs(
    x: Tensor,
    weight: tuple[Tensor, ...],
    bias: Tensor | None,
    activation: str | None,
    input_range: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Outputs:
    return (((x.shape[0], weight[0].shape[0]), out_dtype or x.dtype),)


class Int8Weight(NamedTuple):
    """An INT8 weight, quantized symmetrically by output channel: row n is scale[n] values[n]."""

    values: Tensor  # (N, K) int8
    scale: Tensor  # (N,) float32
    sums: Tensor  # (N,) float32, the sum of each row of values


def _int8_weight(weight: tuple[Tensor, ...]) -> Int8Weight:
    return Int8Weight(*weight)


OP = Op(
    "linear_int8",
    {"reference": Implementation(linear_int8_reference, None, None), "cpu": _cpu()},
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            WIDENED_CPU_DTYPES,
            measured="products: 135 to 160 GOP/s per thread of an AVX2 EPYC, fp32's 70 to 80, 2026-11-22; with VNNI, a "
            "thread of an EPYC (Zen 5), 828 to 913, fp32's 205 to 240, 2026-11-30",
        ),
    ),
    functions={
        "linear_int8": FunctionSpec(
            linear_int8_reference, _outputs, {"weight": ("weight", _int8_weight)}, gradient=False
        )
    },
)


class _FeedForward(dict[Callable[..., Any], Callable[..., Any]]):
    """The implementation of feed_forward_int8 for each of linear_int8: a kernel of others runs twice."""

    def __missing__(self, linear: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(_two_products, linear)


def _two_products(
    linear: Callable[..., Tensor],
    x: Tensor,
    up: tuple[Tensor, ...],
    up_bias: Tensor | None,
    down: tuple[Tensor, ...],
    activation: str,
    up_range: Tensor | None,
    down_range: Tensor | None,
) -> Tensor:
    """As `feed_forward_int8_reference`: what is between the products is not rounded to the dtype of `x`."""
    precise = x if x.dtype == torch.float64 else x.float()
    return linear(linear(precise, up, up_bias, activation, up_range, None), down, None, None, down_range, x.dtype)


FEED_FORWARD = _FeedForward(
    {
        OP.impls["reference"].call: feed_forward_int8_reference,
        OP.impls["cpu"].call: functools.partial(widened(cpu_backends.run_feed_forward, 1), torch.ops.bert_fast),
    }
)
