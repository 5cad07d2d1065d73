"""What the device does in an optimizer step: gradients of the micro-batches, then clipping, verdict and update.

What a step reads and leaves is in tensors that keep their places, and no value of them is read on the host: so the same
functions run as they are, or as a CUDA graph (`graph.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_fast.data import PackedBatch
from bert_fast.optim.params import clipped_step
from bert_fast.pretrain.guard import Guard
from bert_fast.pretrain.metrics import Totals
from bert_fast.pretrain.passes import autocast, forward


@dataclass(frozen=True)
class Inputs:
    """What a micro-batch is computed from, on the device.

    Attributes:
        batch: its tokens and labels.
        weights: float32 (2,), the weight of its mean masked-language-model and next-sentence loss in the step's loss.
        rng_states: int64 (1 + 3L, 2), of its dropout; None where the model has none.
    """

    batch: PackedBatch
    weights: Tensor
    rng_states: Tensor | None


class StepWork:
    """The device's part of a step.

    Args:
        model: called in training; the model itself, or what wraps it for several ranks.
        optimizer: over its parameters.
        guard: judges every step before its update.
        totals: gets the sums of every step whose update is made.
        precision: "fp32" or "bf16".
        max_grad_norm: 0 for no clipping.
        keep_gradients: they stay in their memory, set to zero, after an update.

    Attributes:
        found: sums of the micro-batches since the last update.
        judged: float64 (3,) of the last update: 1 where it was left out, the loss, the gradient's norm before clipping.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        guard: Guard,
        totals: Totals,
        *,
        precision: str,
        max_grad_norm: float,
        keep_gradients: bool = False,
    ) -> None:
        self.model, self.optimizer, self.guard, self.totals = model, optimizer, guard, totals
        self.device = totals.sums.device
        self._precision, self._max_grad_norm, self._keep_gradients = precision, max_grad_norm, keep_gradients
        self.found = Totals(self.device)
        self.judged = torch.zeros(3, dtype=torch.float64, device=self.device)

    def accumulate(self, inputs: Inputs) -> None:
        """Add the gradient of a micro-batch, and its sums to `found`."""
        batch = inputs.batch
        with autocast(self.device, self._precision):
            out = forward(self.model, batch, inputs.rng_states)
        mlm_weight, nsp_weight = inputs.weights.unbind()
        (mlm_weight * out.mlm_loss + nsp_weight * out.next_sentence_loss).backward()
        labels = batch.next_sentence_label
        self.found.add(out.mlm_loss, out.mlm_correct, out.mlm_count, out.seq_relationship_logits, labels)

    def update(self) -> None:
        """Clip, judge, update the weights or leave that out, and begin anew with gradients and `found`."""
        loss = self.found.loss()
        refused: list[Tensor] = []

        def judge(norm: Tensor) -> Tensor:
            refused.append(self.guard.judge(loss, norm))
            return refused[0]

        norm = clipped_step(self.optimizer, self._max_grad_norm, judge)
        self.totals.sums += torch.where(refused[0] > 0, 0.0, self.found.sums)
        self.judged.copy_(torch.stack([refused[0].double(), loss.double(), norm.double()]))
        self.found.reset()
        self.optimizer.zero_grad(set_to_none=not self._keep_gradients)
