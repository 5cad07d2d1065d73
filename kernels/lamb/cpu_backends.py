"""LAMB by the compiled CPU kernels (csrc/lamb): float32 and bfloat16 tensors in any combination, float32 arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_fast.kernels._common.library import define
from bert_fast.kernels.lamb.memory import dense, same_dense_memory


def _norm_fake(grads: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients, () float32."""
    return grads[0].new_empty((), dtype=torch.float32)


def _step_fake(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    numbers: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """`numbers`: float64 (3,), the step, the learning rate and the factor of the gradients."""


define("lamb_norm", _norm_fake, triton=False)
define("lamb_step", _step_fake, mutated=("params", "exp_avgs", "exp_avg_sqs"), triton=False)


def clip_scale(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    """As `clip_scale_reference`; squares are summed in float32 within 2,048 elements, those sums in float64."""
    norm = torch.ops.bert_fast.lamb_norm([x if same_dense_memory([x]) else x.contiguous() for x in grads])
    return norm, max_norm / norm.clamp(min=max_norm)


def lamb_step(
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
    """As `lamb_step_reference`, in float32; the norms are summed as `clip_scale` does."""
    numbers = torch.stack([torch.as_tensor(x, dtype=torch.float64).reshape(()) for x in (step, lr, grad_scale)])
    lists, copied = dense([params, grads, exp_avgs, exp_avg_sqs])
    for moments, others in (lists[2:], lists[:1:-1]):  # both of float32 where their dtypes differ
        for index, (moment, other) in enumerate(zip(moments, others, strict=True)):
            if moment.dtype != other.dtype and moment.dtype != torch.float32:
                moments[index] = moment.float()
                copied.append((moment, moments[index]))
    torch.ops.bert_fast.lamb_step(*lists, numbers, *betas, eps, weight_decay)
    for original, copy in copied:
        original.copy_(copy)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs])
