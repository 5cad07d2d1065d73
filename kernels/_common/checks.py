"""Argument checks of the public functions. Each error names the argument, what came and what was expected."""

from __future__ import annotations

import numbers
import os
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

_CHECK_VALUES = os.environ.get("BERT_FAST_CHECK") == "1"
LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny  # normal numbers of float32
# Tensor subclasses that stand for ordinary tensors while a graph is traced.
_TRACED = (FakeTensor, FunctionalTensor)


def check_tensor(name: str, x: Tensor) -> None:
    """TypeError unless `x` is a dense tensor whose memory a kernel can read.

    A subclass with operators of its own (a quantized or a distributed weight) or a sparse tensor has no such memory.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; expected a torch.Tensor")
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter and _has_own_operators(x):
        raise TypeError(
            f"{name} is {type(x).__name__}, a tensor subclass with operators of its own; expected a torch.Tensor, or "
            "call its own operators (torch.nn.functional.linear, for example)"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has the layout {x.layout}; expected a dense tensor (torch.strided): {name}.to_dense()")


def _has_own_operators(x: Tensor) -> bool:
    if torch.compiler.is_compiling() or isinstance(x, _TRACED):
        return False
    return getattr(type(x), "__torch_dispatch__", None) is not Tensor.__torch_dispatch__


def check_number(name: str, value: Any, low: float, high: float, expected: str) -> float:
    """`value` as a float; TypeError unless it is a real number, ValueError unless it is in [low, high]."""
    if type(value) not in (int, float) and not _is_number(value, numbers.Real, (torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")
    if not low <= value <= high:  # false for NaN
        raise ValueError(f"{name} is {value}; expected {expected}")
    traced: Any = value  # a SymFloat stays one
    return traced if isinstance(value, torch.SymInt | torch.SymFloat) else float(value)


def check_int(name: str, value: Any, low: int, high: int, expected: str) -> None:
    """TypeError unless `value` is an integer; ValueError unless it is in [low, high]; the error says `expected`."""
    if type(value) is not int and not _is_number(value, numbers.Integral, (torch.SymInt,)):
        raise TypeError(f"{name} is {value!r} ({type(value).__name__}); expected {expected}")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; expected {expected}")


def _is_number(value: Any, kind: type, symbolic: tuple[type, ...]) -> bool:
    return isinstance(value, (kind, *symbolic)) and not isinstance(value, bool)


def check_shape(name: str, x: Tensor, expected: tuple[int | str, ...]) -> None:
    """ValueError unless `x` has the shape `expected`; a string in it names a dimension of any size."""
    shape = x.shape
    if shape == expected:  # the common case: a layer checks seven shapes a forward pass
        return
    if len(shape) == len(expected):
        for size, expected_size in zip(shape, expected, strict=True):
            if size != expected_size and not isinstance(expected_size, str):
                break
        else:
            return
    sizes = ", ".join(str(size) for size in expected)
    raise ValueError(f"{name} has shape {tuple(shape)}; expected ({sizes}{',' if len(expected) == 1 else ''})")


def check_floating(
    name: str, x: Tensor, shape: tuple[int | str, ...] | None = None, device_of: Tensor | None = None
) -> None:
    """TypeError unless `x` is a floating-point tensor; ValueError unless it has `shape` and `device_of`'s device."""
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} is {x.dtype}; expected a floating-point tensor")
    if shape is not None:
        check_shape(name, x, shape)
    if device_of is not None and x.device != device_of.device:
        check_same_device(device_of, **{name: x})


def check_integer(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.int64, torch.int32)) -> None:
    """TypeError unless `x` is an integer tensor of one of `dtypes`."""
    check_tensor(name, x)
    if x.dtype not in dtypes:
        raise TypeError(f"{name} is {x.dtype}; expected {' or '.join(str(dtype) for dtype in dtypes)}")


def check_same_device(x: Tensor, **others: Tensor | None) -> None:
    """ValueError unless every tensor of `others` is on the device of `x`."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{name} is on {other.device}; expected {x.device}, the device of the first argument")


def check_same_dtype(x: Tensor, **others: Tensor) -> None:
    """TypeError unless every tensor of `others` has the dtype of `x`."""
    for name, other in others.items():
        if other.dtype != x.dtype:
            raise TypeError(f"{name} is {other.dtype}; expected {x.dtype}, the dtype of the first argument")


def check_eps(eps: float) -> float:
    """`eps` as a float; TypeError or ValueError unless it is a positive float32: a constant row has no variance."""
    return check_number("eps", eps, SMALLEST, LARGEST, "a positive number such as 1e-12")


def check_finite(name: str, value: float) -> float:
    """`value` as a float; TypeError or ValueError unless it is a finite number of float32."""
    return check_number(name, value, -LARGEST, LARGEST, "a finite number")


def check_not_negative(name: str, value: float, largest: float = LARGEST) -> float:
    """`value` as a float; TypeError or ValueError unless it is a number from 0 to `largest`."""
    return check_number(name, value, 0.0, largest, f"a finite number that is not negative, at most {largest:.3g}")


def check_max_seqlen(max_seqlen: int) -> None:
    """TypeError or ValueError unless `max_seqlen` is an integer from 0 to 2^31 - 1."""
    check_int("max_seqlen", max_seqlen, 0, 2**31 - 1, "the length of the longest sequence, at least 0")


def check_rng_state(rng_state: Tensor, x: Tensor) -> None:
    """TypeError or ValueError unless `rng_state`, of the dropout mask, is int64 (2,) on the device of `x`."""
    check_integer("rng_state", rng_state, (torch.int64,))
    check_shape("rng_state", rng_state, (2,))
    check_same_device(x, rng_state=rng_state)


def values_are_checked(x: Tensor) -> bool:
    """Whether checks read the values of `x`: on the CPU, on CUDA under BERT_FAST_CHECK=1; never while tracing."""
    return not torch.compiler.is_compiling() and (x.device.type == "cpu" or (_CHECK_VALUES and x.device.type == "cuda"))


def check_range(name: str, x: Tensor, high: int, what: str) -> None:
    """ValueError unless every value of the integer tensor `x` is in [0, high)."""
    if values_are_checked(x) and x.numel():
        low, top = (int(value) for value in torch.aminmax(x))
        if low < 0 or top >= high:
            raise ValueError(f"{name} has values from {low} to {top}; expected 0 to {high - 1} ({what})")


def check_cu_seqlens(cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """TypeError or ValueError unless `cu_seqlens` is int32 (B+1,), rises from 0 to `total` by at most `max_seqlen`."""
    check_integer("cu_seqlens", cu_seqlens, (torch.int32,))
    check_shape("cu_seqlens", cu_seqlens, ("B+1",))
    if cu_seqlens.shape[0] < 1:
        raise ValueError("cu_seqlens is empty; expected at least the leading 0")
    if not values_are_checked(cu_seqlens):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0 or ends[-1] != total:
        raise ValueError(
            f"cu_seqlens runs from {ends[0]} to {ends[-1]}; expected from 0 to {total}, the number of tokens"
        )
    longest = 0
    for index, (start, end) in enumerate(pairwise(ends)):
        if end < start:
            raise ValueError(f"cu_seqlens falls from {start} to {end} at index {index + 1}; expected it never to fall")
        longest = max(longest, end - start)
    if longest > max_seqlen:
        raise ValueError(f"cu_seqlens has a sequence of {longest} tokens; expected at most max_seqlen = {max_seqlen}")


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Autocast's dtype on the device of `x`, or None where autocast is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind != "meta" and torch.is_autocast_enabled(kind) else None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which an op takes `x`: autocast's, or that of `x` where autocast is off or `x` is float64."""
    dtype = autocast_dtype(x)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def to_compute_dtype(x: Tensor) -> Tensor:
    """`x` in its `compute_dtype`; `x` itself where it has it."""
    dtype = compute_dtype(x)
    return x if x.dtype == dtype else x.to(dtype)


def parameter_like(parameter: Tensor, x: Tensor) -> Tensor:
    """`parameter` in the dtype of `x`; as it is where autocast casts it, and keeps a cast weight for the next call."""
    casts = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, parameter.dtype)
    return parameter if casts else parameter.to(x.dtype)
