"""Define operators with torch.library, and describe the implementations that call them.

An operator has one definition in Python (schema, fake, gradient) and a namespace for each family of kernels:
`bert_fast::name` for the compiled CPU kernels, `bert_fast_cuda::name` for the CUDA kernels, `bert_fast_triton::name`
for the Triton kernels. So all of them can run in one process on the same device, and the op's public function decides
which one runs. Compiled kernels register themselves when their module is imported.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common import extensions, records, triton_support
from bert_fast.kernels._common.autograd import register_gradient
from bert_fast.kernels._common.dispatch import AVAILABLE, Availability, Implementation

_NATIVE, _CUDA, _TRITON = "bert_fast", "bert_fast_cuda", "bert_fast_triton"
_LIBRARIES = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in (_NATIVE, _CUDA, _TRITON)}
NATIVE_CPU_DTYPES = (torch.float32, torch.bfloat16)
WIDENED_CPU_DTYPES = (*NATIVE_CPU_DTYPES, torch.float16)  # float16 is computed in float32
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INPUTS: dict[str, Callable[..., Any]] = {}  # by operator: the named tuple of its inputs


def define(
    name: str,
    fake: Callable[..., Any],
    *,
    arguments_of: Callable[..., Any] | None = None,
    setup_context: Callable[[Any, Any, Any], None] | None = None,
    backward: Callable[..., dict[str, Tensor | None]] | None = None,
    higher_order: bool = False,
    symbolic: tuple[str, ...] = (),
    mutated: tuple[str, ...] = (),
    triton: bool = True,
    cuda: bool = False,
) -> None:
    """Define the operator `name`.

    The schema is inferred from type annotations: the arguments are those of `arguments_of`, then those that only `fake`
    has; the returns are those of `fake`.

    Args:
        name: the operator's name, without a namespace.
        fake: returns outputs without values. Called with every input as a keyword, of which it names those it uses.
        arguments_of: the op's reference, whose arguments are the operator's; None where `fake` names them all.
        setup_context: (ctx, inputs, output) saves what `backward` needs; `inputs` is a named tuple.
        backward: (ops, ctx, *douts) returns the gradients by argument name, those left out being None. `ops` is the
            namespace of torch.ops that the operator ran in.
        higher_order: whether `backward` calls differentiable operators; if not, a second derivative raises.
        symbolic: the integer arguments that torch.compile may keep symbolic (SymInt).
        mutated: the tensor arguments that the operator writes to.
        triton: whether there are Triton kernels.
        cuda: whether there are CUDA kernels.
    """
    prototype = _prototype(fake, arguments_of)
    arguments = tuple(prototype.__signature__.parameters)
    INPUTS[name] = namedtuple(f"{name}_inputs", arguments)
    schema = re.sub(
        r"SymInt(\??) (\w+)",
        lambda match: match[0] if match[2] in symbolic else f"int{match[1]} {match[2]}",
        torch.library.infer_schema(prototype, op_name=name, mutates_args=mutated),
    )

    def fake_by_name(*inputs: Any, **named: Any) -> Any:
        return fake(**dict(zip(arguments, inputs, strict=False)), **named)

    def setup_context_by_name(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        assert setup_context is not None
        setup_context(ctx, INPUTS[name](*inputs), output)

    def backward_by_name(ops: Any, ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        assert backward is not None
        gradients = backward(ops, ctx, *douts)
        return tuple(gradients.get(argument) for argument in arguments)

    for namespace, library in _LIBRARIES.items():
        if (namespace == _TRITON and not triton) or (namespace == _CUDA and not cuda):
            continue
        qualified = f"{namespace}::{name}"
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(qualified, fake_by_name, lib=library)
        if backward is not None:
            gradient = functools.partial(backward_by_name, getattr(torch.ops, namespace))
            if not higher_order:
                gradient = functools.partial(_first_order, qualified, gradient)
            register_gradient(qualified, library, setup_context_by_name, gradient)


def _prototype(fake: Callable[..., Any], arguments_of: Callable[..., Any] | None) -> Any:
    """A function with the operator's signature, for `infer_schema`."""
    signature = inspect.signature(fake, eval_str=True)
    parameters = {} if arguments_of is None else dict(inspect.signature(arguments_of, eval_str=True).parameters)
    for parameter in signature.parameters.values():
        if parameter.kind is not parameter.VAR_KEYWORD:
            parameters.setdefault(parameter.name, parameter)

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(parameters=list(parameters.values()))  # type: ignore[attr-defined]
    return prototype


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
    """Register a Python kernel for `bert_fast::name` under `dispatch_key`, where the work is mostly a library's."""
    _LIBRARIES[_NATIVE].impl(name, function, dispatch_key)


def call_operator(name: str) -> Callable[..., Tensor]:
    """(ops, *inputs) -> the first output of the operator `name` in the namespace `ops`; others are for its gradient."""

    def call(ops: Any, *inputs: Any) -> Tensor:
        out = getattr(ops, name)(*inputs)
        first: Tensor = out if isinstance(out, Tensor) else out[0]
        return first

    return call


def widened(call: Callable[..., Any], activations: int) -> Callable[..., Any]:
    """`call(ops, *inputs)` for float16 too: in float32, and the output is rounded to float16.

    Few CPUs multiply float16, and torch's own products of it run at a tenth of float32's rate there. `activations` is
    the number of leading inputs that have the dtype of the output; the kernels read parameters of any.
    """

    def call_widened(ops: Any, *inputs: Any) -> Any:
        if inputs[0].dtype is not torch.float16:
            return call(ops, *inputs)
        wide = [x.float() for x in inputs[:activations]]
        return call(ops, *wide, *inputs[activations:]).half()

    return call_widened


def native_cpu(call: Callable[..., Any], *operators: str, activations: int = 0) -> Implementation:
    """The compiled CPU kernels: available where `bert_fast._C` registered all of `operators`.

    `call(ops, *inputs)` gets the namespace of the operators. With `activations` float16 is taken too, see `widened`.
    """
    missing = [name for name in operators if not extensions.registered(f"{_NATIVE}::{name}", "CPU")]
    if not missing:
        availability = AVAILABLE
    else:
        reason = extensions.MISSING or f"the compiled module lacks {', '.join(missing)}: build it again"
        availability = Availability(False, False, reason)
    dtypes = WIDENED_CPU_DTYPES if activations else NATIVE_CPU_DTYPES
    call = widened(call, activations) if activations else call
    return Implementation(functools.partial(call, torch.ops.bert_fast), "cpu", dtypes, availability)


def cuda_kernels(call: Callable[..., Any], op: str, *operators: str) -> Implementation:
    """The CUDA kernels of `op`: available where `bert_fast._CUDA` registered all of `operators`.

    If the tests loaded the emulated kernels (tests/emulator), they run on CPU tensors.
    """
    device = "cpu" if extensions.CUDA_EMULATED else "cuda"
    missing = [name for name in operators if not extensions.registered(f"{_CUDA}::{name}", device.upper())]
    if missing:
        reason = extensions.CUDA_MISSING or f"the compiled module lacks {', '.join(missing)}: build it again"
        availability = Availability(False, False, reason)
    elif extensions.CUDA_EMULATED:
        availability = Availability(True, False, "emulated on CPU tensors (BERT_FAST_CUDA_EMULATOR): for tests")
    else:
        families, reason = records.verified(op, "cuda")
        availability = Availability(True, bool(families), reason)
    return Implementation(
        functools.partial(call, torch.ops.bert_fast_cuda), device, CUDA_DTYPES, availability, _families(op, "cuda")
    )


def _families(op: str, impl: str) -> frozenset[int] | None:
    """The GPUs that the records verified kernels for; None where these are simulated."""
    return None if simulated(impl) else records.verified(op, impl).families


def simulated(impl: str) -> bool:
    """Whether `impl` runs in Triton's interpreter or the CUDA emulator: on CPU tensors, slowly, for tests."""
    return (impl == "triton" and triton_support.INTERPRETED) or (impl == "cuda" and extensions.CUDA_EMULATED)


def triton_function(op: str, name: str) -> Callable[..., Any]:
    """The function `name` of the op's `triton` module, which is imported, and triton with it, at the first call."""

    def function(*arguments: Any) -> Any:
        module = importlib.import_module(f"bert_fast.kernels.{op}.triton")
        return getattr(module, name)(*arguments)

    return function


def triton_implementation(call: Callable[..., Any], op: str) -> Implementation:
    """`call`, available where the Triton kernels of `op` are."""
    device = "cpu" if triton_support.INTERPRETED else "cuda"
    return Implementation(call, device, TRITON_DTYPES, triton_support.availability(op), _families(op, "triton"))


def triton_kernels(call: Callable[..., Any], op: str, *operators: str) -> Implementation:
    """The Triton kernels of `op`: each of `operators` is the function of that name in the op's `triton` module.

    `call(ops, *inputs)` gets the namespace of the operators.
    """
    for name in operators:
        for key in ("CUDA", "CPU") if triton_support.INTERPRETED else ("CUDA",):
            _LIBRARIES[_TRITON].impl(name, triton_function(op, name), key)
    return triton_implementation(functools.partial(call, torch.ops.bert_fast_triton), op)
