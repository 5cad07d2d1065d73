"""The device's part of an optimizer step: gradients of the micro-batches, then clipping, check and update.

Everything a step reads and writes is in tensors that stay in their memory, and the host reads none of their values.
The same functions therefore run eagerly or as a CUDA graph (`cuda_graph.py`).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_fast._device import autocast
from bert_fast.data import PackedBatch
from bert_fast.optim.optimizer import clipped_step
from bert_fast.pretrain.divergence import Guard
from bert_fast.pretrain.metrics import Totals
from bert_fast.pretrain.micro_batches import forward


@dataclass(frozen=True)
class Inputs:
    """The inputs of a micro-batch, on the device.

    Attributes:
        batch: tokens and labels.
        weights: float32 (2,), the weights of the mean masked-language-model and next-sentence loss in the step's loss.
        rng_states: int64 (1 + 3L, 2), of the dropout; None if the model has none.
    """

    batch: PackedBatch
    weights: Tensor
    rng_states: Tensor | None


class TrainStep:
    """The device's part of an optimizer step.

    Args:
        model: the module to call in training: the model itself, or its wrapper for several ranks.
        optimizer: over the model's parameters.
        guard: checks every step before its update.
        totals: accumulates the sums of every step that is not skipped.
        precision: "fp32" or "bf16".
        max_grad_norm: 0 for no clipping.
        keep_gradients: after an update, zero the gradients in their memory instead of releasing them.

    Attributes:
        step_totals: sums of the micro-batches since the last update.
        verdict: float64 (3,), of the last update: 1 if it was skipped, the loss, the gradient norm before clipping.
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
        self.step_totals = Totals(self.device)
        self.verdict = torch.zeros(3, dtype=torch.float64, device=self.device)

    def one_cast(self, micro_batches: int) -> AbstractContextManager[Any]:
        """A block in which `accumulate` casts the weights to bfloat16 once, not once a micro-batch.

        The casts are torch.autocast's, made by the first micro-batch and dropped at the block's end: so every write to
        a weight is seen by the next step, also one that torch does not count, and nothing may write within the block.
        For a single micro-batch the block does nothing, because it keeps the casts in memory until it ends.
        """
        return autocast(self.device, self._precision) if micro_batches > 1 else nullcontext()

    def accumulate(self, inputs: Inputs) -> None:
        """Add the gradient of a micro-batch, and its sums to `step_totals`."""
        batch = inputs.batch
        with autocast(self.device, self._precision):
            out = forward(self.model, batch, inputs.rng_states)
        mlm_weight, nsp_weight = inputs.weights.unbind()
        loss = mlm_weight * out.mlm_loss + nsp_weight * out.next_sentence_loss
        with torch.autocast(self.device.type, enabled=False):  # a backward pass casts nothing, also within `one_cast`
            loss.backward()
        labels = batch.next_sentence_label
        self.step_totals.add(out.mlm_loss, out.mlm_correct, out.mlm_count, out.seq_relationship_logits, labels)

    def update(self) -> None:
        """Clip, check, update the weights or skip the update, and reset the gradients and `step_totals`."""
        loss = self.step_totals.loss()
        results: list[Tensor] = []

        def skip_if(norm: Tensor) -> Tensor:
            results.append(self.guard.check(loss, norm))
            return results[0]

        norm = clipped_step(self.optimizer, self._max_grad_norm, skip_if)
        refused = results[0]
        self.totals.sums += torch.where(refused > 0, 0.0, self.step_totals.sums)
        self.verdict.copy_(torch.stack([refused.double(), loss.double(), norm.double()]))
        self.step_totals.reset()
        self.optimizer.zero_grad(set_to_none=not self._keep_gradients)
