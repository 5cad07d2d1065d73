"""The parameters of a model in groups with and without weight decay, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.training.config import OptimizerOptions


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


def make_optimizer(model: nn.Module, options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer that `options` names, over `param_groups(model)`."""
    groups = param_groups(model, options.weight_decay)
    if options.name == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)
    from bert_fast.training.optim import Lamb

    clip = options.max_grad_norm or None
    return Lamb(groups, lr=options.lr, betas=options.betas, eps=options.eps, max_grad_norm=clip)


def is_sharded(x: Tensor) -> bool:
    """Whether `x` is a DTensor, told without importing torch.distributed.tensor, which takes as long as torch."""
    return hasattr(x, "full_tensor")


def clipped_step(
    optimizer: torch.optim.Optimizer, max_grad_norm: float, judge: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """Clip the global norm of all gradients to `max_grad_norm` (0: no clipping) and step; returns the norm before.

    LAMB folds the clipping into its own step; for others the gradients are scaled in place.

    Args:
        judge: takes the norm and gives a float32 () tensor: 1 to leave this update out, 0 to make it. AdamW reads it
            on the device; LAMB makes the host wait for it.
    """
    from bert_fast.training.optim import Lamb

    if isinstance(optimizer, Lamb) and optimizer.max_grad_norm is not None:
        optimizer.refuses = None if judge is None else lambda norm: bool(judge(norm))
        optimizer.step()
        assert optimizer.last_grad_norm is not None, "no parameter had a gradient"
        return optimizer.last_grad_norm
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm: Tensor = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))
    if is_sharded(norm):
        norm = norm.full_tensor()  # type: ignore[attr-defined]
    refused = None if judge is None else judge(norm)
    if isinstance(optimizer, Lamb):
        if refused is None or not bool(refused):
            optimizer.step()
    else:
        optimizer.found_inf = refused  # type: ignore[attr-defined] # torch's name for it, from loss scaling
        optimizer.step()
    return norm
