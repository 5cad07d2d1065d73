"""The learning rate of a step: linear warm-up, then linear or cosine decay, or none."""

from __future__ import annotations

import math


def lr_factor(step: int, warmup: int, total: int, decay: str = "linear") -> float:
    """The factor on the peak learning rate for the optimizer step `step`, counted from 1.

        step / warmup                              while step <= warmup
        (total + 1 - step) / (total + 1 - warmup)  after it; with decay "cosine" (1 - cos(pi * that)) / 2

    So no step is wasted on a rate of 0: step `warmup` has the peak, and the rate would be 0 at step `total + 1`.
    Without a warm-up, step 1 has total / (total + 1).

    Args:
        step: 1 to total.
        warmup: steps of the warm-up, fewer than `total`.
        total: steps of the run.
        decay: "linear", "cosine", or "none" (or "constant") to stay at the peak.
    """
    if step <= warmup:
        return step / warmup
    if decay in ("none", "constant"):
        return 1.0
    left = max(0, total + 1 - step) / (total + 1 - warmup)
    return left if decay == "linear" else (1 - math.cos(math.pi * left)) / 2
