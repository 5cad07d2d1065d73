"""Steps that went wrong, kept with their weights, and computed again.

<output_dir>/diverged/step-00000012/
    config.json, model.safetensors   the weights with which it happened, in transformers' format
    batch.safetensors                the step's micro-batches, of all ranks
    record.json                      loss, gradient norm, and what they depend on
    manifest.json                    size and SHA-256 of every other file
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bert_fast.data import PackedBatch
from bert_fast.models import BertForPreTraining
from bert_fast.optim.params import param_groups
from bert_fast.pretrain.guard import Verdict
from bert_fast.pretrain.metrics import Totals
from bert_fast.pretrain.micro_batches import MicroBatch
from bert_fast.pretrain.passes import autocast, dropout_states, forward
from bert_fast.pretrain.setup import resolve_device
from bert_fast.runtime import checkpoint

BATCH, RECORD = "batch.safetensors", "record.json"
_TENSORS = ("input_ids", "token_type_ids", "position_ids", "cu_seqlens", "labels", "next_sentence_label", "label_rows")


@dataclass(frozen=True)
class Replayed:
    """A step that was computed again.

    Args:
        step: which one; `reason` says why it was refused.
        loss: of the step, now; `recorded_loss` what it was.
        norm: of the gradient, now; `recorded_norm` what it was.
        micro_losses: masked-language-model and next-sentence loss of each micro-batch.
    """

    step: int
    reason: str
    loss: float
    norm: float
    recorded_loss: float
    recorded_norm: float
    micro_losses: list[tuple[float, float]]


def write_batch(folder: Path, verdict: Verdict, micro: Sequence[MicroBatch], seed: int, precision: str) -> None:
    """Write the micro-batches of a step and what is known of it into `folder`."""
    tensors = {
        f"{m.number}/{name}": value.contiguous()
        for m in micro
        for name in _TENSORS
        if (value := getattr(m.batch, name)) is not None
    }
    save_file(tensors, str(folder / BATCH))
    record = {
        **asdict(verdict),
        "reason": verdict.reason,
        "loss": repr(verdict.loss),  # JSON has no NaN and no infinity
        "norm": repr(verdict.norm),
        "seed": seed,
        "precision": precision,
        "micro_batches": [
            {"number": m.number, "max_seqlen": m.batch.max_seqlen, "examples": [list(pair) for pair in m.examples]}
            for m in micro
        ],
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def replay(folder: str | Path, device: str = "auto", weights: str | Path | None = None) -> Replayed:
    """Compute a step of <output_dir>/diverged again: its loss and its gradient's norm, on one device.

    Args:
        folder: one of the folders there.
        device: "auto", "cpu", "cuda" ...
        weights: a checkpoint in place of the weights that were kept with it.

    Raises:
        CorruptCheckpointError: a file of the folder is missing or is not what was written.
    """
    folder = Path(folder)
    checkpoint.verify_folder(folder)
    record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    tensors = load_file(folder / BATCH)
    where = resolve_device(device)
    model = BertForPreTraining.from_pretrained(weights or folder).to(where).train()
    micro = []
    for entry in record["micro_batches"]:
        found = {name: tensors[key] for name in _TENSORS if (key := f"{entry['number']}/{name}") in tensors}
        micro.append((entry["number"], PackedBatch(**found, max_seqlen=entry["max_seqlen"]).to(where)))
    masked = max(1, sum(int((batch.labels != -100).sum()) for _, batch in micro))
    pairs = max(1, sum(int((batch.next_sentence_label != -100).sum()) for _, batch in micro))
    totals, losses = Totals(where), []
    for number, batch in micro:
        states = dropout_states(model.config, where, record["seed"], record["step"], number)
        with autocast(where, record["precision"]):
            out = forward(model, batch, states)
        shares = (out.mlm_count / masked, (batch.next_sentence_label != -100).sum() / pairs)
        (shares[0] * out.mlm_loss + shares[1] * out.next_sentence_loss).backward()
        totals.add(out.mlm_loss, out.mlm_correct, out.mlm_count, out.seq_relationship_logits, batch.next_sentence_label)
        losses.append((float(out.mlm_loss.detach()), float(out.next_sentence_loss.detach())))
    # In the optimizer's order, on which the last bit depends.
    parameters = [p for group in param_groups(model, 0.0) for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
    now, then = (float(totals.loss()), float(norm)), (float(record["loss"]), float(record["norm"]))
    return Replayed(record["step"], record["reason"], *now, *then, losses)
