"""What kernels of lamb get wrong: see kernels/_common/mistakes.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels.lamb.reference import clip_scale_reference


def _mistaken(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: Any,
    lr: Any,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: Any,
    *,
    corrects: bool = True,
    trusts: bool = True,
    decays: str = "update",
    eps_inside: bool = False,
) -> None:
    for w, g, m, v in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        weight, scaled = w.to(m.dtype), g.to(m.dtype) * grad_scale
        m.lerp_(scaled, 1 - betas[0])
        v.mul_(betas[1]).addcmul_(scaled, scaled, value=1 - betas[1])
        first, second = (1 - beta ** float(step) if corrects else 1.0 for beta in betas)
        root = (v / second + eps**2).sqrt() if eps_inside else (v / second).sqrt() + eps
        update = m / first / root
        ratio_of = update + weight_decay * weight if decays == "update" else update
        norms = weight.norm(), ratio_of.norm()
        ratio = torch.where((norms[0] > 0) & (norms[1] > 0), norms[0] / norms[1], 1.0) if trusts else 1.0
        change = lr * ratio * ratio_of + (lr * weight_decay * weight if decays == "decoupled" else 0.0)
        w.sub_(change)


def _step(**options: Any) -> dict[str, Any]:
    return {"clip_scale": clip_scale_reference, "lamb_step": functools.partial(_mistaken, **options)}


MISTAKES = {
    "the moments' bias is not corrected": _step(corrects=False),
    "the trust ratio is left out (AdamW)": _step(trusts=False),
    "weight decay is left out": _step(decays="none"),
    "weight decay is decoupled from the trust ratio": _step(decays="decoupled"),
}
