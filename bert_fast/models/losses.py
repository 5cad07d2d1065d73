"""The losses of the heads, as transformers defines them, except that the mean of nothing is 0 instead of NaN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.kernels._common.checks import check_integer, check_same_device, check_shape
from bert_fast.models.inputs import IGNORE_INDEX, check_labels


def _upcast(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def class_labels(name: str, labels: Tensor, logits: Tensor) -> Tensor:
    """Check class labels, int64 or int32 (M,) or (M, 1), against logits (M, C).

    Returns:
        int64 (M,).

    Raises:
        TypeError: `labels` is not an integer tensor.
        ValueError: its shape or device is wrong, or a label is neither in [0, C) nor -100.
    """
    check_integer(name, labels)
    check_same_device(logits, **{name: labels})
    flat = labels.reshape(-1)
    check_shape(name, flat, (logits.shape[0],))
    flat = flat.long()
    check_labels(name, flat, logits.shape[1])
    return flat


def mean_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Mean cross entropy over the labels that are not `ignore_index`; logits (M, C), labels int64 (M,)."""
    total = F.cross_entropy(_upcast(logits), labels, ignore_index=ignore_index, reduction="sum")
    return total / (labels != ignore_index).sum().clamp(min=1)


def mean_squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of (logits - labels)^2; logits (M, C), labels (M, C), or (M,) where C is 1."""
    check_same_device(logits, labels=labels)
    if logits.shape[1] == 1:
        labels = labels.reshape(-1, 1)
    check_shape("labels", labels, tuple(logits.shape))
    upcast = _upcast(logits)
    return F.mse_loss(upcast, labels.to(upcast.dtype), reduction="sum") / max(logits.numel(), 1)


def mean_binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross entropy over all classes; logits (M, C), labels (M, C) in [0, 1]."""
    check_same_device(logits, labels=labels)
    check_shape("labels", labels, tuple(logits.shape))
    upcast = _upcast(logits)
    total = F.binary_cross_entropy_with_logits(upcast, labels.to(upcast.dtype), reduction="sum")
    return total / max(logits.numel(), 1)
