"""Losses and gradients that are not finite, or explode: noticed before the update, which is then not made."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bert_fast.pretrain.micro_batches import Position

_MEMORY = 0.98  # of the running mean of the loss: about the last fifty steps


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is not finite, or explodes; the last checkpoint is from before."""


@dataclass(frozen=True)
class Verdict:
    """What was found of one step.

    Attributes:
        step, start: which one, and its first batch of the epoch's plan.
        refused: whether its update was left out.
        loss, norm: of the whole step; the gradient's norm is that before clipping.
    """

    step: int
    start: Position
    refused: bool
    loss: float
    norm: float

    @property
    def reason(self) -> str:
        """What is wrong with it."""
        loss = torch.tensor(self.loss)
        if not loss.isfinite():
            return f"the loss is {self.loss}"
        if not torch.tensor(self.norm).isfinite():
            return f"the gradient norm is {self.norm}"
        return f"the loss has exploded to {self.loss:.4f}"


class Guard:
    """Judges every step on the device, and tells the host when it knows.

    Every rank judges the same numbers, so all decide alike. On the CPU a verdict is known at once. On a GPU the host
    hears of a step after it has queued the next one, so that neither waits. With "stop", no update is made after a
    refused one: the weights are still those with which it happened. With "skip" on a GPU they are one update newer.
    What the guard remembers stays in its place, as a CUDA graph needs it.

    Args:
        policy: "stop" or "skip".
        explosion: a loss above this many times its running mean is refused; 0 for no such limit.
        device: where losses and norms are.
    """

    def __init__(self, policy: str, explosion: float, device: torch.device) -> None:
        self._sticky, self._explosion, self._device = policy == "stop", explosion, device
        self._mean = torch.zeros((), device=device)
        self._stuck = torch.zeros((), dtype=torch.bool, device=device)
        self._waiting: deque[tuple[int, Position, Tensor, Any]] = deque()
        self.skipped = 0
        self.in_a_row = 0

    def judge(self, loss: Tensor, norm: Tensor) -> Tensor:
        """() float32: 1 where the update must be left out, 0 where not.

        Args:
            loss: () of the whole step, the same on every rank.
            norm: () of the whole gradient before clipping.
        """
        loss = loss.float()
        refused = ~(loss.isfinite() & norm.isfinite())
        if self._explosion:
            refused |= (self._mean > 0) & (loss > self._explosion * self._mean)
        refused |= self._stuck
        if self._sticky:
            self._stuck.copy_(refused)
        mean = torch.where(self._mean > 0, _MEMORY * self._mean + (1 - _MEMORY) * loss, loss)
        self._mean.copy_(torch.where(refused, self._mean, mean))
        return refused.float()

    def note(self, step: int, start: Position, judged: Tensor) -> None:
        """Send the verdict of a step to the host: `judged` float64 (3,), what `judge` gave, the loss and the norm."""
        event = None
        if self._device.type == "cuda":
            values = judged.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            values = judged.clone()
        self._waiting.append((step, start, values, event))

    def settled(self, *, all_steps: bool = False) -> list[Verdict]:
        """The verdicts that were not given before, in order; on a GPU that of the last step only with `all_steps`."""
        found = []
        left = 1 if self._device.type == "cuda" and not all_steps else 0
        while len(self._waiting) > left:
            step, start, values, event = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            refused, loss, norm = values.tolist()
            found.append(Verdict(step, start, bool(refused), loss, norm))
            self.skipped += bool(refused)
            self.in_a_row = self.in_a_row + 1 if refused else 0
        return found

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        return {"mean": float(self._mean), "skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self._mean.fill_(state["mean"])
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
