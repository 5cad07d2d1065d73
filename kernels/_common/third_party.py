"""Kernels of others as implementations: `register`, `unregister`, entry points, and the files of `--kernels`.

A registered function has the signature of the op's public function without `impl`, and is called with keywords, after
validation. What it returns is checked at every call.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
import runpy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bert_fast.kernels._common.dispatch import (
    IMPLS,
    OPS,
    Availability,
    FunctionSpec,
    Implementation,
    Op,
    forget_times,
)
from bert_fast.kernels._common.tuned import source_hash

ENTRY_POINTS = "bert_fast.kernels"
_REGISTERED = Availability(True, False, "registered by register(); impl='auto' takes it only after bert-fast tune")
_failures: dict[str, str] = {}  # entry points that could not be loaded: why
_loaded = False


def register(
    op: str,
    name: str,
    fn: Callable[..., Any] | Mapping[str, Callable[..., Any]],
    *,
    device: str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    backward: Callable[..., Mapping[str, Tensor]] | None = None,
) -> None:
    """Make `fn` an implementation of an op: `impl=name`, in `available_impls()`, verified and benchmarked as ours.

    `fn` is called with the arguments of the op's public function as keywords, without `impl`, after they are
    validated: `None` for a default is resolved (softmax_scale), tensors are in the dtype of the computation, rng_state
    is a tensor wherever there is dropout, and the weights of linear are one tensor. It returns what the public function
    returns. `impl="auto"` takes it where `use_impl({op: name})` asks for it, and where `bert-fast tune` verified and
    measured this source, in another process too: keep one name for one kernel.

    A package registers its kernels when they are first asked for by an entry point of the group "bert_fast.kernels"
    that names a function without arguments:

        [project.entry-points."bert_fast.kernels"]
        my_package = "my_package.kernels:register_all"

    Args:
        op: the op's name, e.g. "attention".
        name: the implementation's name, an identifier.
        fn: the function. Its gradient is torch's, of what `fn` calls, unless there is a `backward`. For the ops of
            several functions a mapping of them: padding has unpad_indices, gather_rows and scatter_rows, lamb has
            clip_scale and lamb_step; their arguments are in the op's reference.py.
        device: the torch device type of its tensors, e.g. "cuda"; None for any.
        dtypes: the dtypes that it takes; None for all.
        backward: computes the gradients. `fn` then returns (output, saved), where saved is a tuple of tensors, and
            `backward(dout, saved, **arguments)` returns {argument: gradient}; dout is the gradient of the output, of
            masked_lm_loss's loss.

    Raises:
        TypeError: `fn` or `backward` is not callable, can't be called with these arguments, or a dtype is none.
        ValueError: `op` or `device` is unknown, `name` is taken or no identifier, or the op has no gradient.
    """
    target = _op(op)
    if not isinstance(name, str) or re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name) is None:
        raise ValueError(f"name is {name!r}; expected an identifier, such as 'mine'")
    if name == "auto" or name in IMPLS or name in target.impls:
        whose = "the name of one of ours" if name == "auto" or name in IMPLS else f"registered already for {op}"
        raise ValueError(f"name is {name!r}, which is {whose}; expected another, or unregister({op!r}, {name!r}) first")
    if device is not None:
        device = _device_type(device)
    call = _adapted(target, name, fn, backward)
    functions = [*fn.values()] if isinstance(fn, Mapping) else [fn, *([] if backward is None else [backward])]
    target.impls[name] = Implementation(
        call,
        device,
        _checked_dtypes(dtypes),
        _REGISTERED,
        registered=(fn, backward),
        source=functools.cache(functools.partial(source_hash, functions)),
    )
    forget_times()


def unregister(op: str, name: str) -> None:
    """Remove an implementation that `register` added.

    Raises:
        ValueError: `op` is unknown, or `name` is not registered for it.
    """
    impls = _op(op).impls
    if name in IMPLS or name not in impls:
        registered = ", ".join(impl for impl in impls if impl not in IMPLS) or "none"
        raise ValueError(f"name is {name!r}; expected one of those registered for {op}: {registered}")
    del impls[name]
    forget_times()


@contextmanager
def registered(op: str, fn: Any, **options: Any) -> Iterator[str]:
    """`fn` registered within the block, under a name of its own, which is returned."""
    impls = _op(op).impls
    name = next(name for number in range(len(impls) + 1) if (name := f"tested_{number}") not in impls)
    register(op, name, fn, **options)
    try:
        yield name
    finally:
        unregister(op, name)


def load_entry_points() -> dict[str, str]:
    """Call the entry points of installed packages, once a process; returns those that failed, with the reason."""
    global _loaded
    if not _loaded:
        _loaded = True  # first: what an entry point calls may ask again
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
            try:
                entry.load()()
            except Exception as error:  # a package of others must not make ours unusable
                _failures[f"{entry.name} = {entry.value}"] = f"{type(error).__name__}: {error}"
                warnings.warn(
                    f"the entry point {entry.name} = {entry.value} of {ENTRY_POINTS} raised "
                    f"{type(error).__name__}: {error}; its kernels are not registered",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return dict(_failures)


def load_file(path: str | Path) -> None:
    """Run a Python file that registers kernels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it registers nothing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a Python file that calls bert_fast.kernels.register")
    before = {(op, impl) for op in OPS for impl in OPS[op].impls}
    runpy.run_path(str(path), run_name="bert_fast_third_party_kernels")
    if {(op, impl) for op in OPS for impl in OPS[op].impls} == before:
        raise ValueError(f"{path} registers no kernel; expected a call of bert_fast.kernels.register")


def _op(op: str) -> Op:
    if op not in OPS:
        raise ValueError(f"op is {op!r}; expected one of {', '.join(sorted(OPS))}")
    return OPS[op]


def _device_type(device: str) -> str:
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device is {device!r}; expected a device type of torch, such as 'cuda', or None") from None
    if parsed.index is not None:
        raise ValueError(f"device is {device!r}; expected a device type without an index: {parsed.type!r}")
    return parsed.type


def _checked_dtypes(dtypes: Sequence[torch.dtype] | None) -> tuple[torch.dtype, ...] | None:
    if dtypes is None:
        return None
    wrong = [dtype for dtype in dtypes if not isinstance(dtype, torch.dtype)] if not isinstance(dtypes, str) else dtypes
    if wrong or not dtypes:
        raise TypeError(f"dtypes is {dtypes!r}; expected torch dtypes, such as (torch.float32,), or None")
    return tuple(dtypes)


def _adapted(op: Op, name: str, fn: Any, backward: Any) -> Callable[..., Any]:
    """`fn` as an implementation is called: with the arguments of the op's reference, by position."""
    if backward is not None and not callable(backward):
        raise TypeError(f"backward is of type {type(backward).__name__}; expected a function or None")
    if op.group is None:
        ((_, spec),) = op.functions.items()
        _check_callable("fn", fn, spec)
        if backward is not None and not spec.gradient:
            raise ValueError(f"backward was given, and {op.name} has no gradient")
        return _Adapter(op.name, name, spec, fn, backward)
    if backward is not None:
        raise ValueError(f"backward was given for {op.name}, an op of several functions; their gradients are torch's")
    if not isinstance(fn, Mapping) or set(fn) != set(op.functions):
        given = ", ".join(map(str, fn)) if isinstance(fn, Mapping) else f"of type {type(fn).__name__}"
        raise TypeError(f"fn is {given}; expected a mapping with the functions of {op.name}: {', '.join(op.functions)}")
    for key, spec in op.functions.items():
        _check_callable(f"fn[{key!r}]", fn[key], spec)
    functions = op.group(*(_Adapter(op.name, name, spec, fn[key], None) for key, spec in op.functions.items()))
    return lambda: functions


def _check_callable(what: str, fn: Any, spec: FunctionSpec) -> None:
    if not callable(fn):
        raise TypeError(f"{what} is of type {type(fn).__name__}; expected a function")
    try:
        signature = inspect.signature(fn)
    except (TypeError, ValueError):  # of a function of C
        return
    try:
        signature.bind(**dict.fromkeys(spec.names))
    except TypeError as error:
        raise TypeError(f"{what} has the signature {signature} ({error}); expected the arguments "
                        f"{', '.join(spec.names)}, which are given by name") from None  # fmt: skip


class _Adapter:
    """Calls a third party's function with the arguments of the op's reference, and checks what it returns."""

    def __init__(self, op: str, impl: str, spec: FunctionSpec, fn: Callable[..., Any], backward: Any) -> None:
        self.what, self.spec, self.fn, self.backward = f"{op}: impl={impl!r}", spec, fn, backward

    def __call__(self, *inputs: Any) -> Any:
        arguments = self.spec.arguments(*inputs)
        if self.backward is None:
            return self._checked(self.fn(**arguments), inputs)
        outs = _WithBackward.apply(self, inputs, tuple(arguments), *arguments.values())
        return outs

    def forward(self, inputs: tuple[Any, ...], arguments: dict[str, Any]) -> tuple[Any, tuple[Tensor, ...]]:
        """(output, saved) of a function that has a `backward`."""
        result = self.fn(**arguments)
        saved = result[1] if isinstance(result, tuple) and len(result) == 2 else None
        if not isinstance(saved, tuple) or not all(isinstance(x, Tensor) for x in saved):
            raise TypeError(
                f"{self.what} has a backward and returned {_describe(result)}; expected (output, saved), saved being a "
                "tuple of tensors"
            )
        return self._checked(result[0], inputs), saved

    def gradients(self, dout: Tensor, saved: tuple[Tensor, ...], arguments: dict[str, Any]) -> dict[str, Any]:
        """The gradients by argument, with the shapes of their arguments."""
        gradients = self.backward(dout, saved, **arguments)
        if not isinstance(gradients, Mapping):
            raise TypeError(f"{self.what}: backward returned {_describe(gradients)}; expected {{argument: gradient}}")
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            x = arguments.get(name)
            if not isinstance(x, Tensor) or not x.is_floating_point():
                known = [key for key, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad]
                raise ValueError(f"{self.what}: backward returned a gradient of {name!r}; expected those of {known}")
            if not isinstance(gradient, Tensor) or gradient.shape != x.shape:
                raise ValueError(
                    f"{self.what}: backward returned {_describe(gradient)} as the gradient of {name}; expected a "
                    f"tensor of shape {tuple(x.shape)}"
                )
        return dict(gradients)

    def _checked(self, outs: Any, inputs: tuple[Any, ...]) -> Any:
        expected = self.spec.outputs(*inputs)
        if not expected:
            if outs is not None:
                raise TypeError(
                    f"{self.what} returned {_describe(outs)}; expected None, its tensors are changed in place"
                )
            return None
        several = isinstance(outs, (tuple, list))
        given = tuple(outs) if several else (outs,)
        if several != (len(expected) > 1) or len(given) != len(expected):
            raise TypeError(f"{self.what} returned {_describe(outs)}; expected {len(expected)} tensor(s)")
        device = next(x.device for x in _flat(inputs) if isinstance(x, Tensor))
        for index, (out, (shape, dtype)) in enumerate(zip(given, expected, strict=True)):
            where = f"{self.what} returned" if len(expected) == 1 else f"{self.what}, output {index}:"
            if not isinstance(out, Tensor):
                raise TypeError(f"{where} {_describe(out)}; expected a tensor")
            wrong = [size for size, right in zip(out.shape, shape, strict=False) if right is not None and size != right]
            if wrong or out.dim() != len(shape):
                raise ValueError(f"{where} shape {tuple(out.shape)}; expected {_shape(shape)}")
            if out.dtype != dtype:
                raise TypeError(f"{where} {out.dtype}; expected {dtype}")
            if out.device.type != device.type:
                raise ValueError(f"{where} a tensor on {out.device}; expected {device}")
        return given if several else outs


class _WithBackward(torch.autograd.Function):
    """The function of an `_Adapter` with its own backward."""

    @staticmethod
    def forward(ctx: Any, adapter: _Adapter, inputs: Any, names: tuple[str, ...], *values: Any) -> Any:
        outs, saved = adapter.forward(inputs, dict(zip(names, values, strict=True)))
        ctx.adapter, ctx.names, ctx.count = adapter, names, len(saved)
        ctx.values = [None if isinstance(value, Tensor) else value for value in values]
        ctx.tensors = [index for index, value in enumerate(values) if isinstance(value, Tensor)]
        ctx.save_for_backward(*saved, *(values[index] for index in ctx.tensors))
        if isinstance(outs, tuple):
            ctx.mark_non_differentiable(*(out for out in outs if not out.is_floating_point()))
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *_: Any) -> Any:
        saved, tensors = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        values = list(ctx.values)
        for index, x in zip(ctx.tensors, tensors, strict=True):
            values[index] = x
        gradients = ctx.adapter.gradients(dout, saved, dict(zip(ctx.names, values, strict=True)))
        needed = [name for name, needs in zip(ctx.names, ctx.needs_input_grad[3:], strict=True) if needs]
        if missing := [name for name in needed if name not in gradients]:
            raise ValueError(
                f"{ctx.adapter.what}: backward returned no gradient of {', '.join(missing)}; expected those of "
                f"{', '.join(needed)}, None being zero"
            )
        return (None, None, None, *(gradients.get(name) for name in ctx.names))


def _flat(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        yield from value if isinstance(value, (list, tuple)) else (value,)


def _shape(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)}{',' * (len(shape) == 1)})"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"{len(value)} values"
    return "None" if value is None else f"a {type(value).__name__}"
