"""The optimizer over a model's parameter groups: construction, learning-rate schedule, and the clipped step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast.optim.config import OptimizerOptions
from bert_fast.optim.groups import param_groups
from bert_fast.optim.lamb import Lamb


def make_optimizer(model: nn.Module, options: OptimizerOptions, *, capturable: bool = False) -> torch.optim.Optimizer:
    """The optimizer that `options` names, over `param_groups(model)`.

    Args:
        model: its parameters are on one device.
        options: see `OptimizerOptions`.
        capturable: make `step` safe to capture in a CUDA graph; the learning rate and the step counts are then tensors
            on the device.
    """
    groups = param_groups(model, options.weight_decay)
    device = next(model.parameters()).device
    lr = torch.tensor(options.lr, dtype=torch.float32, device=device) if capturable else options.lr
    shared: dict[str, Any] = {"lr": lr, "betas": options.betas, "eps": options.eps, "capturable": capturable}
    if options.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **shared)
    return Lamb(groups, max_grad_norm=options.max_grad_norm or None, **shared)


def lr_factor(step: int, warmup: int, total: int, decay: str = "linear") -> float:
    """The factor on the peak learning rate for the optimizer step `step`, counted from 1.

        step / warmup                              while step <= warmup
        (total + 1 - step) / (total + 1 - warmup)  after it; with decay "cosine" (1 - cos(pi * that)) / 2

    No step has a learning rate of 0: step `warmup` has the peak, and the rate would be 0 at step `total + 1`.
    Without a warm-up, step 1 has total / (total + 1).

    Args:
        step: 1 to total.
        warmup: steps of the warm-up, fewer than `total`.
        total: steps of the run.
        decay: "linear", "cosine", or "none" (or "constant") to stay at the peak.

    Raises:
        ValueError: `decay` is another name.
    """
    if decay not in ("linear", "cosine", "none", "constant"):
        raise ValueError(f"decay is {decay!r}; expected linear, cosine, none or constant")
    if step <= warmup:
        return step / warmup
    if decay in ("none", "constant"):
        return 1.0
    remaining = max(0, total + 1 - step) / (total + 1 - warmup)
    return remaining if decay == "linear" else (1 - math.cos(math.pi * remaining)) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group, rounded to float32 whether it is stored as a float or as a tensor.

    Raises:
        ValueError: `lr` is negative, infinite or NaN.
    """
    if not 0 <= lr < float("inf"):
        raise ValueError(f"lr is {lr}; expected a finite number, 0 or more")
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = float(np.float32(lr))


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor, without importing torch.distributed.tensor, which takes as long as importing torch."""
    return hasattr(x, "full_tensor")


def clipped_step(
    optimizer: torch.optim.Optimizer, max_grad_norm: float, skip_if: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Clip the global gradient norm to `max_grad_norm` and step.

    LAMB folds the clipping into its own step; for other optimizers the gradients are scaled in place.

    Args:
        optimizer: AdamW, `Lamb`, or another that reads `found_inf`.
        max_grad_norm: 0 for no clipping.
        skip_if: maps the norm to a float32 () tensor: 1 to skip this update, 0 to make it. AdamW and a capturable LAMB
            read it on the device; a LAMB that is not capturable synchronizes the host with the device.

    Returns:
        The norm before clipping, ().
    """
    if isinstance(optimizer, Lamb) and optimizer.max_grad_norm is not None:
        optimizer.skip_if = skip_if
        optimizer.step()
        assert optimizer.last_grad_norm is not None, "no parameter had a gradient"
        return optimizer.last_grad_norm
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    if is_sharded(norm):
        norm = norm.full_tensor()  # type: ignore[attr-defined]
    optimizer.found_inf = None if skip_if is None else skip_if(norm)  # type: ignore[attr-defined] # torch's name for it
    optimizer.step()
    return norm
