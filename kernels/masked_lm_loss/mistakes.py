"""What kernels of masked_lm_loss get wrong: see kernels/_common/mistakes.py."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common.mistakes import NORM_MISTAKES, normalize


def _mistaken(
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
    *,
    approximate: str = "none",
    normalizes: bool = True,
    adds_bias: bool = True,
    smooths: bool = True,
    uses_z: bool = True,
    mean_over: str = "labelled",
    **norm: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = hidden.dtype
    masked = labels != ignore_index
    rows = len(labels)
    hidden, labels = hidden[masked], labels[masked]
    x = F.gelu(F.linear(hidden, dense_weight.to(dtype), dense_bias.to(dtype)), approximate=approximate)
    if normalizes:
        x = normalize(x, norm_weight, norm_bias, eps, **norm)
    logits = F.linear(x, decoder_weight.to(dtype))
    logits = (logits + decoder_bias.to(dtype) * (1.0 if adds_bias else 0.0)).to(
        hidden.dtype if hidden.dtype.itemsize == 8 else x.float().dtype
    )
    total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing if smooths else 0.0)
    total = total + (z_loss if uses_z else 0.0) * logits.logsumexp(-1).square().sum()
    count = {"labelled": max(1, len(labels)), "nothing": 1, "all": max(1, rows)}[mean_over]
    loss = total / count + 0.0 * (norm_weight.sum() + norm_bias.sum()).to(total.dtype)
    return loss, (logits.argmax(-1) == labels).sum(), masked.sum()


MISTAKES = {
    **{name: functools.partial(_mistaken, **options) for name, options in NORM_MISTAKES.items()},
    "the loss is the sum, not the mean": functools.partial(_mistaken, mean_over="nothing"),
    "the loss is the mean over all rows, not the labelled ones": functools.partial(_mistaken, mean_over="all"),
    "tanh GeLU in place of erf GeLU": functools.partial(_mistaken, approximate="tanh"),
    "LayerNorm is left out": functools.partial(_mistaken, normalizes=False),
    "the decoder's bias is not added": functools.partial(_mistaken, adds_bias=False),
    "label smoothing is left out": functools.partial(_mistaken, smooths=False),
    "z-loss is left out": functools.partial(_mistaken, uses_z=False),
}
