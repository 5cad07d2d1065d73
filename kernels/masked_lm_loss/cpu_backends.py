"""masked_lm_loss on the CPU: matrix products by torch's BLAS, a chunk of masked rows at a time; the rest compiled."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_fast.kernels._common import extensions
from bert_fast.kernels._common.library import implement

CHUNK_BYTES = 32 << 20  # logits that are there at once; README.md has the measurement

# bfloat16 products where the CPU has units for them; elsewhere they run at a tenth of float32's rate (README.md).
GEMM_DTYPE = {
    torch.float32: torch.float32,
    torch.bfloat16: torch.bfloat16 if extensions.bf16_units() else torch.float32,
}


def _fwd(
    hidden: Tensor,
    labels: Tensor,
    dense_weight: Tensor,
    dense_bias: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    decoder_weight: Tensor,
    decoder_bias: Tensor,
    eps: float,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    dtype = GEMM_DTYPE[hidden.dtype]
    width = hidden.shape[1]
    with torch.autocast("cpu", enabled=False):
        rows = (labels != ignore_index).nonzero().squeeze(1)
        count = torch.tensor(rows.shape[0])
        # Contiguous, for the BLAS sums in another order where they are not. (M, E), M masked rows.
        x, dense = hidden[rows].to(dtype).contiguous(), dense_weight.to(dtype).contiguous()
        scale, shift = norm_weight.float(), norm_bias.float()
        product = torch.mm(x, dense.T).float()
        activated = torch.ops.bert_fast.bias_gelu_fwd(product, dense_bias, False)
        normed, mean, rstd = torch.native_layer_norm(activated, [width], scale, shift, eps)
        decoder = decoder_weight.to(dtype).contiguous(), decoder_bias
        loss, correct, ddecoder = _decode(normed, labels[rows], *decoder, label_smoothing, z_loss, needs_grad)
        if not needs_grad:
            return loss, correct, count, []

        dnormed, ddecoder_weight, ddecoder_bias = ddecoder
        dactivated, _, _ = torch.ops.aten.native_layer_norm_backward(
            dnormed, activated, [width], mean, rstd, scale, shift, [True, False, False]
        )
        # Not from native_layer_norm_backward: its sums over the rows depend on the number of threads.
        dnorm_weight, dnorm_bias = (dnormed * (activated - mean) * rstd).sum(0), dnormed.sum(0)
        dproduct, ddense_bias = torch.ops.bert_fast.bias_gelu_bwd(dactivated, product, dense_bias, False)
        dproduct = dproduct.to(dtype)
        ddense_weight = torch.mm(dproduct.T, x).float()
        dhidden = torch.zeros(hidden.shape, dtype=hidden.dtype)
        dhidden[rows] = torch.mm(dproduct, dense).to(hidden.dtype)
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
    """Mean loss and hits of rows `normed` (M, E) float32; with `needs_grad` also dnormed, dweight, dbias in float32."""
    count, vocabulary = normed.shape[0], weight.shape[0]
    total, correct = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    dnormed = torch.empty_like(normed) if needs_grad else normed.new_empty(0)
    dweight = normed.new_empty(weight.shape) if needs_grad else normed.new_empty(0)
    dbias = normed.new_zeros(vocabulary) if needs_grad else normed.new_empty(0)
    if not count:
        return total.float(), correct, (dnormed, dweight.zero_(), dbias)
    most = max(1, CHUNK_BYTES // (vocabulary * weight.element_size()))
    step = _ceil_div(count, _ceil_div(count, most))  # chunks of equal size
    buffer = weight.new_empty(step, vocabulary)
    for start in range(0, count, step):
        chunk = normed[start : start + step].to(weight.dtype)  # (C, E)
        logits = torch.mm(chunk, weight.T, out=buffer[: chunk.shape[0]])  # (C, V)
        chunk_loss, hits = torch.ops.bert_fast.masked_lm_loss_rows(
            logits, labels[start : start + step], bias, dbias, 1.0 / count, label_smoothing, z_loss, needs_grad
        )
        total += chunk_loss
        correct += hits
        if needs_grad:  # the logits are their own gradient now
            dnormed[start : start + step] = torch.mm(logits, weight)
            _accumulate(dweight, logits.T, chunk, first=start == 0)
    return (total / count).float(), correct, (dnormed, dweight, dbias)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total += a b in float32; on the `first` call total = a b, which spares filling it with zeros."""
    if a.dtype == torch.float32:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif first:
        total.copy_(torch.mm(a, b))
    else:
        total += torch.mm(a, b)


def _bwd(dloss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    return [gradient * dloss.to(gradient.dtype) for gradient in gradients]


def register() -> None:
    """Register the CPU kernels; they run where the compiled `masked_lm_loss_rows` does."""
    implement("masked_lm_loss_fwd", "CPU", _fwd)
    implement("masked_lm_loss_bwd", "CPU", _bwd)
