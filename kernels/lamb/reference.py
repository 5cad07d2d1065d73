"""LAMB in eager PyTorch, many tensors a call: the definition. Nothing here waits for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_scale_reference(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    norms = torch._foreach_norm([grad if grad.dtype == torch.float64 else grad.float() for grad in grads])
    norm = torch.linalg.vector_norm(torch.stack([norm.to(grads[0].device) for norm in norms]))
    return norm, max_norm / norm.clamp(min=max_norm)


def lamb_step_reference(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
) -> None:
    grads = [grad.to(moment.dtype) * grad_scale for grad, moment in zip(grads, exp_avgs, strict=True)]
    weights = [param.to(moment.dtype) for param, moment in zip(params, exp_avgs, strict=True)]
    # 1 - 0.999 has three digits left in float32: the corrections are computed in float64.
    steps = step.double() if isinstance(step, Tensor) else float(step)
    correction, correction_sq = (1 - beta**steps for beta in betas)

    torch._foreach_lerp_(exp_avgs, grads, 1 - betas[0])
    torch._foreach_mul_(exp_avg_sqs, betas[1])
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - betas[1])

    denominators = torch._foreach_div(exp_avg_sqs, correction_sq)
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(exp_avgs, correction)
    torch._foreach_div_(updates, denominators)
    if weight_decay:
        torch._foreach_add_(updates, weights, alpha=weight_decay)

    for param, update, size, length in zip(
        params, updates, torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True
    ):
        ratio = torch.where((size > 0) & (length > 0), size / length, 1.0)
        param.sub_(update * (ratio * lr))
