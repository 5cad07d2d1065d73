"""Operators of masked_lm_loss: fakes, gradient, implementations and auto rules.

`masked_lm_loss_fwd` also computes the gradients, for a loss gradient of 1, while a chunk of logits is in memory
(README.md has the measurement); `masked_lm_loss_bwd` multiplies them by the loss gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.dispatch import AutoRule, FunctionSpec, Implementation, Op, Outputs
from bert_fast.kernels._common.library import NATIVE_CPU_DTYPES, TRITON_DTYPES, define, native_cpu, triton_kernels
from bert_fast.kernels.masked_lm_loss import cpu_backends
from bert_fast.kernels.masked_lm_loss.reference import masked_lm_loss_reference

_PARAMETERS = ("dense_weight", "dense_bias", "norm_weight", "norm_bias", "decoder_weight", "decoder_bias")


def _fwd_fake(
    hidden: Tensor, labels: Tensor, needs_grad: bool, **inputs: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """loss, correct, count, and the gradients of hidden and the parameters, or none."""
    loss = hidden.new_empty((), dtype=torch.float32)
    correct, count = labels.new_empty(()), labels.new_empty(())
    if not needs_grad:
        return loss, correct, count, []
    # Most of dhidden would underflow in float16 before the loss scale has multiplied it.
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    dparameters = [hidden.new_empty(inputs[name].shape, dtype=torch.float32) for name in _PARAMETERS]
    return loss, correct, count, [hidden.new_empty(hidden.shape, dtype=dtype), *dparameters]


def _bwd_fake(dloss: Tensor, gradients: list[Tensor]) -> list[Tensor]:
    return [torch.empty_like(gradient) for gradient in gradients]


def _rows_fake(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor,
    dbias: Tensor,
    scale: float,
    label_smoothing: float,
    z_loss: float,
    grad: bool,
) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses, float64, and the correct rows; with `grad` logits becomes dlogits."""
    return labels.new_empty((), dtype=torch.float64), labels.new_empty(())


def _setup_context(ctx: Any, inputs: Any, output: tuple[Any, ...]) -> None:
    ctx.dtypes = {name: getattr(inputs, name).dtype for name in ("hidden", *_PARAMETERS)}
    ctx.set_materialize_grads(False)  # the gradients of `gradients` would be zeros of the parameters' sizes
    ctx.save_for_backward(*output[3])


def _backward(ops: Any, ctx: Any, dloss: Tensor, *_: Any) -> dict[str, Tensor | None]:
    gradients = ops.masked_lm_loss_bwd(dloss, list(ctx.saved_tensors))
    named = zip(ctx.dtypes.items(), gradients, strict=True)
    return {name: gradient.to(dtype) for (name, dtype), gradient in named}


define("masked_lm_loss_rows", _rows_fake, mutated=("logits", "dbias"), triton=False)
define("masked_lm_loss_bwd", _bwd_fake)
define(
    "masked_lm_loss_fwd",
    _fwd_fake,
    arguments_of=masked_lm_loss_reference,
    setup_context=_setup_context,
    backward=_backward,
)
cpu_backends.register()


def _call(ops: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs if isinstance(x, Tensor))
    loss, correct, count, _ = ops.masked_lm_loss_fwd(*inputs, needs_grad)
    return loss, correct, count


def _outputs(hidden: Tensor, *_: Any) -> Outputs:
    """loss, correct, count."""
    loss = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return ((), loss), ((), torch.int64), ((), torch.int64)


OP = Op(
    "masked_lm_loss",
    {
        "reference": Implementation(masked_lm_loss_reference, None, None),
        "triton": triton_kernels(_call, "masked_lm_loss", "masked_lm_loss_fwd", "masked_lm_loss_bwd"),
        "cpu": native_cpu(_call, "masked_lm_loss_rows"),
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
    functions={"masked_lm_loss": FunctionSpec(masked_lm_loss_reference, _outputs)},
)
