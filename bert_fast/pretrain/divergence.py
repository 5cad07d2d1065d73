"""Divergence: a guard that skips the update of a bad step, records of such steps, and their replay.

<output_dir>/diverged/step-00000012/
    config.json, model.safetensors   the weights, in transformers' format
    batch.safetensors                the step's micro-batches, of all ranks
    record.json                      loss, gradient norm, seed, precision
    manifest.json                    size and SHA-256 of every other file
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bert_fast import _io
from bert_fast._device import autocast, resolve_device
from bert_fast.data import PackedBatch
from bert_fast.models import BertForPreTraining
from bert_fast.models.storage import read_safetensors
from bert_fast.optim.groups import param_groups
from bert_fast.pretrain.metrics import Totals
from bert_fast.pretrain.micro_batches import MicroBatch, Position, dropout_states, forward
from bert_fast.runtime import checkpoint

BATCH, RECORD = "batch.safetensors", "record.json"
_TENSORS = ("input_ids", "token_type_ids", "position_ids", "cu_seqlens", "labels", "next_sentence_label", "label_rows")
_FIELDS = {"step": int, "reason": str, "loss": str, "norm": str, "seed": int, "precision": str, "micro_batches": list}
_MEAN_DECAY = 0.98  # of the running mean of the loss: about the last fifty steps


@dataclass(frozen=True)
class Verdict:
    """The guard's result for one step.

    Attributes:
        step, start: number of the step, and position of its first batch.
        refused: whether its update was skipped.
        loss, norm: of the step on all ranks; the gradient norm before clipping.
    """

    step: int
    start: Position
    refused: bool
    loss: float
    norm: float

    @property
    def reason(self) -> str:
        """Why the update was skipped."""
        loss = torch.tensor(self.loss)
        if not loss.isfinite():
            return f"the loss is {self.loss}"
        if not torch.tensor(self.norm).isfinite():
            return f"the gradient norm is {self.norm}"
        return f"the loss has exploded to {self.loss:.4f}"


class Guard:
    """Checks loss and gradient norm of every step on the device, and passes the verdicts to the host asynchronously.

    Every rank checks the same numbers and reaches the same verdict. On the CPU a verdict is available at once; on a GPU
    after the next step has been queued, so that neither host nor device waits. With "stop", every update after a
    refused one is skipped too, so the weights are still those of the refused step. With "skip" on a GPU they are one
    update newer. The guard's tensors stay in their memory, as a CUDA graph requires.

    Args:
        policy: "stop" or "skip".
        explosion: a loss above this many times its running mean is refused; 0 for no limit.
        device: of losses and norms.
    """

    def __init__(self, policy: str, explosion: float, device: torch.device) -> None:
        self._stop, self._explosion, self._device = policy == "stop", explosion, device
        self._mean = torch.zeros((), device=device)
        self._tripped = torch.zeros((), dtype=torch.bool, device=device)
        self._queue: deque[tuple[int, Position, Tensor, Any]] = deque()
        self.skipped = 0
        self.in_a_row = 0

    def check(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Whether the update must be skipped, () float32: 1 or 0.

        Args:
            loss: (), of the step on all ranks.
            norm: (), of the gradient on all ranks, before clipping.
        """
        loss = loss.float()
        refused = ~(loss.isfinite() & norm.isfinite())
        if self._explosion:
            refused |= (self._mean > 0) & (loss > self._explosion * self._mean)
        refused |= self._tripped
        if self._stop:
            self._tripped.copy_(refused)
        mean = torch.where(self._mean > 0, _MEAN_DECAY * self._mean + (1 - _MEAN_DECAY) * loss, loss)
        self._mean.copy_(torch.where(refused, self._mean, mean))
        return refused.float()

    def enqueue(self, step: int, start: Position, verdict: Tensor) -> None:
        """Copy the verdict of a step to the host: float64 (3,), the result of `check`, the loss and the norm."""
        event = None
        if self._device.type == "cuda":
            values = verdict.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            values = verdict.clone()
        self._queue.append((step, start, values, event))

    def drain(self, *, all_steps: bool = False) -> list[Verdict]:
        """The verdicts not returned before, in order; on a GPU without that of the last step unless `all_steps`."""
        verdicts = []
        remaining = 1 if self._device.type == "cuda" and not all_steps else 0
        while len(self._queue) > remaining:
            step, start, values, event = self._queue.popleft()
            if event is not None:
                event.synchronize()
            refused, loss, norm = values.tolist()
            verdicts.append(Verdict(step, start, bool(refused), loss, norm))
            self.skipped += bool(refused)
            self.in_a_row = self.in_a_row + 1 if refused else 0
        return verdicts

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON."""
        return {"mean": float(self._mean), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Resume from what `state` returned."""
        self._mean.fill_(state["mean"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]


def write_record(folder: Path, verdict: Verdict, micro: Sequence[MicroBatch], seed: int, precision: str) -> None:
    """Write a step's micro-batches, verdict and settings into `folder`."""
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
    _io.write_json(folder / RECORD, record)


@dataclass(frozen=True)
class ReplayResult:
    """A step that was computed again.

    Args:
        step: its number.
        reason: why its update was skipped.
        loss, recorded_loss: of the step, now and then.
        norm, recorded_norm: of the gradient before clipping, now and then.
        micro_losses: masked-language-model and next-sentence loss of each micro-batch.
    """

    step: int
    reason: str
    loss: float
    norm: float
    recorded_loss: float
    recorded_norm: float
    micro_losses: list[tuple[float, float]]

    @property
    def is_exact(self) -> bool:
        """Whether loss and norm are the recorded bits. Products that torch computes may round differently on another
        device, number of threads or ranks, or CUDA stream (CUBLAS_WORKSPACE_CONFIG=:4096:8 fixes cuBLAS's choice)."""
        pairs = ((self.loss, self.recorded_loss), (self.norm, self.recorded_norm))
        return all(now == then or (math.isnan(now) and math.isnan(then)) for now, then in pairs)


def replay(folder: str | Path, device: str = "auto", weights: str | Path | None = None) -> ReplayResult:
    """Compute loss and gradient norm of a step in <output_dir>/diverged again, on one device.

    Args:
        folder: the step's folder.
        device: "auto", "cpu", "cuda" ...
        weights: a checkpoint to use instead of the recorded weights.

    Raises:
        CorruptCheckpointError: a file of the folder is missing or differs from what was written.
        ValueError: the folder holds another kind of record; the message names the file.
    """
    folder = Path(folder)
    checkpoint.verify_folder(folder)
    record = _io.read_json(folder / RECORD, _FIELDS)
    tensors = read_safetensors(folder / BATCH)
    target = resolve_device(device)
    model = BertForPreTraining.from_pretrained(weights or folder).to(target).train()
    micro = []
    for entry in record["micro_batches"]:
        _io.check_fields(entry, {"number": int, "max_seqlen": int}, f"{folder / RECORD}: a micro-batch")
        fields = {name: tensors[key] for name in _TENSORS if (key := f"{entry['number']}/{name}") in tensors}
        micro.append((entry["number"], PackedBatch(**fields, max_seqlen=entry["max_seqlen"]).to(target)))
    masked = max(1, sum(int((batch.labels != -100).sum()) for _, batch in micro))
    pairs = max(1, sum(int((batch.next_sentence_label != -100).sum()) for _, batch in micro))
    totals, micro_losses = Totals(target), []
    for number, batch in micro:
        states = dropout_states(model.config, target, record["seed"], record["step"], number)
        with autocast(target, record["precision"]):
            out = forward(model, batch, states)
        mlm_share, nsp_share = out.mlm_count / masked, (batch.next_sentence_label != -100).sum() / pairs
        (mlm_share * out.mlm_loss + nsp_share * out.next_sentence_loss).backward()
        totals.add(out.mlm_loss, out.mlm_correct, out.mlm_count, out.seq_relationship_logits, batch.next_sentence_label)
        micro_losses.append((float(out.mlm_loss.detach()), float(out.next_sentence_loss.detach())))
    # In the optimizer's order: the last bit of the norm depends on it.
    parameters = [p for group in param_groups(model, 0.0) for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, float("inf"))
    return ReplayResult(
        step=record["step"],
        reason=record["reason"],
        loss=float(totals.loss()),
        norm=float(norm),
        recorded_loss=float(record["loss"]),
        recorded_norm=float(record["norm"]),
        micro_losses=micro_losses,
    )
