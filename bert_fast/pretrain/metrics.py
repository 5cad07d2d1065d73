"""Losses and accuracies as sums and counts, so that any number of batches aggregates exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FIELDS = ("mlm_loss", "mlm_correct", "mlm_count", "nsp_loss", "nsp_correct", "nsp_count")


class Totals:
    """Sums over batches, float64 on the device: adding a batch does not wait for it."""

    def __init__(self, device: torch.device | str, values: Sequence[float] | None = None) -> None:
        self.sums = torch.tensor(values or [0.0] * len(FIELDS), dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Begin anew, in the same memory."""
        self.sums.zero_()

    def add(self, mlm_loss: Tensor, mlm_correct: Tensor, mlm_count: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Args:
            mlm_loss: mean loss over its masked tokens.
            mlm_correct, mlm_count: masked tokens predicted right, and all of them.
            logits: (B, 2) of the sentence pairs.
            labels: (B,) int64, -100 where there is no pair.
        """
        nsp_loss = F.cross_entropy(logits.detach().float(), labels, reduction="sum", ignore_index=-100)
        nsp_correct = (logits.detach().argmax(-1) == labels).sum()
        count = mlm_count.double()
        mlm = torch.where(count > 0, mlm_loss.detach().double() * count, 0.0)
        pairs = (labels != -100).sum()
        new = [mlm, mlm_correct, count, nsp_loss, nsp_correct, pairs]
        self.sums += torch.stack([value.double() for value in new])

    def loss(self) -> Tensor:
        """Mean MLM loss plus mean NSP loss of what was added, float64 () on the device; 0 for what there is none of."""
        mlm, _, tokens, nsp, _, pairs = self.sums.unbind()
        return mlm / tokens.clamp(min=1) + nsp / pairs.clamp(min=1)

    def tolist(self) -> list[float]:
        values: list[float] = self.sums.tolist()
        return values

    def summary(self) -> dict[str, float]:
        """mlm_loss, mlm_accuracy, nsp_loss, nsp_accuracy, NaN where nothing was counted; and loss, the sum of both."""
        totals = dict(zip(FIELDS, self.tolist(), strict=True))
        tokens, pairs = totals["mlm_count"], totals["nsp_count"]
        result = {
            "mlm_loss": _ratio(totals["mlm_loss"], tokens),
            "mlm_accuracy": _ratio(totals["mlm_correct"], tokens),
            "nsp_loss": _ratio(totals["nsp_loss"], pairs),
            "nsp_accuracy": _ratio(totals["nsp_correct"], pairs),
        }
        losses = [result[name] for name, count in (("mlm_loss", tokens), ("nsp_loss", pairs)) if count]
        return {"loss": sum(losses) if losses else float("nan"), **result}


def _ratio(total: float, count: float) -> float:
    return total / count if count else float("nan")


def token_counts(batches: Any, vocab_size: int, ignore_index: int = -100) -> Tensor:
    """How often each token is a target in `batches` (objects with `labels`): int64 (V,)."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for batch in batches:
        counts += torch.bincount(batch.labels[batch.labels != ignore_index], minlength=vocab_size)
    return counts


def unigram_loss(train_counts: Tensor, targets: Tensor) -> float:
    """Mean loss on `targets` of always predicting the token frequencies, in nats.

        -mean(log((train_counts[target] + 1) / (sum(train_counts) + V)))

    The baseline that a masked language model has to beat: what it knows before it looks at the context. Add-one
    smoothing, so that a token never seen in training costs much and not infinitely much.

    Args:
        train_counts: (V,) int64, how often each token occurs in the training split.
        targets: (M,) int64, the held-out tokens to be predicted.

    Returns:
        NaN where there are no targets.
    """
    return float(-log_frequencies(train_counts)[targets].mean())


def log_frequencies(counts: Tensor) -> Tensor:
    """log((counts + 1) / (sum(counts) + V)), float64 (V,)."""
    return ((counts.double() + 1) / (counts.sum() + len(counts))).log()
