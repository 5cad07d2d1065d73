"""Backends of linear on the CPU: which library or kernel computes the product of a dtype on an instruction set.

"tiles"   in inference: our product, with bias and GeLU in its epilogue (csrc/linear); of bfloat16 by dot products of
          pairs where the CPU has them, else in float32.
"blas"    torch's own product (MKL on x86-64), then our bias_gelu.
"onednn"  oneDNN's product, with bias and GeLU in its epilogue.
"float32" in training: the BLAS's float32 product of bfloat16 operands, where the CPU has no bfloat16 instructions.

The gradients of "onednn" and "float32" are our kernels' (csrc/linear/cpu_gradient.cpp), but for bfloat16 with AMX.

The weight of a call is read where it lies; in inference those that `bert_fast.freeze` was called for are packed once.

The choice depends on the instruction set and the dtype alone, never on a timing, so that every process computes the
same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common import extensions
from bert_fast.kernels._common.activation import ACTIVATIONS
from bert_fast.kernels._common.checks import parameter_like
from bert_fast.kernels._common.library import implement
from bert_fast.kernels._common.row_buckets import pad_rows
from bert_fast.kernels._common.weight_cache import are_frozen, cacheable, cached_weight

# oneDNN chooses a packed layout by the number of rows: a constant, so that bits don't depend on the first caller's.
_PACKED_ROWS = 256
_ONEDNN_KINDS = {torch.float32: "onednn float32", torch.bfloat16: "onednn bfloat16"}
_TILES_KINDS = {torch.float32: "tiles float32", torch.bfloat16: "tiles bfloat16"}


class Backends(NamedTuple):
    """The backend of the products in inference and the one in training."""

    inference: str
    training: str


@dataclass(frozen=True)
class BackendRule:
    """The backends of one dtype on the instruction sets whose name starts with `isa`."""

    isa: str
    dtype: torch.dtype
    needs: str  # "bf16" or "amx": only on CPUs with such instructions; "" for any
    backends: Backends
    measured: str


# GFLOP/s at 1,024 rows. "Zen 5": one thread of an AMD EPYC (Zen 5) by its CPU time, tiles and packed oneDNN
# interleaved, 2026-11-30, on a busy machine; "AVX2": two threads of an AMD EPYC, 2026-11-22, whose fused multiply-adds
# alone reach 192.
TABLE = (
    BackendRule(
        "avx512",
        torch.float32,
        "",
        Backends("tiles", "onednn"),
        "Zen 5: 205 to 240, oneDNN 225 to 243; few rows: README",
    ),
    BackendRule(
        "avx512", torch.bfloat16, "amx", Backends("onednn", "onednn"), "no: AMX has 8 times the rate of AVX-512 BF16"
    ),
    BackendRule(
        "avx512",
        torch.bfloat16,
        "bf16",
        Backends("tiles", "onednn"),
        "Zen 5: 451 to 494, oneDNN 445 to 495; few: README",
    ),
    BackendRule(
        "avx2", torch.float32, "", Backends("tiles", "blas"), "AVX2: 140 to 159, MKL 124 to 140; few rows: README"
    ),
    BackendRule("", torch.float32, "", Backends("blas", "blas"), "AVX2: 70 to 79 per thread, by MKL"),
    BackendRule("", torch.bfloat16, "", Backends("tiles", "float32"), "AVX2: 134 to 143; torch's own product 14"),
)

_ONEDNN = torch.backends.mkldnn.is_available() and extensions.registered("mkldnn::_linear_pointwise", "CPU")


def _choose(dtype: torch.dtype) -> Backends:
    isa = extensions.cpu_isa()
    has = {"": True, "bf16": extensions.has_bf16_isa(), "amx": extensions.has_amx()}
    return next(
        rule.backends
        for rule in TABLE
        if rule.dtype == dtype
        and isa.startswith(rule.isa)
        and has[rule.needs]
        and (_ONEDNN or "onednn" not in rule.backends)
    )


_AMX = extensions.has_bf16_isa() and torch.cpu._is_amx_tile_supported()
BACKENDS = {dtype: _choose(dtype) for dtype in (torch.float32, torch.bfloat16)}


class LinearArguments(NamedTuple):
    """The arguments of `linear_reference`."""

    x: Tensor
    weights: tuple[Tensor, ...]
    bias: Tensor | None
    activation: str | None

    @property
    def trains(self) -> bool:
        """Whether autograd records the call."""
        return torch.is_grad_enabled() and (
            self.x.requires_grad
            or any(weight.requires_grad for weight in self.weights)
            or (self.bias is not None and self.bias.requires_grad)
        )


def run(ops: Any, *inputs: Any) -> Tensor:
    """act(x weight^T + bias) on the CPU, for the dtypes of BACKENDS. `ops` is torch.ops.bert_fast."""
    call = LinearArguments(*inputs)
    training = call.trains
    backends = BACKENDS[call.x.dtype]
    backend = backends.training if training else backends.inference
    eager = not training and not torch.compiler.is_compiling() and cacheable(call.weights)
    if backend == "blas":
        if eager and len(call.weights) > 1 and are_frozen(call.weights):
            call = call._replace(weights=(cached_weight("concatenated", call.weights, lambda weight: weight),))
        return blas(ops, *call)
    if not eager:
        return _differentiable(ops, call)
    return _onednn(call) if backend == "onednn" else _tiles(call)


def blas(ops: Any, *inputs: Any) -> Tensor:
    """act(x weight^T + bias) by torch's own product and the bias_gelu of `ops`, on any device."""
    x, weights, bias, activation = LinearArguments(*inputs)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    weight = parameter_like(weight, x)
    if activation is not None:
        return _epilogue(ops, F.linear(x, weight), bias, activation)
    if bias is not None and bias.dtype != weight.dtype:
        bias = bias.to(weight.dtype)
    return F.linear(x, weight, bias)


def _differentiable(ops: Any, call: LinearArguments) -> Tensor:
    weight = call.weights[0] if len(call.weights) == 1 else torch.cat(call.weights)
    cache_weight = not (torch.is_grad_enabled() and weight.requires_grad) and len(call.weights) == 1
    product: Tensor = ops.linear_fwd(call.x, weight, cache_weight)
    return _epilogue(ops, product, call.bias, call.activation)


def _epilogue(ops: Any, product: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if activation is None:
        return product if bias is None else product + bias.to(product.dtype)
    if bias is None:
        bias = product.new_zeros(product.shape[1])
    out: Tensor = ops.bias_gelu_fwd(product, bias, ACTIVATIONS[activation].approximate == "tanh")
    return out


def _tiles(call: LinearArguments) -> Tensor:
    code = ACTIVATIONS[call.activation].code
    out: Tensor
    if are_frozen(call.weights):
        dtype = call.x.dtype
        packed = cached_weight(
            _TILES_KINDS[dtype],
            call.weights,
            lambda weight: torch.ops.bert_fast.linear_pack(weight, dtype == torch.bfloat16),
        )
        columns = sum([weight.shape[0] for weight in call.weights])
        out = torch.ops.bert_fast.linear_tiles(call.x, packed, columns, call.bias, code)
    else:
        out = torch.ops.bert_fast.linear_unpacked(call.x, call.weights, call.bias, code)
    return out


def pack(weight: Tensor) -> Tensor:
    """`weight` (N, K) in oneDNN's packed layout, opaque to torch."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _PACKED_ROWS)
    return packed


def _pointwise(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """oneDNN's act(x weight^T + bias); `weight` is packed or not."""
    bias = None if bias is None else bias.contiguous()  # oneDNN ignores its stride
    kind, approximate = "none" if activation is None else "gelu", ACTIVATIONS[activation].approximate
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, kind, [], approximate)
    return out


def _onednn(call: LinearArguments) -> Tensor:
    x, weights, bias, activation = call
    if not x.shape[0]:
        return x.new_empty(0, sum(weight.shape[0] for weight in weights))
    if are_frozen(weights):
        weight = cached_weight(_ONEDNN_KINDS[x.dtype], weights, lambda weight: pack(weight.to(x.dtype)))
    else:
        weight = (weights[0] if len(weights) == 1 else torch.cat(weights)).to(x.dtype)
    return _pointwise(pad_rows(x), weight, None if bias is None else bias.to(x.dtype), activation)[: x.shape[0]]


def _check_product(x: Tensor, weight: Tensor) -> None:
    """oneDNN and the tiles read memory by these shapes."""
    fits = x.dim() == 2 and weight.dim() == 2 and x.shape[1] == weight.shape[1]
    if not fits or x.dtype not in BACKENDS or not weight.is_floating_point():
        raise ValueError(
            f"linear_fwd: x is {x.dtype} {tuple(x.shape)} and weight {weight.dtype} {tuple(weight.shape)}; expected "
            "torch.float32 or torch.bfloat16 (T, K) and floating point (N, K)"
        )


def _product(x: Tensor, weight: Tensor, cache_weight: bool) -> Tensor:
    """The operator linear_fwd: x weight^T in the dtype of x; `cache_weight` takes the path of inference."""
    _check_product(x, weight)
    with torch.autocast("cpu", enabled=False):
        cache_weight = cache_weight and cacheable((weight,))
        backend = BACKENDS[x.dtype].inference if cache_weight else BACKENDS[x.dtype].training
        if backend == "tiles":
            return _tiles(LinearArguments(x, (weight,), None, None))
        if backend == "onednn" and x.numel() and weight.numel():
            if cache_weight:
                return _onednn(LinearArguments(x, (weight,), None, None))
            return _pointwise(pad_rows(x.contiguous()), weight.to(x.dtype).contiguous())[: x.shape[0]]
        return F.linear(x.float(), weight.float()).to(x.dtype)


def _gradients(dout: Tensor, x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor]:
    """The operator linear_bwd: dx in the dtype of x, dweight in that of weight; empty where not needed."""
    _check_product(x, weight)
    if dout.shape != (x.shape[0], weight.shape[0]) or dout.dtype != x.dtype or len(needs) != 2:
        raise ValueError(f"linear_bwd: dout is {dout.dtype} {tuple(dout.shape)}; expected that of the product")
    dx, dweight = x.new_empty(0), weight.new_empty(0)
    with torch.autocast("cpu", enabled=False):
        if _AMX and x.dtype == torch.bfloat16:  # its rate is several times that of our kernels
            dout = pad_rows(dout)  # zeros, which add nothing to dweight
            if needs[0]:
                dx = torch.mm(dout, weight.to(x.dtype))[: x.shape[0]]
            if needs[1]:
                dweight = torch.mm(dout.t(), pad_rows(x)).to(weight.dtype)
            return dx, dweight
        if needs[0]:
            readable = weight.dtype in (torch.float32, x.dtype)
            dx = torch.ops.bert_fast.linear_dx(dout, weight if readable else weight.to(x.dtype))
        if needs[1]:
            dtype = weight.dtype if weight.dtype == x.dtype else torch.float32
            dweight = weight.new_empty(weight.shape, dtype=dtype)
            torch.ops.bert_fast.linear_dweight(dout, x, dweight, False)
            dweight = dweight.to(weight.dtype)
    return dx, dweight


def register() -> None:
    """Register the operators that call a library."""
    implement("linear_fwd", "CPU", _product)
    implement("linear_bwd", "CPU", _gradients)
