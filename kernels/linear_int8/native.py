"""linear_int8 on the CPU: oneDNN's product of unsigned and signed bytes, our kernels before and behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common import native
from bert_fast.kernels._common.kept import kept
from bert_fast.kernels._common.library import implement

# oneDNN chooses a packed layout for a number of rows; one number, so that bits don't depend on who called first.
_PACKED_ROWS = 256
_CODES = {None: 0, "gelu": 1, "gelu_tanh": 2}


def weight_limit() -> int:
    """The largest magnitude of a weight: 127 where the CPU has VNNI, else 64.

    Without VNNI two products are added up in 16 bits, which 2 * 255 * 64 = 32640 doesn't leave and 2 * 255 * 127 does.
    """
    return 127 if native.cpu_isa().startswith("avx512") and torch.cpu._is_vnni_supported() else 64


def missing() -> str:
    """Why this torch can't multiply bytes, or ""."""
    absent = [name for name in ("prepack", "pointwise") if not hasattr(torch.ops.onednn, f"qlinear_{name}")]
    if absent or not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN operators for bytes (onednn::qlinear_pointwise)"
    return ""


def _product(u: Tensor, values: Tensor) -> Tensor:
    """The operator linear_int8_product: u (T, K) uint8 times values (N, K) int8, the integers as float32 (T, N).

    Raises:
        ValueError: `values` are larger than this CPU multiplies without saturation.
    """
    if not u.shape[0]:
        return u.new_empty(0, values.shape[0], dtype=torch.float32)
    packed, one, zero = kept("int8", (values,), _pack)
    out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        u, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


def _pack(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    largest, limit = int(values.to(torch.int16).abs().max()), weight_limit()
    if largest > limit:
        raise ValueError(
            f"linear_int8: the weight has values up to {largest} in magnitude, made for a CPU with VNNI; this one "
            f"multiplies up to {limit} exactly. Quantize the model on this machine, or with limit={limit}"
        )
    packed = torch.ops.onednn.qlinear_prepack(values.contiguous(), [_PACKED_ROWS, values.shape[1]])
    return packed, torch.ones(1), torch.zeros(1, dtype=torch.int64)


def run(
    ops: Any,
    x: Tensor,
    weight: tuple[Tensor, ...],
    bias: Tensor | None,
    activation: str | None,
    input_range: Tensor | None,
) -> Tensor:
    """act(x weight^T + bias), x (T, K) float32 or bfloat16; weight: values, scale, sums."""
    u, scale, low = ops.linear_int8_quantize(x, input_range)
    product = ops.linear_int8_product(u, weight[0])
    out: Tensor = ops.linear_int8_finish(
        product, scale, low, weight[1], weight[2], bias, _CODES[activation], x.dtype == torch.bfloat16
    )
    return out


def run_feed_forward(
    ops: Any,
    x: Tensor,
    up: tuple[Tensor, ...],
    up_bias: Tensor | None,
    down: tuple[Tensor, ...],
    activation: str,
    up_range: Tensor | None,
    down_range: Tensor | None,
) -> Tensor:
    """act(x up^T + up_bias) down^T; what stands between the products is bytes from the start."""
    u, scale, low = ops.linear_int8_quantize(x, up_range)
    product = ops.linear_int8_product(u, up[0])
    u, scale, low = ops.linear_int8_finish_quantize(
        product, scale, low, up[1], up[2], up_bias, _CODES[activation], down_range
    )
    product = ops.linear_int8_product(u, down[0])
    out: Tensor = ops.linear_int8_finish(product, scale, low, down[1], down[2], None, 0, x.dtype == torch.bfloat16)
    return out


def register() -> None:
    """Register the product, which is a library's."""
    implement("linear_int8_product", "CPU", _product)
