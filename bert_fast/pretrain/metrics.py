"""Metrics of a run: losses and accuracies, the unigram baseline, and throughput (model FLOPs, MFU).

Losses and accuracies are sums and counts, so that any number of batches aggregates exactly.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast._device import autocast
from bert_fast.data import PackedBatch
from bert_fast.models import BertConfig
from bert_fast.pretrain.micro_batches import StepBatches, forward

FIELDS = ("mlm_loss", "mlm_correct", "mlm_count", "nsp_loss", "nsp_correct", "nsp_count")
_GEMM_SECONDS = {"cpu": 0.05, "cuda": 0.5}
_GEMM_SIZE = {"cpu": 768, "cuda": 8192}


class Totals:
    """Sums over batches, float64 on the device: adding a batch does not synchronize."""

    def __init__(self, device: torch.device | str, values: Sequence[float] | None = None) -> None:
        self.sums = torch.tensor(values or [0.0] * len(FIELDS), dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Set all sums to 0, in the same memory."""
        self.sums.zero_()

    def add(self, mlm_loss: Tensor, mlm_correct: Tensor, mlm_count: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Add one batch.

        Args:
            mlm_loss: mean loss over its masked tokens.
            mlm_correct, mlm_count: masked tokens predicted correctly, and all masked tokens.
            logits: (B, 2), of the sentence pairs.
            labels: (B,) int64, -100 for a sequence that is not a pair.
        """
        nsp_loss = F.cross_entropy(logits.detach().float(), labels, reduction="sum", ignore_index=-100)
        nsp_correct = (logits.detach().argmax(-1) == labels).sum()
        count = mlm_count.double()
        mlm = torch.where(count > 0, mlm_loss.detach().double() * count, 0.0)
        pairs = (labels != -100).sum()
        increments = [mlm, mlm_correct, count, nsp_loss, nsp_correct, pairs]
        self.sums += torch.stack([value.double() for value in increments])

    def loss(self) -> Tensor:
        """Mean MLM loss plus mean NSP loss, float64 () on the device; a mean over nothing is 0."""
        mlm, _, tokens, nsp, _, pairs = self.sums.unbind()
        return mlm / tokens.clamp(min=1) + nsp / pairs.clamp(min=1)

    def tolist(self) -> list[float]:
        """The sums, in the order of FIELDS."""
        values: list[float] = self.sums.tolist()
        return values

    def summary(self) -> dict[str, float]:
        """mlm_loss, mlm_accuracy, nsp_loss, nsp_accuracy, and loss, the sum of both; a mean over nothing is NaN."""
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


@torch.no_grad()
def held_out_totals(
    model: torch.nn.Module, batches: Iterable[PackedBatch], device: torch.device, precision: str
) -> Totals:
    """Totals of `model` in eval mode over `batches`."""
    training = model.training
    model.eval()
    totals = Totals(device)
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, precision):
            out = forward(model, batch)
        totals.add(out.mlm_loss, out.mlm_correct, out.mlm_count, out.seq_relationship_logits, batch.next_sentence_label)
    model.train(training)
    return totals


def token_counts(batches: Any, vocab_size: int, ignore_index: int = -100) -> Tensor:
    """How often each token is a target in `batches` (objects with `labels`), int64 (V,)."""
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for batch in batches:
        counts += torch.bincount(batch.labels[batch.labels != ignore_index], minlength=vocab_size)
    return counts


def unigram_loss(train_counts: Tensor, targets: Tensor) -> float:
    """Mean loss on `targets` of always predicting the token frequencies, in nats.

        -mean(log((train_counts[target] + 1) / (sum(train_counts) + V)))

    The baseline that a masked language model must beat: it ignores the context. Add-one smoothing keeps the loss of a
    token that does not occur in the training split finite.

    Args:
        train_counts: (V,) int64, how often each token occurs in the training split.
        targets: (M,) int64, the held-out tokens to predict.

    Returns:
        NaN if there are no targets.
    """
    return float(-log_frequencies(train_counts)[targets].mean())


def log_frequencies(counts: Tensor) -> Tensor:
    """log((counts + 1) / (sum(counts) + V)), float64 (V,)."""
    return ((counts.double() + 1) / (counts.sum() + len(counts))).log()


def model_flops(config: BertConfig, *, tokens: float, squares: float, masked: float, sequences: float) -> float:
    """Floating-point operations of the matrix products of forward and backward; a multiply-add counts as two.

        forward = L (2 T (4 E^2 + 2 E F) + 4 E sum(len^2)) + 2 M (E^2 + E V) + 2 B (E^2 + 2 E)

    and the backward pass twice that. Counts what the model requires, not what a program executes: without padding and
    recomputed activations, with the rows of the last layer that need not be computed.

    Args:
        tokens: T, real tokens.
        squares: sum of the squared sequence lengths.
        masked: M, tokens to predict.
        sequences: B.
    """
    E, F, V = config.hidden_size, config.intermediate_size, config.vocab_size
    layers = config.num_hidden_layers * (2 * tokens * (4 * E**2 + 2 * E * F) + 4 * E * squares)
    heads = 2 * masked * (E**2 + E * V) + 2 * sequences * (E**2 + 2 * E)
    return 3.0 * (layers + heads)


def gemm_ceiling(device: torch.device, precision: str) -> Tensor:
    """FLOP/s of a large matrix product on `device` in `precision`, the best of repeated runs, float64 ()."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    n, seconds = _GEMM_SIZE[device.type], _GEMM_SECONDS[device.type]
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator, device=device).to(dtype) for _ in range(2))
    out = a @ b
    best, end = float("inf"), time.perf_counter() + seconds
    while True:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        _synchronize(device)
        now = time.perf_counter()
        best = min(best, now - start)
        if now > end:
            return torch.tensor(2.0 * n**3 / best, dtype=torch.float64, device=device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Meter:
    """Throughput of the training steps; time inside `paused` does not count.

    Args:
        config: of the model.
        budget: maximum tokens of a step's micro-batches.
        ceiling: FLOP/s of matrix products on all ranks together, or None if not measured.

    Attributes:
        seconds, tokens: totals of all laps.
    """

    def __init__(self, config: BertConfig, budget: int, ceiling: float | None) -> None:
        self._config, self._budget, self._ceiling = config, budget, ceiling
        self.seconds, self.tokens = 0.0, 0
        self._start, self._lap = time.perf_counter(), [0, 0, 0, 0]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time of the block."""
        start = time.perf_counter()
        yield
        self._start += time.perf_counter() - start

    def add(self, batches: StepBatches) -> None:
        """Count a step."""
        increments = (1, batches.tokens, batches.squares, batches.examples)
        self._lap = [a + b for a, b in zip(self._lap, increments, strict=True)]

    def lap(self, masked: float) -> dict[str, float]:
        """The throughput since the last lap, in which `masked` tokens were predicted.

        Returns:
            tokens_per_second (real tokens), fill (fraction of the token budget that they use), tflops (model FLOPs per
            second, in 10^12) and, if the ceiling is known, mfu (the fraction of it).
        """
        now = time.perf_counter()
        seconds = max(now - self._start, 1e-9)
        steps, tokens, squares, sequences = self._lap
        self.seconds, self.tokens = self.seconds + seconds, self.tokens + tokens
        self._start, self._lap = now, [0, 0, 0, 0]
        flops = model_flops(self._config, tokens=tokens, squares=squares, masked=masked, sequences=sequences)
        throughput = {
            "tokens_per_second": tokens / seconds,
            "fill": tokens / max(steps * self._budget, 1),
            "tflops": flops / seconds / 1e12,
        }
        return throughput if self._ceiling is None else {**throughput, "mfu": flops / seconds / self._ceiling}
