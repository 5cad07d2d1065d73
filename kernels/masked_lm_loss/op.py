"""Operators of masked_lm_loss: schema, fake, gradient. The kernels register themselves for the dispatch keys.

`masked_lm_loss_fwd` computes the gradients along with the loss, for a loss gradient of 1, while a chunk of logits is
there (README.md has the measurement); `masked_lm_loss_bwd` multiplies them by the gradient that came.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, Implementation, Op
from bert_fast.kernels._common.library import NATIVE_CPU_DTYPES, TRITON_DTYPES, define, native_cpu, triton_kernels
from bert_fast.kernels.masked_lm_loss import cpu_backends
from bert_fast.kernels.masked_lm_loss.reference import masked_lm_loss_reference

_PARAMETERS = (
    "Tensor dense_weight, Tensor dense_bias, Tensor norm_weight, Tensor norm_bias, "
    "Tensor decoder_weight, Tensor decoder_bias"
)


def _fwd_fake(
    hidden: Tensor, labels: Tensor, *parameters_and_settings: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    parameters, needs_grad = parameters_and_settings[:6], parameters_and_settings[-1]
    loss = hidden.new_empty((), dtype=torch.float32)
    correct, count = labels.new_empty(()), labels.new_empty(())
    if not needs_grad:
        return loss, correct, count, []
    dparameters = [hidden.new_empty(parameter.shape, dtype=torch.float32) for parameter in parameters]
    # In float16 most of dhidden would be below the smallest number until the loss scale has multiplied it.
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    return loss, correct, count, [hidden.new_empty(hidden.shape, dtype=dtype), *dparameters]


def _bwd_fake(dloss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.dtypes = [x.dtype for x in (inputs[0], *inputs[2:8])]
    ctx.set_materialize_grads(False)  # the gradients of the gradients would be zeros of the parameters' sizes
    ctx.save_for_backward(*output[3])


def _backward(ops: Any, ctx: Any, dloss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradients = ops.masked_lm_loss_bwd(dloss, list(ctx.saved_tensors))
    dhidden, *dparameters = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return dhidden, None, *dparameters, None, None, None, None, None


define(
    "masked_lm_loss_rows",
    "(Tensor(a!) logits, Tensor labels, Tensor bias, Tensor(b!) dbias, float scale, float label_smoothing, "
    "float z_loss, bool grad) -> (Tensor, Tensor)",
    fake=lambda logits, labels, *_: (labels.new_empty((), dtype=torch.float64), labels.new_empty(())),
    triton=False,
)
define("masked_lm_loss_bwd", "(Tensor dloss, Tensor[] gradients) -> Tensor[]", fake=_bwd_fake)
define(
    "masked_lm_loss_fwd",
    f"(Tensor hidden, Tensor labels, {_PARAMETERS}, float eps, int ignore_index, float label_smoothing, "
    "float z_loss, bool needs_grad) "
    "-> (Tensor loss, Tensor correct, Tensor count, Tensor[] gradients)",
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
cpu_backends.register()


def _run(ops: Any, hidden: Tensor, labels: Tensor, *parameters_and_settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    tensors = (hidden, *parameters_and_settings[:6])
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    loss, correct, count, _ = ops.masked_lm_loss_fwd(hidden, labels, *parameters_and_settings, needs_grad)
    return loss, correct, count


OP = Op(
    "masked_lm_loss",
    {
        "reference": Implementation(masked_lm_loss_reference, None, None),
        "triton": triton_kernels(_run, "masked_lm_loss", "masked_lm_loss_fwd", "masked_lm_loss_bwd"),
        "cpu": native_cpu(_run, "masked_lm_loss_rows"),
    },
    auto_rules=(
        AutoRule(
            "cpu",
            "cpu",
            NATIVE_CPU_DTYPES,
            measured="forward and backward of 4096 tokens, 15 % labelled, E 256: V 8192 62 ms, eager 79 ms; "
            "V 30522 250 ms, eager 355 ms; float32 on 2 AVX2 cores, 2026-11-21",
        ),
        AutoRule(
            "triton",
            "cuda",
            TRITON_DTYPES,
            measured="no GPU figure yet (benchmarks/results/PENDING.md); by count: the same 3 products of 2 M E V as "
            "the reference, M known on the device alone, no (M, V) tensor beyond 256 MiB",
        ),
    ),
)
