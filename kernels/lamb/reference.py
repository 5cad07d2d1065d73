"""LAMB in eager PyTorch, many tensors in a call: the definition. It never synchronizes with the device."""

from __future__ import annotations

import torch
from torch import Tensor


def clip_scale_reference(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """norm = the 2-norm of all gradients taken as one vector, scale = min(1, max_norm / norm).

    Args:
        grads: floating-point tensors of any shapes and devices; squares are summed in float32, in float64 for float64.
        max_norm: the largest norm allowed.

    Returns:
        norm and scale, (), on the device of the first gradient. A NaN in the gradients gives NaN.
    """
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
    """One LAMB step of every tensor, in place, in the dtype of the moments. With g = grad_scale grad at step t:

        m = beta1 m + (1 - beta1) g                  v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        w = w - lr r u,   r = |w| / |u|, or 1 where either norm is 0

    Args:
        params: the weights w, floating point.
        grads: of the weights' shapes, left as they are.
        exp_avgs, exp_avg_sqs: the moments m and v, of the weights' shapes.
        step: t, 1 for the first; an int, or a () tensor on the device.
        lr: learning rate; a float, or a () tensor on the device.
        betas, eps, weight_decay: see above.
        grad_scale: factor of the gradients; a float, or a () tensor on the device.
    """
    grads = [grad.to(moment.dtype) * grad_scale for grad, moment in zip(grads, exp_avgs, strict=True)]
    weights = [param.to(moment.dtype) for param, moment in zip(params, exp_avgs, strict=True)]
    # In float32 1 - 0.999 keeps three significant digits, so the bias corrections are computed in float64.
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

    for param, update, weight_norm, update_norm in zip(
        params, updates, torch._foreach_norm(weights), torch._foreach_norm(updates), strict=True
    ):
        ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        param.sub_(update * (ratio * lr))
