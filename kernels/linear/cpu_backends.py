"""linear on the CPU: what computes the products of a dtype on an instruction set, and how.

"tiles"   in inference: our own float32 products of packed weights, with bias and GeLU inside (csrc/linear).
"blas"    torch's own product (MKL on x86-64), then our bias_gelu.
"onednn"  oneDNN's product of packed weights, with bias and GeLU inside; in training, of weights as they are.
"float32" in training: for bfloat16 where the CPU has no units for it, the BLAS's float32 product.

The choice is by instruction set and dtype alone, never by a timing, so that a process computes what the one before did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common import extensions
from bert_fast.kernels._common.library import implement
from bert_fast.kernels._common.weight_cache import cacheable, cached_weight

# oneDNN chooses a packed layout for a number of rows; one number, so that bits don't depend on who called first.
_PACKED_ROWS = 256
_ATTRIBUTES = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
_CODES = {None: 0, "gelu": 1, "gelu_tanh": 2}
_PACKED = {torch.float32: "onednn float32", torch.bfloat16: "onednn bfloat16"}


class Backends(NamedTuple):
    """What computes the products of inference, and those of training."""

    inference: str
    training: str


@dataclass(frozen=True)
class Row:
    """One row of the table of backends; `units` says whether it asks for a CPU that has bfloat16's."""

    isa: str  # what the name of the instruction set begins with
    dtype: torch.dtype
    units: bool
    backends: Backends
    measured: str


# GFLOP/s. AVX-512's (2 cores) are those that the targets were set by; AVX2's are of two threads of an AMD EPYC, whose
# fused multiply-adds alone reach 192, at 1,024 rows, 2026-11-22.
TABLE = (
    Row("avx512", torch.float32, False, Backends("onednn", "onednn"), "460 to 490 packed, GeLU included; MKL 210"),
    Row("avx512", torch.bfloat16, True, Backends("onednn", "onednn"), "800 to 970 packed, GeLU included"),
    Row("avx2", torch.float32, False, Backends("tiles", "blas"), "140 to 159, MKL 124 to 140; few rows: README.md"),
    Row("", torch.float32, False, Backends("blas", "blas"), "70 to 79 a thread, by MKL on AVX2"),
    Row("", torch.bfloat16, False, Backends("tiles", "float32"), "134 to 143; torch's own bfloat16 product 14"),
)


_ONEDNN = torch.backends.mkldnn.is_available() and extensions.registered("mkldnn::_linear_pointwise", "CPU")


def _choose(dtype: torch.dtype) -> Backends:
    isa, units = extensions.cpu_isa(), extensions.bf16_units()
    return next(
        row.backends
        for row in TABLE
        if row.dtype == dtype
        and isa.startswith(row.isa)
        and (units or not row.units)
        and (_ONEDNN or "onednn" not in row.backends)
    )


BACKENDS = {dtype: _choose(dtype) for dtype in (torch.float32, torch.bfloat16)}


def run(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x [weights]^T + bias), x (T, K) of a dtype in BACKENDS."""
    training = torch.is_grad_enabled() and (
        x.requires_grad or any(w.requires_grad for w in weights) or (bias is not None and bias.requires_grad)
    )
    backend = BACKENDS[x.dtype].training if training else BACKENDS[x.dtype].inference
    if backend == "blas":
        if len(weights) > 1 and not training and cacheable(weights) and not torch.compiler.is_compiling():
            weights = (cached_weight("joined", weights, lambda joined: joined),)
        return by_blas(torch.ops.bert_fast, x, weights, bias, activation)
    if training or torch.compiler.is_compiling() or not cacheable(weights):
        return _differentiable(x, weights, bias, activation)
    if backend == "onednn":
        return _packed(x, weights, bias, activation)
    return _tiles(x, weights, bias, activation)


def by_blas(ops: Any, x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x [weights]^T + bias) by torch's own product and the bias_gelu of `ops`; on any device."""
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):  # which keeps what it cast
        weight = weight.to(x.dtype)
    if activation is not None:
        return _with_bias(ops, F.linear(x, weight), bias, activation)
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    return F.linear(x, weight, bias)


def _differentiable(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    keep = not (torch.is_grad_enabled() and weight.requires_grad) and len(weights) == 1
    product: Tensor = torch.ops.bert_fast.linear_fwd(x, weight, keep)
    return _with_bias(torch.ops.bert_fast, product, bias, activation)


def _with_bias(ops: Any, product: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if activation is None:
        return product if bias is None else product + bias.to(product.dtype)
    if bias is None:
        bias = product.new_zeros(product.shape[1])
    out: Tensor = ops.bias_gelu_fwd(product, bias, activation == "gelu_tanh")
    return out


def _tiles(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    packed = cached_weight("tiles", weights, torch.ops.bert_fast.linear_pack)
    columns = sum([weight.shape[0] for weight in weights])
    out: Tensor = torch.ops.bert_fast.linear_tiles(x, packed, columns, bias, _CODES[activation])
    return out


def pack(weight: Tensor) -> Tensor:
    """The weight (N, K) in oneDNN's own layout, opaque to torch."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)
    return packed


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """oneDNN's x weight^T, of a weight that is packed or not."""
    kind, algorithm = _ATTRIBUTES[activation]
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, kind, [], algorithm)
    return out


def _packed(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    if not x.shape[0]:
        return x.new_empty(0, sum(weight.shape[0] for weight in weights))
    packed = cached_weight(_PACKED[x.dtype], weights, lambda weight: pack(weight.to(x.dtype)))
    return _pointwise(x, packed, None if bias is None else bias.to(x.dtype), activation)


def _product(x: Tensor, weight: Tensor, keep: bool) -> Tensor:
    """The operator linear_fwd: x weight^T in the dtype of x; of a weight to `keep` as in inference."""
    with torch.autocast("cpu", enabled=False):
        keep = keep and cacheable((weight,))
        backend = BACKENDS[x.dtype].inference if keep else BACKENDS[x.dtype].training
        if backend == "tiles":
            return _tiles(x, (weight,), None, None)
        if backend == "onednn" and x.shape[0]:
            if keep:
                return _packed(x, (weight,), None, None)
            return _pointwise(x.contiguous(), weight.to(x.dtype).contiguous())
        return F.linear(x.float(), weight.float()).to(x.dtype)


def _gradients(dout: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """The operator linear_bwd: dx in the dtype of x and dweight in that of weight; empty where not needed."""
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    with torch.autocast("cpu", enabled=False):
        if BACKENDS[x.dtype].training == "onednn" and x.shape[0]:
            if needs[0]:
                dx = _pointwise(dout.contiguous(), pack(weight.to(x.dtype).t()))
            if needs[1]:
                dweight = _pointwise(dout.t().contiguous(), x.t().contiguous()).to(weight.dtype)
            return dx, dweight
        wide = dout.float()
        if needs[0]:
            dx = torch.mm(wide, weight.float()).to(x.dtype)
        if needs[1]:
            dweight = torch.mm(wide.t(), x.float()).to(weight.dtype)
    return dx, dweight


def register() -> None:
    """Register the CPU kernels whose products are a library's."""
    implement("linear_fwd", "CPU", _product)
    implement("linear_bwd", "CPU", _gradients)
