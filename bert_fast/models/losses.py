"""The losses of the heads, as transformers defines them, but 0 instead of NaN where there is nothing to average."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.kernels._common.checks import check_integer, check_same_device, check_shape
from bert_fast.models.inputs import IGNORE_INDEX, check_labels


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def class_labels(name: str, labels: Tensor, logits: Tensor) -> Tensor:
    """`labels`, (M,) or (M, 1), as int64 (M,) for logits (M, C). ValueError or TypeError where they don't fit."""
    check_integer(name, labels)
    check_same_device(logits, **{name: labels})
    flat = labels.reshape(-1)
    check_shape(name, flat, (logits.shape[0],))
    flat = flat.long()
    check_labels(name, flat, logits.shape[1])
    return flat


def mean_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Mean cross entropy over the labels that are not `ignore_index`; logits (M, C), labels int64 (M,)."""
    total = F.cross_entropy(_wide(logits), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def mean_squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of (logits - labels)^2; labels have as many elements as logits (M, C)."""
    check_same_device(logits, labels=labels)
    if logits.shape[1] == 1:
        labels = labels.reshape(-1, 1)
    check_shape("labels", labels, tuple(logits.shape))
    wide = _wide(logits)
    return F.mse_loss(wide, labels.to(wide.dtype), reduction="sum") / max(logits.numel(), 1)


def mean_binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross entropy of every class on its own; logits (M, C), labels (M, C) in [0, 1]."""
    check_same_device(logits, labels=labels)
    check_shape("labels", labels, tuple(logits.shape))
    wide = _wide(logits)
    total = F.binary_cross_entropy_with_logits(wide, labels.to(wide.dtype), reduction="sum")
    return total / max(logits.numel(), 1)
