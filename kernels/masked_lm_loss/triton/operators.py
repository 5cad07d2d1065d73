"""masked_lm_loss in Triton: labelled rows only, a chunk of logits at a time, no synchronization with the host.

M, the number of labelled rows, stays on the device (gemm.py). Their indices are compacted in rising order. For a chunk
of C rows the logits are computed, overwritten with their gradient and multiplied into the other gradients while they
are in memory. Gradients are those of a sum over the rows up to the last kernel, which multiplies by 1 / M: divided by M
earlier, a softmax over 30522 words would underflow in float16.

FLOPs: 3 x 2 M E (V + E). Bytes: README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bert_fast.kernels._common.triton_launch import ceil_div, launch, next_power_of_2, rows_contiguous
from bert_fast.kernels.masked_lm_loss.triton.gemm import gemm, programs
from bert_fast.kernels.masked_lm_loss.triton.rows import (
    column_sum_kernel,
    count_kernel,
    index_kernel,
    loss_kernel,
    multiply_kernel,
    transform_bwd_kernel,
    transform_kernel,
)

# Logits in memory at once: 4352 rows of 30522 in 16-bit dtypes, the labelled ones of 28000 tokens at 15 %, so that the
# (V, E) gradient is written once and not read. Small compared with the activations of such a batch.
CHUNK_BYTES = 256 << 20
CHUNK_ROWS = 128  # chunks are whole tiles
VOCABULARY_MULTIPLE = 64  # rows of logits are padded to it for 16-byte loads, which rows of 30522 don't allow
SCAN_BLOCK = 1024
LOSS_BLOCK = 2048  # logits of a program at a time: 4 per thread; with 8 the three sums over a row spill
# Sums over rows are split into a constant number of parts: the order of additions, and so the bits, must not depend on
# the device. A part takes every 256th block of rows, which balances the parts whatever M is.
PARTS = 256


def _labelled_rows(labels: Tensor, vocabulary: int, ignore_index: int) -> tuple[Tensor, Tensor]:
    """index int32 (T,), whose first `count` entries are the labelled rows in rising order; count int64 ()."""
    T = labels.shape[0]
    index = labels.new_empty(T, dtype=torch.int32)
    if not T:
        return index, labels.new_zeros(())
    labels, blocks = labels.contiguous(), ceil_div(T, SCAN_BLOCK)
    counts = labels.new_empty(blocks)
    launch(count_kernel, (blocks,), labels, counts, T, vocabulary, ignore_index, BLOCK=SCAN_BLOCK)
    ends = counts.cumsum(0)
    launch(index_kernel, (blocks,), labels, ends, index, T, vocabulary, ignore_index, BLOCK=SCAN_BLOCK)
    return index, ends[-1].clone()


def masked_lm_loss_fwd(
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
    (T, E), V, dtype = hidden.shape, decoder_weight.shape[0], hidden.dtype
    hidden, dense = rows_contiguous(hidden), dense_weight.to(dtype).contiguous()
    dense_bias, norm_weight, norm_bias = dense_bias.contiguous(), norm_weight.contiguous(), norm_bias.contiguous()
    index, count = _labelled_rows(labels, V, ignore_index)
    block = next_power_of_2(E)
    transform = {"BLOCK_R": max(1, 1024 // block), "BLOCK_E": block, "num_warps": 4 if block <= 2048 else 16}
    blocks = ceil_div(T, transform["BLOCK_R"])

    product = hidden.new_empty(T, E)
    normed = hidden.new_empty(T, E)
    gemm("NT", hidden, dense, product, count, index=index, indexed="a")
    launch(
        transform_kernel, (min(blocks, programs(hidden.device, 8)),),
        product, dense_bias, norm_weight, norm_bias, normed, count, T, E, eps, **transform,
    )  # fmt: skip
    decoder = decoder_weight.to(dtype).contiguous()
    losses, correct_rows, ddecoder = _decode(
        normed, decoder, decoder_bias.contiguous(), labels.contiguous(), index, count,
        label_smoothing, z_loss, needs_grad,
    )  # fmt: skip
    loss = (losses.sum(dtype=torch.float64) / count.clamp(min=1)).float()
    correct = correct_rows.sum()
    if not needs_grad:
        return loss, correct, count, []

    gradient, ddecoder_weight, ddecoder_bias = ddecoder
    partial = gradient.new_empty((min(blocks, PARTS), 3, E), dtype=torch.float32)
    launch(
        transform_bwd_kernel, (partial.shape[0],),
        gradient, product, dense_bias, norm_weight, partial, count, T, E, eps, **transform,
    )  # fmt: skip
    dnorm_weight, dnorm_bias, ddense_bias = (partial[:, i].sum(0) for i in range(3))
    ddense_weight = gradient.new_empty((E, E), dtype=torch.float32)
    gemm("TN", gradient, hidden, ddense_weight, count, index=index, indexed="b", scaled=True, narrow=True)
    dhidden = hidden.new_zeros((T, E), dtype=torch.float32 if dtype == torch.float16 else dtype)
    gemm("NN", gradient, dense, dhidden, count, index=index, indexed="out", scaled=True)
    parameters = [ddense_weight, ddense_bias, dnorm_weight, dnorm_bias, ddecoder_weight, ddecoder_bias]
    return loss, correct, count, [dhidden, *parameters]


def _decode(
    normed: Tensor,
    decoder: Tensor,
    bias: Tensor,
    labels: Tensor,
    index: Tensor,
    count: Tensor,
    label_smoothing: float,
    z_loss: float,
    needs_grad: bool,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The losses (T,) of the first `count` rows of `normed` and whether each is correct (T,), then zeros.

    With `needs_grad` also dnormed, of the sum over rows, in the dtype of `normed`, and the mean's dweight and dbias.
    """
    (T, E), V = normed.shape, decoder.shape[0]
    padded = ceil_div(V, VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    most = max(1, CHUNK_BYTES // (padded * normed.element_size()) // CHUNK_ROWS) * CHUNK_ROWS
    logits = normed.new_empty(min(most, T), padded)
    block = min(LOSS_BLOCK, next_power_of_2(padded))
    rows = LOSS_BLOCK // block  # of a program
    losses = normed.new_zeros(T, dtype=torch.float32)
    correct = labels.new_zeros(T, dtype=torch.int32)
    dnormed = normed.new_empty(T if needs_grad else 0, E)
    # The rows of the padding become zeros and are cut off.
    dweight = normed.new_empty((padded if needs_grad else 0, E), dtype=torch.float32)
    dbias = normed.new_empty(padded if needs_grad else 0, dtype=torch.float32)
    for start in range(0, max(T, 1), most):
        chunk = normed[start : start + most]
        z = logits[: chunk.shape[0]]
        gemm("NT", chunk, decoder, z, count, start=start)
        launch(
            loss_kernel, (min(ceil_div(z.shape[0], rows), programs(z.device, 4)),),
            z, bias, labels, index, losses, correct, count, start, z.shape[0], V, padded, label_smoothing, z_loss,
            GRAD=needs_grad, BLOCK_R=rows, BLOCK_V=block, num_warps=16,
        )  # fmt: skip
        if needs_grad:  # the logits hold their gradient now
            gemm("NN", z, decoder, dnormed[start : start + most], count, start=start)
            gemm("TN", z, chunk, dweight, count, start=start, scaled=True, accumulate=start > 0)
            launch(
                column_sum_kernel, (ceil_div(padded, 64),),
                z, dbias, count, start, z.shape[0], padded, ACCUMULATE=start > 0, BLOCK_C=64, BLOCK_V=64,
            )  # fmt: skip
    return losses, correct, (dnormed, dweight[:V], dbias[:V])


def masked_lm_loss_bwd(dloss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    scaled = []
    for gradient in gradients:
        x = gradient.contiguous()
        out, size = torch.empty_like(x), x.numel()
        launch(multiply_kernel, (ceil_div(size, 4096),), x, dloss, out, size, BLOCK=4096, num_warps=8)
        scaled.append(out)
    return scaled
