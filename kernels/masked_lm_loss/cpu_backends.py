"""masked_lm_loss on the CPU: products by the kernels of linear, a chunk of labelled rows at a time.

torch computes the others: all on the baseline instruction set, the bfloat16 products of the forward pass, and those of
the backward pass with AMX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common import extensions
from bert_fast.kernels._common.library import INPUTS, implement

CHUNK_BYTES = 32 << 20  # logits in memory at once; README.md has the measurement

# MKL's products run at half of our kernels' rate on AMD processors with AVX-512; on the baseline ours are slower.
_COMPILED = extensions.cpu_isa() != "generic"

# bfloat16 products where the CPU has instructions for them; without, they run at a tenth of float32's rate (README.md).
GEMM_DTYPE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16 if extensions.has_bf16_isa() else torch.float32,
}


def _fwd(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The operator masked_lm_loss_fwd."""
    args = INPUTS["masked_lm_loss_fwd"](*inputs)
    hidden, dense_bias = args.hidden, args.dense_bias
    dtype = GEMM_DTYPE[hidden.dtype]
    width = hidden.shape[1]
    with torch.autocast("cpu", enabled=False):
        rows = (args.labels != args.ignore_index).nonzero().squeeze(1)
        count = torch.tensor(rows.shape[0])
        # Contiguous, because BLAS adds in another order for strided operands. (M, E), M labelled rows.
        x, dense = hidden[rows].to(dtype).contiguous(), args.dense_weight.to(dtype).contiguous()
        norm_weight, norm_bias = args.norm_weight.float(), args.norm_bias.float()
        product = _product(x, dense).float()
        activations = torch.ops.bert_fast.bias_gelu_fwd(product, dense_bias, False)
        normed, mean, rstd = torch.native_layer_norm(activations, [width], norm_weight, norm_bias, args.eps)
        decoder = args.decoder_weight.to(dtype).contiguous(), args.decoder_bias
        loss, correct, ddecoder = _decode(
            normed, args.labels[rows], *decoder, args.label_smoothing, args.z_loss, args.needs_grad
        )
        if not args.needs_grad:
            return loss, correct, count, []

        dnormed, ddecoder_weight, ddecoder_bias = ddecoder
        dactivations, _, _ = torch.ops.aten.native_layer_norm_backward(
            dnormed, activations, [width], mean, rstd, norm_weight, norm_bias, [True, False, False]
        )
        # Not from native_layer_norm_backward: its sums over the rows depend on the number of threads.
        dnorm_weight, dnorm_bias = (dnormed * (activations - mean) * rstd).sum(0), dnormed.sum(0)
        dproduct, ddense_bias = torch.ops.bert_fast.bias_gelu_bwd(dactivations, product, dense_bias, False)
        dproduct = dproduct.to(dtype)
        ddense_weight = torch.empty(dense.shape, dtype=torch.float32)
        _add_dweight(ddense_weight, dproduct, x, first=True)
        dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype)
        dhidden[rows] = _dx(dproduct, dense).to(hidden.dtype)
    gradients = [dhidden, ddense_weight, ddense_bias, dnorm_weight, dnorm_bias, ddecoder_weight, ddecoder_bias]
    return loss, correct, count, gradients


def _decode(
    normed: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    label_smoothing: float,
    z_loss: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Mean loss and correct rows of `normed` (M, E) float32; with `needs_grad` float32 dnormed, dweight, dbias too."""
    count, vocabulary = normed.shape[0], weight.shape[0]
    total, correct = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    dnormed = torch.empty_like(normed) if needs_grad else normed.new_empty(0)
    dweight = normed.new_empty(weight.shape) if needs_grad else normed.new_empty(0)
    dbias = normed.new_zeros(vocabulary) if needs_grad else normed.new_empty(0)
    if not count:
        return total.float(), correct, (dnormed, dweight.zero_(), dbias)
    most = max(1, CHUNK_BYTES // (vocabulary * weight.element_size()))
    step = _ceil_div(count, _ceil_div(count, most))  # chunks of equal size
    for start in range(0, count, step):
        chunk = normed[start : start + step].to(weight.dtype)  # (C, E)
        logits = _product(chunk, weight)  # (C, V)
        chunk_loss, chunk_correct = torch.ops.bert_fast.masked_lm_loss_rows(
            logits, labels[start : start + step], bias, dbias, 1.0 / count, label_smoothing, z_loss, needs_grad
        )
        total += chunk_loss
        correct += chunk_correct
        if needs_grad:  # the logits hold their gradient now
            dnormed[start : start + step] = _dx(logits, weight)
            _add_dweight(dweight, logits, chunk, first=start == 0)
    return (total / count).float(), correct, (dnormed, dweight, dbias)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T."""
    if _COMPILED and x.dtype == torch.float32:
        out: Tensor = torch.ops.bert_fast.linear_unpacked(x, [weight], None, 0)
        return out
    return torch.mm(x, weight.T)


def _dx(dout: Tensor, weight: Tensor) -> Tensor:
    """dout weight."""
    if _takes_kernel(dout):
        dx: Tensor = torch.ops.bert_fast.linear_dx(dout, weight)
        return dx
    return torch.mm(dout, weight)


def _add_dweight(dweight: Tensor, dout: Tensor, x: Tensor, *, first: bool) -> None:
    """dweight += dout^T x in float32; with `first` dweight = dout^T x, which saves filling it with zeros."""
    if _takes_kernel(dout):
        torch.ops.bert_fast.linear_dweight(dout, x, dweight, not first)
    elif dout.dtype == torch.float32:
        torch.addmm(dweight, dout.T, x, beta=0 if first else 1, out=dweight)
    elif first:
        dweight.copy_(torch.mm(dout.T, x))
    else:
        dweight += torch.mm(dout.T, x)


def _takes_kernel(dout: Tensor) -> bool:
    return _COMPILED and not (dout.dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported())


def _bwd(dloss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    return [gradient * dloss.to(gradient.dtype) for gradient in gradients]


def register() -> None:
    """Register the operators that call a library; they need the compiled `masked_lm_loss_rows`."""
    implement("masked_lm_loss_fwd", "CPU", _fwd)
    implement("masked_lm_loss_bwd", "CPU", _bwd)
