"""linear on the CPU: which library computes the products of a dtype on an instruction set, and how.

"blas"    torch's own product (MKL on x86-64), then our bias_gelu. In inference of few rows oneDNN's, of packed weights.
"onednn"  oneDNN's product of packed weights, with bias and GeLU inside; in training, of weights as they are.
"float32" for bfloat16 where the CPU has no units for it: the BLAS's float32 product of weights kept in float32.

The choice is by instruction set and dtype alone, never by a timing, so that a process computes what the one before did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common import native
from bert_fast.kernels._common.kept import keepable, kept
from bert_fast.kernels._common.library import implement

# oneDNN chooses a packed layout for a number of rows; one number, so that bits don't depend on who called first.
_PACKED_ROWS = 256
# Of few rows MKL makes too little use of a second thread: at 32 rows, with BERT-base's weights, 53 GFLOP/s where oneDNN
# has 96, at 64 77 and 108, at 128 106 and 114 (AVX2 EPYC, 2026-11-22); on one thread or with more rows they are equal.
_FEW_ROWS = 64
_ATTRIBUTES = {None: ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}
_CODES = {None: 0, "gelu": 1, "gelu_tanh": 2}
_PACKED = {torch.float32: "onednn float32", torch.bfloat16: "onednn bfloat16"}


@dataclass(frozen=True)
class Row:
    """One row of the table of backends; `units` says whether it asks for a CPU that has bfloat16's."""

    isa: str  # what the name of the instruction set begins with
    dtype: torch.dtype
    units: bool
    backend: str
    measured: str


# AVX-512's figures (2 cores) are those that the targets were set by; AVX2's: a thread of an AMD EPYC, 2026-11-21.
TABLE = (
    Row("avx512", torch.float32, False, "onednn", "460 to 490 GFLOP/s packed, GeLU included; MKL 210"),
    Row("avx512", torch.bfloat16, True, "onednn", "800 to 970 GFLOP/s packed, GeLU included"),
    Row("", torch.float32, False, "blas", "70 to 79 GFLOP/s, packed oneDNN as much, with its GeLU 52 -> 72 ms"),
    Row("", torch.bfloat16, False, "float32", "70 GFLOP/s; torch's own bfloat16 product 7"),
)


_ONEDNN = torch.backends.mkldnn.is_available() and native.registered("mkldnn::_linear_pointwise", "CPU")


def _choose(dtype: torch.dtype) -> str:
    isa, units = native.cpu_isa(), native.bf16_units()
    return next(
        row.backend
        for row in TABLE
        if row.dtype == dtype
        and isa.startswith(row.isa)
        and (units or not row.units)
        and (_ONEDNN or row.backend != "onednn")
    )


BACKENDS = {dtype: _choose(dtype) for dtype in (torch.float32, torch.bfloat16)}


def run(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    """act(x [weights]^T + bias), x (T, K) of a dtype in BACKENDS."""
    backend = BACKENDS[x.dtype]
    if backend == "blas" and len(weights) == 1 and (torch.compiler.is_compiling() or not _few(x)):
        return by_blas(torch.ops.bert_fast, x, weights, bias, activation)
    training = torch.is_grad_enabled() and (
        x.requires_grad or any(w.requires_grad for w in weights) or (bias is not None and bias.requires_grad)
    )
    if training or torch.compiler.is_compiling() or not keepable(weights):
        return _differentiable(backend, x, weights, bias, activation)
    if backend == "onednn":
        return _packed(x, weights, bias, activation)
    if backend == "float32":
        return _by_float32(x, weights, bias, activation)
    return _with_bias(torch.ops.bert_fast, _blas(x, weights), bias, activation)


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


def _differentiable(
    backend: str, x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None
) -> Tensor:
    if backend == "blas":
        return by_blas(torch.ops.bert_fast, x, weights, bias, activation)
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


def _few(x: Tensor) -> bool:
    return _ONEDNN and 0 < x.shape[0] <= _FEW_ROWS


def _blas(x: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """x [weights]^T in float32, of weights in any dtype; of few rows by oneDNN, from packed weights."""
    if _few(x):
        return _packed(x, weights, None, None)
    weights = tuple(_float(weight) for weight in weights)
    if len(weights) == 1:
        return F.linear(x, weights[0])
    # Each product into its columns: no copy of the weights, which at few tokens costs as much as the products.
    out = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in weights))
    first = 0
    for weight in weights:
        torch.mm(x, weight.t(), out=out[:, first : first + weight.shape[0]])
        first += weight.shape[0]
    return out


def _float(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float32 else kept("float32", (weight,), Tensor.float)


def _by_float32(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        product = _blas(x.float(), weights)
    out: Tensor = torch.ops.bert_fast.linear_finish(product, bias, _CODES[activation])
    return out


def pack(weight: Tensor) -> Tensor:
    """The weight (N, K) in oneDNN's own layout, opaque to torch."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)
    return packed


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """oneDNN's x weight^T, of a weight that is packed or not."""
    kind, algorithm = _ATTRIBUTES[activation]
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, kind, [], algorithm)
    return out


def _packed(x: Tensor, weights: tuple[Tensor, ...], bias: Tensor | None, activation: str | None) -> Tensor:
    if not x.shape[0]:
        return x.new_empty(0, sum(weight.shape[0] for weight in weights))
    packed = kept(_PACKED[x.dtype], weights, lambda weight: pack(weight.to(x.dtype)))
    return _pointwise(x, packed, None if bias is None else bias.to(x.dtype), activation)


def _product(x: Tensor, weight: Tensor, keep: bool) -> Tensor:
    """The operator linear_fwd: x weight^T in the dtype of x."""
    with torch.autocast("cpu", enabled=False):
        backend = BACKENDS[x.dtype]
        if backend == "onednn" and x.shape[0]:
            if keep and keepable((weight,)):
                return _packed(x, (weight,), None, None)
            return _pointwise(x.contiguous(), weight.to(x.dtype).contiguous())
        if keep and keepable((weight,)):
            weight = _float(weight)
        return F.linear(x.float(), weight.float()).to(x.dtype)


def _gradients(dout: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """The operator linear_bwd: dx in the dtype of x and dweight in that of weight; empty where not needed."""
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    with torch.autocast("cpu", enabled=False):
        if BACKENDS[x.dtype] == "onednn" and x.shape[0]:
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
