"""The door of lamb: checks, then the chosen implementation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.checks import check_floating, check_same_device
from bert_fast.kernels._common.library import TRITON_DTYPES
from bert_fast.kernels.lamb.op import OP


class ClipScale(NamedTuple):
    """The global norm of the gradients, and the factor that brings it down to the largest allowed."""

    norm: Tensor  # () float32
    scale: Tensor  # () float32, min(1, max_norm / norm)


@torch.no_grad()
def clip_scale(grads: Sequence[Tensor], max_norm: float, *, impl: str = "auto") -> ClipScale:
    """Norm of all gradients taken as one vector, and the factor min(1, max_norm / norm); neither waits for the device.

    Pass `scale` to `lamb_step` as `grad_scale` instead of writing clipped gradients back to memory.

    Args:
        grads: at least one floating-point tensor, any shapes, dtypes and devices.
        max_norm: the largest norm allowed, above 0.
        impl: "auto", "reference", "triton", "cuda" or "cpu"; gradients on several devices go to the reference.

    Returns:
        norm and scale, () float32 (float64 for float64 gradients) on the device of the first gradient. A norm that is
        NaN makes the scale NaN.

    Raises:
        TypeError: a gradient is not a floating-point tensor.
        ValueError: there is no gradient, or `max_norm` is not above 0.
        ImplUnavailableError: the `impl` asked for can't run here.
    """
    if not grads:
        raise ValueError("grads is empty; expected at least one tensor")
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; expected a number above 0")
    for index, grad in enumerate(grads):
        check_floating(f"grads[{index}]", grad)
    if impl == "auto" and any(grad.device != grads[0].device for grad in grads):
        impl = "reference"
    for index, grad in enumerate(grads) if impl == "triton" else ():
        check_same_device(grads[0], **{f"grads[{index}]": grad})
    return ClipScale(*OP.select(impl, grads[0], _rarest_dtype(grads))().clip_scale(list(grads), max_norm))


@torch.no_grad()
def lamb_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    grad_scale: float | Tensor = 1.0,
    impl: str = "auto",
) -> None:
    """One LAMB step; updates `params`, `exp_avgs` and `exp_avg_sqs` in place.

    For each tensor w with g = grad_scale * grad, at step t (1 for the first):

        m = beta1 m + (1 - beta1) g                  v = beta2 v + (1 - beta2) g^2
        u = (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w
        w = w - lr r u,   r = |w| / |u|, or 1 where either norm is 0

    Args:
        params: floating-point tensors on one device.
        grads: one a parameter, its shape; left as they are.
        exp_avgs, exp_avg_sqs: the moments m and v, one a parameter, its shape; the step computes in their dtype, the
            Triton kernels in float32 at least.
        step: how many steps have been taken with this one; an int, or a () tensor on the device.
        lr: learning rate; a float, or a () tensor on the device.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of v, above 0 or 0.
        weight_decay: strength of the decay, which the trust ratio r sees.
        grad_scale: factor of the gradients, e.g. `clip_scale(...).scale`; a float, or a () tensor on the device.
        impl: "auto", "reference", "triton", "cuda" or "cpu".

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: the lists have different lengths, shapes or devices, or a number is outside its range.
        ImplUnavailableError: the `impl` asked for can't run here.

    Source: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020,
    algorithm 2 (with bias correction; the scaling function phi is the identity).
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors; expected {len(params)}, one a parameter")
    _check_numbers(step, betas, eps, weight_decay)
    for index, param in enumerate(params):
        check_floating(f"params[{index}]", param, beside=params[0])
        for name, tensors in lists.items():
            check_floating(f"{name}[{index}]", tensors[index], param.shape, param)
    if params:
        dtype = _rarest_dtype([*params, *grads, *exp_avgs, *exp_avg_sqs])
        OP.select(impl, params[0], dtype)().lamb_step(
            list(params), list(grads), list(exp_avgs), list(exp_avg_sqs), step, lr, betas, eps, weight_decay, grad_scale
        )


def _rarest_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that decides which implementation can take tensors of several: one that only the reference takes."""
    return next((x.dtype for x in tensors if x.dtype not in TRITON_DTYPES), tensors[0].dtype)


def _check_numbers(step: int | Tensor, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"step is {step}; expected 1 for the first step, then one more each")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas}; expected two numbers in [0, 1)")
    if eps < 0 or weight_decay < 0:
        raise ValueError(f"eps is {eps} and weight_decay is {weight_decay}; expected neither below 0")
