"""Backends of linear_int8 on the CPU: products of uint8 rows and int8 weights; the quantization is ours in both.

"tiles"  our product, with the epilogue inside (csrc/linear_int8), by VNNI where the CPU has it.
"onednn" oneDNN's product, by VNNI or AMX; the epilogue is a pass of its own.

Both compute the same bits: the sums are integers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common import extensions
from bert_fast.kernels._common.activation import ACTIVATIONS
from bert_fast.kernels._common.library import implement
from bert_fast.kernels._common.row_buckets import pad_rows
from bert_fast.kernels._common.weight_cache import cached_weight

# oneDNN chooses a packed layout by the number of rows: a constant, so that bits don't depend on the first caller's.
_PACKED_ROWS = 256
# GOP/s at 1,024 rows, with scales and GeLU, tiles and oneDNN interleaved: AVX2, two threads of an AMD EPYC, 2026-11-22,
# 270 to 320 and 241 to 282; VNNI, one thread of an AMD EPYC (Zen 5) by its CPU time, 2026-11-30, on a busy machine, 828
# to 913 and 721 to 846. Fewer rows gain more: README.md. AMX has 8 times VNNI's rate; it has not been timed.
BACKEND = "tiles" if extensions.cpu_isa().startswith("avx") and not extensions.has_amx() else "onednn"


def weight_limit() -> int:
    """The largest magnitude of a quantized weight: 127 where the CPU has VNNI, else 64.

    Without VNNI two products are added in INT16, where 2 * 255 * 64 = 32640 fits and 2 * 255 * 127 saturates.
    """
    return 127 if extensions.has_int8_dot() else 64


def missing() -> str:
    """Why this build of torch has no INT8 product, or ""."""
    absent = [name for name in ("prepack", "pointwise") if not hasattr(torch.ops.onednn, f"qlinear_{name}")]
    if absent or not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN INT8 operators (onednn::qlinear_pointwise)"
    return ""


class _Packed(NamedTuple):
    """What is kept of values (N, K), their sums too: the caller's may be older than the values."""

    panels: Tensor
    sums: Tensor  # (N,) float32

    @classmethod
    def of(cls, values: Tensor) -> _Packed:
        """ValueError where a value is too large for this CPU to multiply without saturation."""
        kind, pack = ("int8 tiles", _pack_tiles) if _use_tiles() else ("int8 onednn", _pack_onednn)
        packed: _Packed = cached_weight(kind, (values.contiguous(),), lambda x: cls(pack(x), _sums(x)))
        return packed


def _sums(values: Tensor) -> Tensor:
    return values.sum(1, dtype=torch.int64).float()


def _product(u: Tensor, values: Tensor) -> Tensor:
    """The operator linear_int8_product: u values^T, u (T, K) uint8, values (N, K) int8; the integers as float32 (T, N).

    Raises:
        ValueError: a value is too large for this CPU to multiply without saturation.
    """
    if u.dtype != torch.uint8 or values.dtype != torch.int8 or values.dim() != 2 or values.shape[1:] != u.shape[1:]:
        raise ValueError(
            f"linear_int8_product: u is {u.dtype} {tuple(u.shape)} and values {values.dtype} {tuple(values.shape)}; "
            "expected torch.uint8 (T, K) and torch.int8 (N, K)"
        )
    if not values.numel():
        return u.new_zeros(u.shape[0], values.shape[0], dtype=torch.float32)
    packed = cached_weight("int8 onednn", (values.contiguous(),), lambda x: _Packed(_pack_onednn(x), _sums(x)))
    return _multiply(u, packed.panels, values.shape[0])


def _multiply(u: Tensor, panels: Tensor, columns: int) -> Tensor:
    """oneDNN's product of a weight that it packed."""
    if u.dim() != 2 or not u.shape[1]:
        raise ValueError(f"linear_int8_product: u has shape {tuple(u.shape)}; expected (T, K), K at least 1")
    if not u.shape[0]:
        return u.new_empty(0, columns, dtype=torch.float32)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int64)
    out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        pad_rows(u), 1.0, 0, panels, one, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out[: u.shape[0]]


def _product_and_sums(ops: Any, u: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """u values^T by oneDNN, and the sums of the rows of values."""
    if torch.compiler.is_compiling():
        return ops.linear_int8_product(u, values), _sums(values)
    packed = _Packed.of(values)
    return _multiply(u, packed.panels, values.shape[0]), packed.sums


def _check_exact(values: Tensor) -> None:
    largest, limit = int(values.to(torch.int16).abs().max()), weight_limit()
    if largest > limit:
        raise ValueError(
            f"linear_int8: the weight has values up to {largest} in magnitude, made for a CPU with VNNI; this one "
            f"multiplies up to {limit} exactly. Quantize the model on this machine, or with limit={limit}"
        )


def _pack_onednn(values: Tensor) -> Tensor:
    _check_exact(values)
    packed: Tensor = torch.ops.onednn.qlinear_prepack(values, [_PACKED_ROWS, values.shape[1]])
    return packed


def _pack_tiles(values: Tensor) -> Tensor:
    _check_exact(values)
    packed: Tensor = torch.ops.bert_fast.linear_int8_pack(values)
    return packed


def _use_tiles() -> bool:
    return BACKEND == "tiles" and not torch.compiler.is_compiling()  # a traced weight can't be packed ahead


def _layer(
    ops: Any,
    rows: tuple[Tensor, Tensor, Tensor],
    weight: tuple[Tensor, ...],
    bias: Tensor | None,
    activation: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """act(x weight^T + bias) in `dtype`, of quantized rows of x: u (T, K), scale (T,), low (T,)."""
    values, scale, _ = weight
    u, *scale_and_low = rows
    how = (bias, ACTIVATIONS[activation].code, dtype == torch.bfloat16)
    out: Tensor
    if _use_tiles():
        packed = _Packed.of(values)
        out = ops.linear_int8_tiles(u, packed.panels, values.shape[0], *scale_and_low, scale, packed.sums, *how)
    else:
        product, sums = _product_and_sums(ops, u, values)
        out = ops.linear_int8_epilogue(product, *scale_and_low, scale, sums, *how)
    return out


def run(
    ops: Any,
    x: Tensor,
    weight: tuple[Tensor, ...],
    bias: Tensor | None,
    activation: str | None,
    input_range: Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear_int8_reference` of float32 or bfloat16 x. `ops` is torch.ops.bert_fast."""
    return _layer(ops, ops.linear_int8_quantize(x, input_range), weight, bias, activation, out_dtype or x.dtype)


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
    """`feed_forward_int8_reference` of float32 or bfloat16 x."""
    rows = ops.linear_int8_quantize(x, up_range)
    if _use_tiles():
        activations = ops.linear_int8_quantize(_layer(ops, rows, up, up_bias, activation, torch.float32), down_range)
    else:
        product, sums = _product_and_sums(ops, rows[0], up[0])
        activations = ops.linear_int8_epilogue_quantize(
            product, *rows[1:], up[1], sums, up_bias, ACTIVATIONS[activation].code, down_range
        )
    return _layer(ops, activations, down, None, None, x.dtype)


def register() -> None:
    """Register the operator that calls a library."""
    implement("linear_int8_product", "CPU", _product)
