"""Public functions of lamb: validate the arguments, dispatch to an implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.checks import (
    LARGEST,
    SMALLEST,
    check_floating,
    check_int,
    check_not_negative,
    check_number,
    check_same_device,
)
from bert_fast.kernels._common.library import NATIVE_CPU_DTYPES, TRITON_DTYPES
from bert_fast.kernels.lamb.op import OP


class ClipScale(NamedTuple):
    """The global norm of the gradients and the factor that clips it."""

    norm: Tensor  # () float32
    scale: Tensor  # () float32, min(1, max_norm / norm)


@torch.no_grad()
def clip_scale(grads: Sequence[Tensor], max_norm: float, *, impl: str = "auto") -> ClipScale:
    """Global norm of the gradients and the factor that clips it: scale = min(1, max_norm / norm).

    The norm is the 2-norm of all gradients taken as one vector. Pass `scale` to `lamb_step` as `grad_scale` instead of
    writing clipped gradients back to memory. There is no synchronization with the device.

    Args:
        grads: at least one floating-point tensor, of any shapes, dtypes and devices.
        max_norm: the largest norm allowed, above 0.
        impl: "auto", "reference", "triton" or "cpu"; "auto" takes the reference for gradients on several devices.

    Returns:
        norm and scale, () float32 (float64 for float64 gradients), on the device of the first gradient. A norm that is
        NaN makes the scale NaN.

    Raises:
        TypeError: a gradient is not a floating-point tensor.
        ValueError: there is no gradient, `max_norm` is not above 0, `impl` is none of the above, or with
            impl="triton" or "cpu" the gradients are on several devices.
        ImplUnavailableError: the requested `impl` does not exist or can't run here.

    Source: Pascanu et al., "On the difficulty of training recurrent neural networks", 2013, section 3.2.
    """
    if not grads:
        raise ValueError("grads is empty; expected at least one tensor")
    # The square of a float32 norm above 1e30 is infinite: nothing is clipped there, nor with max_norm = inf.
    max_norm = (
        1e30 if max_norm == math.inf else check_number("max_norm", max_norm, SMALLEST, LARGEST, "a number above 0")
    )
    for index, grad in enumerate(grads):
        check_floating(f"grads[{index}]", grad)
        _check_not_negative_view(f"grads[{index}]", grad)
        if grad.device.type == "meta" and grads[0].device.type != "meta":
            raise ValueError(f"grads[{index}] is on meta; expected a tensor with values, as grads[0]")
    if impl == "auto" and any(grad.device != grads[0].device for grad in grads):
        impl = "reference"
    for index, grad in enumerate(grads) if impl in ("triton", "cpu") else ():
        check_same_device(grads[0], **{f"grads[{index}]": grad})
    return ClipScale(*OP.select(impl, grads[0], _deciding_dtype(grads))().clip_scale(list(grads), max_norm))


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
        grads: one for each parameter, of its shape; left as they are.
        exp_avgs, exp_avg_sqs: the moments m and v, one for each parameter, of its shape. The reference computes in
            their dtype, the kernels in float32.
        step: t, the number of steps including this one; an int, or a () tensor on the device.
        lr: learning rate; a float, or a () tensor on the device.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of v, at least 0.
        weight_decay: weight decay, at least 0; part of u and so of the trust ratio r.
        grad_scale: factor of the gradients, e.g. `clip_scale(...).scale`; a float, or a () tensor on the device.
        impl: "auto", "reference", "triton" or "cpu".

    Raises:
        TypeError: a tensor is not floating point.
        ValueError: the lists have different lengths, shapes or devices, a number is outside its range, or `impl` is
            none of the above.
        ImplUnavailableError: the requested `impl` does not exist or can't run here.

    Source: You et al., "Large batch optimization for deep learning: training BERT in 76 minutes", ICLR 2020,
    algorithm 2 (with bias correction; the scaling function phi is the identity).
    """
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            raise ValueError(f"{name} has {len(tensors)} tensors; expected {len(params)}, one a parameter")
    for index, param in enumerate(params):
        check_floating(f"params[{index}]", param, device_of=params[0])
        for name, tensors in lists.items():
            check_floating(f"{name}[{index}]", tensors[index], param.shape, param)
            _check_not_negative_view(f"{name}[{index}]", tensors[index])
        _check_not_negative_view(f"params[{index}]", param)
    tensors = [*params, *grads, *exp_avgs, *exp_avg_sqs]
    largest = min([LARGEST, *(torch.finfo(x.dtype).max for x in tensors)])
    if not isinstance(lr, Tensor):
        lr = check_not_negative("lr", lr, largest)
    if not isinstance(grad_scale, Tensor):
        grad_scale = check_not_negative("grad_scale", grad_scale, largest)
    _check_numbers(step, lr, betas, eps, weight_decay, grad_scale, largest)
    if params:
        dtype = _deciding_dtype(tensors)
        OP.select(impl, params[0], dtype)().lamb_step(
            list(params),
            list(grads),
            list(exp_avgs),
            list(exp_avg_sqs),
            step,
            lr,
            betas,
            float(eps),
            float(weight_decay),
            grad_scale,
        )


def _deciding_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype to select an implementation by: the first that only the reference takes, the first that only Triton
    takes as well, or that of `tensors[0]`."""
    dtypes = [x.dtype for x in tensors]
    return next(
        (dtype for known in (TRITON_DTYPES, NATIVE_CPU_DTYPES) for dtype in dtypes if dtype not in known), dtypes[0]
    )


def _check_not_negative_view(name: str, x: Tensor) -> None:
    if x.is_neg():
        raise ValueError(f"{name} is a view with its sign bit pending; expected {name}.resolve_neg()")


def _check_numbers(
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
    largest: float,
) -> None:
    for name, value in (("step", step), ("lr", lr), ("grad_scale", grad_scale)):
        if isinstance(value, Tensor) and value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}; expected a tensor () or a number")
    if not isinstance(step, Tensor):
        check_int("step", step, 1, 2**53, "1 for the first step, then one more each")
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise TypeError(f"betas is {betas!r}; expected two numbers in [0, 1)")
    for name, number in (("betas", betas[0]), ("betas", betas[1]), ("eps", eps), ("weight_decay", weight_decay)):
        check_number(name, number, -largest, largest, f"a finite number, at most {largest:.3g}")
    if not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas}; expected two numbers in [0, 1)")
    if eps < 0 or weight_decay < 0:
        raise ValueError(f"eps is {eps} and weight_decay is {weight_decay}; expected neither below 0")
