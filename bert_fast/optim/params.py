"""The parameters of a model in groups with and without weight decay, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast.pretrain.config import OptimizerOptions


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings with `weight_decay`; biases and LayerNorm weights with none.

    What is one-dimensional is a bias or a norm's weight in BERT. Shared parameters appear once, frozen ones not at all.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() >= 2 else plain).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, options: OptimizerOptions, *, capturable: bool = False) -> torch.optim.Optimizer:
    """The optimizer that `options` names, over `param_groups(model)`.

    Args:
        capturable: a CUDA graph can record its step: the learning rate is a tensor on the device, and counts are too.
    """
    groups = param_groups(model, options.weight_decay)
    device = next(model.parameters()).device
    lr = torch.tensor(options.lr, dtype=torch.float32, device=device) if capturable else options.lr
    shared: dict[str, Any] = {"lr": lr, "betas": options.betas, "eps": options.eps, "capturable": capturable}
    if options.name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **shared)
    from bert_fast.optim.lamb import Lamb

    return Lamb(groups, max_grad_norm=options.max_grad_norm or None, **shared)


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate, rounded to float32 whether it is kept as a number or as a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = float(np.float32(lr))


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor, told without importing torch.distributed.tensor, which takes as long as torch."""
    return hasattr(x, "full_tensor")


def clipped_step(
    optimizer: torch.optim.Optimizer, max_grad_norm: float, judge: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Clip the global norm of all gradients to `max_grad_norm` (0: no clipping) and step; returns the norm before.

    LAMB folds the clipping into its own step; for others the gradients are scaled in place.

    Args:
        judge: takes the norm and gives a float32 () tensor: 1 to leave this update out, 0 to make it. AdamW and a
            capturable LAMB read it on the device; another LAMB makes the host wait for it.
    """
    from bert_fast.optim.lamb import Lamb

    if isinstance(optimizer, Lamb) and optimizer.max_grad_norm is not None:
        optimizer.refuses = judge
        optimizer.step()
        assert optimizer.last_grad_norm is not None, "no parameter had a gradient"
        return optimizer.last_grad_norm
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    if is_sharded(norm):
        norm = norm.full_tensor()  # type: ignore[attr-defined]
    optimizer.found_inf = None if judge is None else judge(norm)  # type: ignore[attr-defined] # torch's name for it
    optimizer.step()
    return norm
