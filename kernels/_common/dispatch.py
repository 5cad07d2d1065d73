"""Which implementation of an op runs: what is available, what was asked for, what `auto` takes.

`auto` walks the op's `auto_rules` (data, each with the measurement that justifies it) and takes the first that fits the
device and dtype, is available, and is verified; where none fits it takes the reference. An explicit request never falls
back: it works or raises `ImplUnavailableError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

IMPLS = ("reference", "triton", "cuda", "cpu")
_ENVIRONMENT = "BERT_FAST_IMPL"


class Availability(NamedTuple):
    """Whether an implementation can run here, whether a recorded run verified it, and the reason where not."""

    ok: bool
    verified: bool
    reason: str


AVAILABLE = Availability(True, True, "")


class ImplUnavailableError(RuntimeError):
    """The implementation that was asked for can't run here, or not on this device or dtype."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op: what to call, where it works, and whether it can run here."""

    call: Callable[..., Any]
    device: str | None  # a torch device type; None = any
    dtypes: tuple[torch.dtype, ...] | None  # None = any floating dtype
    availability: Availability = AVAILABLE


@dataclass(frozen=True)
class AutoRule:
    """One row of an op's `auto` table."""

    impl: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    measured: str  # what was measured, where and when


def not_built(impl: str) -> Implementation:
    """The slot of an implementation that this version does not have."""

    def call(*_: Any, **__: Any) -> Any:
        raise AssertionError(f"{impl} is not available and was called all the same")

    return Implementation(
        call, None, None, Availability(False, False, f"not built yet: this version has no {impl} kernels")
    )


class Op:
    """An operation and its implementations."""

    def __init__(self, name: str, impls: Mapping[str, Implementation], auto_rules: tuple[AutoRule, ...]) -> None:
        self.name = name
        self.impls = {impl: impls.get(impl) or not_built(impl) for impl in IMPLS}
        self.auto_rules = tuple(
            choice
            for choice in auto_rules
            if self.impls[choice.impl].availability.ok and self.impls[choice.impl].availability.verified
        )
        OPS[name] = self

    def select(self, impl: str, x: torch.Tensor, dtype: torch.dtype | None = None) -> Callable[..., Any]:
        """The callable for `impl` on the device and dtype of `x`; `dtype` where the op computes in another one.

        Raises ValueError for an unknown name and ImplUnavailableError for an explicit request that can't be met.
        """
        dtype = dtype or x.dtype
        asked = _default[-1] if impl == "auto" else impl
        if asked != "reference" and _transformed():
            return self._select_transformed(asked)
        if asked == "auto":
            for choice in self.auto_rules:
                if choice.device == x.device.type and dtype in choice.dtypes:
                    return self.impls[choice.impl].call
            return self.impls["reference"].call
        if asked not in self.impls:
            raise ValueError(f"impl is {asked!r}; expected one of {', '.join(('auto', *IMPLS))}")
        chosen = self.impls[asked]
        if not chosen.availability.ok:
            raise ImplUnavailableError(f"{self.name}: impl={asked!r} {chosen.availability.reason}. {self._available()}")
        if chosen.device is not None and chosen.device != x.device.type:
            raise ImplUnavailableError(
                f"{self.name}: impl={asked!r} runs on {chosen.device} tensors; the input is on {x.device}. "
                f"{self._available()}"
            )
        if chosen.dtypes is not None and dtype not in chosen.dtypes:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in chosen.dtypes)
            raise ImplUnavailableError(
                f"{self.name}: impl={asked!r} takes {supported}; the input is {dtype}. {self._available()}"
            )
        return chosen.call

    def _select_transformed(self, requested: str) -> Callable[..., Any]:
        if requested == "auto":
            return self.impls["reference"].call
        raise ImplUnavailableError(
            f"{self.name}: impl={requested!r} supports neither the transforms of torch.func nor forward-mode "
            "differentiation; impl='reference' does, and impl='auto' chooses it there"
        )

    def _available(self) -> str:
        names = [impl for impl, found in self.impls.items() if found.availability.ok]
        return f"Available here: {', '.join(names)} (impl='auto' chooses)."


OPS: dict[str, Op] = {}


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active; operators would ignore it."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def available_impls() -> dict[str, dict[str, Availability]]:
    """For every op, which implementation can run here, whether it is verified, and why the others can't."""
    return {name: {impl: found.availability for impl, found in op.impls.items()} for name, op in sorted(OPS.items())}


def _initial_default() -> str:
    value = os.environ.get(_ENVIRONMENT, "auto")
    if value not in ("auto", *IMPLS):
        raise ValueError(f"{_ENVIRONMENT} is {value!r}; expected one of {', '.join(('auto', *IMPLS))}")
    return value


_default = [_initial_default()]


@contextmanager
def use_impl(impl: str) -> Iterator[None]:
    """Within the block, `impl="auto"` means `impl`. Process-wide, so set it from one thread.

    The environment variable BERT_FAST_IMPL, read at import, sets the same default for the whole process.
    """
    if impl not in ("auto", *IMPLS):
        raise ValueError(f"impl is {impl!r}; expected one of {', '.join(('auto', *IMPLS))}")
    _default.append(impl)
    try:
        yield
    finally:
        _default.pop()
