"""Define an operator with torch.library: schema, fake and gradient in Python; the kernels register themselves.

An operator is defined once for each family of kernels, with one schema, fake and gradient: `bert_fast::name` for the
compiled CPU kernels, `bert_fast_cuda::name` for the CUDA kernels, `bert_fast_triton::name` for the Triton kernels. So
all can run in one process on the same device, and which of them runs is decided by the op's door, not by who
registered last.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common import extensions, records, triton_support
from bert_fast.kernels._common.dispatch import AVAILABLE, Availability, Implementation

_NATIVE, _CUDA, _TRITON = "bert_fast", "bert_fast_cuda", "bert_fast_triton"
_LIBRARIES = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in (_NATIVE, _CUDA, _TRITON)}
NATIVE_CPU_DTYPES = (torch.float32, torch.bfloat16)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
    higher_order: bool = False,
    triton: bool = True,
    cuda: bool = False,
) -> None:
    """Define `name` with `schema` (arguments and returns), its shapes and, where given, its gradient.

    `backward(ops, ctx, *gradients)` finds the operators that it calls in `ops`, the namespace it is registered for.
    `triton=False` is for operators that only the compiled kernels have, `cuda=True` for those with CUDA kernels.
    `higher_order=True` is for a `backward` whose operators are differentiable; others raise in a second derivative.
    """
    for namespace, library in _LIBRARIES.items():
        if (namespace == _TRITON and not triton) or (namespace == _CUDA and not cuda):
            continue
        qualified = f"{namespace}::{name}"
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, fake, lib=library)
        if backward is not None:
            gradient = functools.partial(backward, getattr(torch.ops, namespace))
            if not higher_order:
                gradient = functools.partial(_first_order, qualified, gradient)
            torch.library.register_autograd(qualified, gradient, setup_context=setup_context, lib=library)


class _NoSecondDerivative(torch.autograd.Function):
    """Returns the gradients of operator `name`, `tensors[count:]`; raises when they are differentiated."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if x is None else x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name} has no second derivative; use impl='reference', which has")


def _first_order(name: str, backward: Callable[..., Any], ctx: Any, *douts: Tensor | None) -> Any:
    """`backward`, whose results raise when they are differentiated: its operators have no gradient, or torch's 0."""
    if not torch.is_grad_enabled():
        return backward(ctx, *douts)
    with torch.no_grad():
        gradients = backward(ctx, *douts)
    sources = (*ctx.saved_tensors, *douts)
    return _NoSecondDerivative.apply(name, len(sources), *sources, *gradients)


def implement(name: str, dispatch_key: str, function: Callable[..., Any]) -> None:
    """Register a Python kernel for `bert_fast::name` under `dispatch_key`, for ops whose hot path is partly GEMMs."""
    _LIBRARIES[_NATIVE].impl(name, function, dispatch_key)


def native_cpu(call: Callable[..., Any], *operators: str) -> Implementation:
    """The slot of the compiled CPU kernels: available when `bert_fast._C` registered every one of `operators`.

    `call(ops, ...)` finds the operators in `ops`.
    """
    missing = [name for name in operators if not extensions.registered(f"{_NATIVE}::{name}", "CPU")]
    if not missing:
        availability = AVAILABLE
    else:
        reason = extensions.MISSING or f"the compiled module lacks {', '.join(missing)}: build it again"
        availability = Availability(False, False, reason)
    return Implementation(functools.partial(call, torch.ops.bert_fast), "cpu", NATIVE_CPU_DTYPES, availability)


def cuda_kernels(call: Callable[..., Any], op: str, *operators: str) -> Implementation:
    """The slot of the CUDA kernels: available when `bert_fast._CUDA` registered every one of `operators`.

    Where tests loaded the emulated kernels (csrc/emulator), they are those, on CPU tensors.
    """
    device = "cpu" if extensions.CUDA_EMULATED else "cuda"
    missing = [name for name in operators if not extensions.registered(f"{_CUDA}::{name}", device.upper())]
    if missing:
        reason = extensions.CUDA_MISSING or f"the compiled module lacks {', '.join(missing)}: build it again"
        availability = Availability(False, False, reason)
    elif extensions.CUDA_EMULATED:
        availability = Availability(True, False, "emulated on CPU tensors (BERT_FAST_CUDA_EMULATOR): for tests")
    else:
        reason = records.why_unverified(op, "cuda")
        availability = Availability(True, not reason, reason)
    return Implementation(functools.partial(call, torch.ops.bert_fast_cuda), device, CUDA_DTYPES, availability)


def simulated(impl: str) -> bool:
    """Whether `impl` runs on CPU tensors in Triton's interpreter or the CUDA kernels' emulator, slowly, for tests."""
    return (impl == "triton" and triton_support.INTERPRETED) or (impl == "cuda" and extensions.CUDA_EMULATED)


def triton_function(op: str, name: str) -> Callable[..., Any]:
    """The function `name` of the op's `triton` module; the module, and triton with it, is imported when it runs."""

    def function(*arguments: Any) -> Any:
        module = importlib.import_module(f"bert_fast.kernels.{op}.triton")
        return getattr(module, name)(*arguments)

    return function


def triton_slot(call: Callable[..., Any], op: str) -> Implementation:
    """The slot of `call`, which runs the op's Triton kernels."""
    device = "cpu" if triton_support.INTERPRETED else "cuda"
    return Implementation(call, device, TRITON_DTYPES, triton_support.availability(op))


def triton_kernels(call: Callable[..., Any], op: str, *operators: str) -> Implementation:
    """The slot of the Triton kernels: each of `operators` is the function of that name in the op's `triton` module.

    `call(ops, ...)` finds the operators in `ops`.
    """
    for name in operators:
        for key in ("CUDA", "CPU") if triton_support.INTERPRETED else ("CUDA",):
            _LIBRARIES[_TRITON].impl(name, triton_function(op, name), key)
    return triton_slot(functools.partial(call, torch.ops.bert_fast_triton), op)
