"""One pass of a model over a packed batch, and what it says about the held-out split."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bert_fast.data import PackedBatch
from bert_fast.models import BertConfig
from bert_fast.models.encoder import draw_rng_states
from bert_fast.pretrain.metrics import Totals
from bert_fast.pretrain.micro_batches import seed_dropout


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast on `device`, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def dropout_states(config: BertConfig, device: torch.device, seed: int, step: int, micro_batch: int) -> Tensor | None:
    """The dropout's states for a micro-batch, a function of (seed, step, micro-batch): int64 (1 + 3L, 2), or None."""
    seed_dropout(seed, step, micro_batch)
    return draw_rng_states(config, device)


def forward(model: torch.nn.Module, batch: PackedBatch, rng_states: Tensor | None = None) -> Any:
    """The model's output for a PackedBatch; in training its dropout has `rng_states`, or draws its own."""
    return model(
        input_ids=batch.input_ids,
        token_type_ids=batch.token_type_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        labels=batch.labels,
        next_sentence_label=batch.next_sentence_label,
        label_rows=batch.label_rows,
        rng_states=rng_states,
        output_logits=False,
    )


@torch.no_grad()
def held_out_totals(
    model: torch.nn.Module, batches: Iterable[PackedBatch], device: torch.device, precision: str
) -> Totals:
    """Sums of losses and hits over `batches`, in eval mode."""
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


def evaluate(
    model: torch.nn.Module, batches: Iterable[PackedBatch], device: torch.device, precision: str
) -> dict[str, float]:
    """Losses and accuracies over `batches`, weighed by masked tokens and by sentence pairs."""
    return held_out_totals(model, batches, device, precision).summary()
