"""Dispatch: which implementations an op has, which of them run here, and which one a call takes.

`impl="auto"` walks the op's `auto_rules` (data, each with its measurement) and takes the first implementation that fits
the device and dtype, is available and is verified for the GPU's matrix instructions; where none does, the reference.
Where there are times of several of them on this device, recorded (records.py) or of `bert-fast tune` (tuned.py), it
takes the one that is faster at the nearest size (times.py), except while torch.compile traces, which can't read them.
A registered kernel is among them only if `bert-fast tune` verified and measured this source. An explicit request never
falls back: it runs or raises `ImplUnavailableError`.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from bert_fast.kernels._common import records, tuned
from bert_fast.kernels._common.times import Size, Time, fastest, merge

IMPLS = ("reference", "triton", "cuda", "cpu")
_ENVIRONMENT = "BERT_FAST_IMPL"
Outputs = tuple[tuple[tuple["int | None", ...], torch.dtype], ...]  # shape and dtype of each output


class Availability(NamedTuple):
    """Whether an implementation can run here (ok), whether a recorded run verified it, and the reason where not; also
    the reason why it has run without a part of its kernels."""

    ok: bool
    verified: bool
    reason: str


AVAILABLE = Availability(True, True, "")


class ImplUnavailableError(RuntimeError):
    """The requested implementation does not exist, or can't run here or on this device or dtype."""


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op.

    Args:
        call: takes the arguments of the op's reference, in its order.
        device: the torch device type of its tensors; None for any.
        dtypes: the dtypes it takes; None for all that the public function takes.
        availability: whether it can run here.
        families: the GPUs that recorded runs verified it for (`records.family`); None for kernels that need no record.
        built_on: other kernels that it only calls, where it has none of its own.
        limitation: returns why it has run without a part of its kernels in this process, or "".
        registered: the function that was registered and its backward pass, of a kernel of others.
        source: the hash of a registered kernel's source.
    """

    call: Callable[..., Any]
    device: str | None
    dtypes: tuple[torch.dtype, ...] | None
    availability: Availability = AVAILABLE
    families: frozenset[int] | None = None
    built_on: str = ""
    limitation: Callable[[], str] = str
    registered: tuple[Any, Any] | None = None
    source: Callable[[], str] = str

    def state(self) -> Availability:
        """`availability`, with what running it has shown."""
        reasons = [reason for reason in (self.availability.reason, self.limitation()) if reason]
        return self.availability._replace(reason="; ".join(reasons))


@dataclass(frozen=True)
class AutoRule:
    """`impl="auto"` takes `impl` for tensors on `device` of one of `dtypes`."""

    impl: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    measured: str  # the measurement that justifies the rule, with hardware and date


@dataclass(frozen=True)
class FunctionSpec:
    """How a kernel of others is called for a function of an op, and what it returns (`third_party.py`).

    Args:
        reference: the definition; its arguments by name, but for those renamed and left out, are the kernel's.
        outputs: called as `reference`; returns the shape and dtype of each output, an unknown size being None; none of
            a function that changes its tensors in place.
        renamed: arguments of the reference that the public function calls otherwise: {name: (public name, conversion)}.
        left_out: arguments of the reference that the public function does not have.
        gradient: whether the output has a gradient.
    """

    reference: Callable[..., Any]
    outputs: Callable[..., Outputs]
    renamed: Mapping[str, tuple[str, Callable[[Any], Any]]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    gradient: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the kernel's arguments."""
        names = [name for name in _parameters(self.reference) if name not in self.left_out]
        return tuple(self.renamed[name][0] if name in self.renamed else name for name in names)

    def arguments(self, *inputs: Any) -> dict[str, Any]:
        """The kernel's arguments, from the reference's."""
        result = {}
        for name, value in zip(_parameters(self.reference), inputs, strict=True):
            if name in self.renamed:
                public, convert = self.renamed[name]
                result[public] = convert(value)
            elif name not in self.left_out:
                result[name] = value
        return result


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


class Op:
    """An op: the implementations that exist and the rules of `impl="auto"`. Creating one registers it in `OPS`.

    Args:
        name: the op's name.
        impls: its implementations, by name.
        auto_rules: the rules of `impl="auto"`, first match first.
        functions: what kernels of others compute, by the name of the function.
        timed_as: the op whose recorded times decide, where it is another one.
        group: of an op of several functions: the class of an implementation's functions, in the order of `functions`.
    """

    def __init__(
        self,
        name: str,
        impls: Mapping[str, Implementation],
        auto_rules: tuple[AutoRule, ...],
        functions: Mapping[str, FunctionSpec],
        group: Callable[..., Any] | None = None,
        timed_as: str = "",
    ) -> None:
        self.name = name
        self.functions, self.group = functions, group
        self.timed_as = timed_as or name
        self.impls = {impl: impls[impl] for impl in IMPLS if impl in impls}
        self.auto_rules = tuple(
            rule
            for rule in auto_rules
            if self.impls[rule.impl].availability.ok and self.impls[rule.impl].availability.verified
        )
        OPS[name] = self

    def select(
        self, impl: str, x: torch.Tensor, dtype: torch.dtype | None = None, size: Size | None = None
    ) -> Callable[..., Any]:
        """The `call` of an implementation.

        Args:
            impl: "auto", a name from IMPLS, or a registered one.
            x: the tensor whose device and dtype decide.
            dtype: the dtype that the op computes in, where it is not that of `x`.
            size: of the call, in ops with several GPU implementations; None for the largest recorded one.

        Raises:
            ValueError: `impl` is no such name.
            ImplUnavailableError: the op has no such implementation, or it can't run here or on this device or dtype.
        """
        dtype = dtype or x.dtype
        requested = _default[-1].get(self.name, _default[-1][_OTHERS]) if impl == "auto" else impl
        if requested != "reference" and _transformed():
            return self._select_transformed(requested)
        if requested == "auto":
            return self.impls[self._automatic(x, dtype, size)].call
        if not isinstance(requested, str) or requested not in self.impls:
            check_impl("impl", requested)
        if requested not in self.impls:
            raise self._unavailable(requested, f"does not exist; this op has {', '.join(self.impls)}")
        implementation = self.impls[requested]
        if not implementation.availability.ok:
            raise self._unavailable(requested, implementation.availability.reason)
        if implementation.device is not None and implementation.device != x.device.type:
            raise self._unavailable(requested, f"runs on {implementation.device} tensors; the input is on {x.device}")
        if implementation.dtypes is not None and dtype not in implementation.dtypes:
            supported = ", ".join(str(dtype).removeprefix("torch.") for dtype in implementation.dtypes)
            raise self._unavailable(requested, f"takes {supported}; the input is {dtype}")
        return implementation.call

    def _automatic(self, x: torch.Tensor, dtype: torch.dtype, size: Size | None) -> str:
        """The name of what `impl="auto"` takes."""
        candidates = [
            rule.impl
            for rule in self.auto_rules
            if rule.device == x.device.type and dtype in rule.dtypes and self._verified_on(rule.impl, x.device)
        ]
        if torch.compiler.is_compiling():
            return candidates[0] if candidates else "reference"
        candidates = [*(candidates or ["reference"]), *self._tuned(x.device.type, dtype)]
        if len(candidates) > 1:
            training = torch.is_grad_enabled() and x.requires_grad
            return self._fastest(tuple(candidates), device_key(x.device), dtype, training, size) or candidates[0]
        return candidates[0]

    @functools.cache  # noqa: B019
    def _tuned(self, device: str, dtype: torch.dtype) -> tuple[str, ...]:
        """The registered kernels that `bert-fast tune` verified in `dtype` and measured, with the source of now."""
        name = str(dtype).removeprefix("torch.")
        entries = tuned_entries(device, self.name)[0]
        return tuple(impl for impl, entry in entries.items() if impl not in IMPLS and name in entry.dtypes)

    def _verified_on(self, impl: str, device: torch.device) -> bool:
        """Whether `impl` needs no record, or has one of a GPU with the matrix instructions of this one."""
        families = self.impls[impl].families
        return families is None or device.type != "cuda" or device_family(device) in families

    @functools.lru_cache(maxsize=4096)  # noqa: B019  (ops live as long as the process)
    def _fastest(
        self, candidates: tuple[str, ...], device: str, dtype: torch.dtype, training: bool, size: Size | None
    ) -> str | None:
        """That of `candidates` which the record shows to be the fastest, or None."""
        times = {impl: measured for impl, measured in self.times(device).items() if impl in candidates}
        return fastest(times, str(dtype).removeprefix("torch."), training, size)

    @functools.cache  # noqa: B019
    def times(self, device: str) -> dict[str, list[Time]]:
        """The times on a device (see `device_key`), by implementation, where `auto` may take it."""
        kind, _, name = device.partition(" ")
        found = {impl: entry.times for impl, entry in tuned_entries(kind, self.name)[0].items()}
        if name and not (found and self.timed_as != self.name):  # those of another op don't compare with the op's own
            rules = {rule.impl for rule in self.auto_rules}
            for impl in (impl for impl in IMPLS if impl in rules):
                found[impl] = merge(records.times(name, self.timed_as, impl), found.get(impl, []))
        return {impl: times for impl, times in found.items() if times}

    def _select_transformed(self, requested: str) -> Callable[..., Any]:
        if requested == "auto":
            return self.impls["reference"].call
        raise ImplUnavailableError(
            f"{self.name}: impl={requested!r} supports neither the transforms of torch.func nor forward-mode "
            "differentiation; impl='reference' does, and impl='auto' chooses it there"
        )

    def _unavailable(self, impl: str, reason: str) -> ImplUnavailableError:
        names = [name for name, implementation in self.impls.items() if implementation.availability.ok]
        available = f"Available here: {', '.join(names)} (impl='auto' chooses)."
        return ImplUnavailableError(f"{self.name}: impl={impl!r} {reason}. {available}")


OPS: dict[str, Op] = {}


def device_family(device: torch.device) -> int:
    """The matrix instructions of a CUDA device, as `records.family` numbers them."""
    return _family(device.index)


# A constant to torch.compile, which can't trace the query. torch.compiler.assume_constant_result sets the same
# attribute, and imports the compiler for it.
device_family._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _family(index: int | None) -> int:
    return records.family(torch.cuda.get_device_capability(index)[0])


@functools.cache
def device_key(device: torch.device) -> str:
    """The type of a device, and of a CUDA device the name that its records have: "cpu", "cuda NVIDIA H200"."""
    return f"cuda {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


@functools.cache
def tuned_table(device: str) -> tuned.Table:
    """The table of `bert-fast tune` for a device type, read once a process."""
    return tuned.read(device) if device in tuned.DEVICES else tuned.EMPTY


@functools.cache
def tuned_entries(device: str, op: str) -> tuple[dict[str, tuned.Entry], list[str]]:
    """The entries of the table that count for an op, by implementation, and why others don't."""
    entries, ignored = {}, []
    for impl, entry in tuned_table(device).ops.get(op, {}).items():
        now = source_of(op, impl)
        if now and now == entry.source:
            entries[impl] = entry
        else:
            ignored.append(f"{op} {impl} is {'of another source' if now else 'not registered'}; its times don't count")
    return entries, ignored


def source_of(op: str, impl: str) -> str:
    """The hash of the source of an implementation; "" where there is none. Compiled kernels have that of the build."""
    implementation = OPS[op].impls.get(impl) if op in OPS else None
    if implementation is None and impl not in IMPLS:  # of an installed package, maybe
        from bert_fast.kernels._common import third_party  # which imports this module

        third_party.load_entry_points()
        implementation = OPS[op].impls.get(impl) if op in OPS else None
    if implementation is None:
        return ""
    if impl in IMPLS:
        return records.sources_hash(op, impl) if impl in records.RECORDED else "of the build"
    return implementation.source()


def forget_times(table: bool = False) -> None:
    """Choose anew: implementations have changed, or with `table` the file of `bert-fast tune`."""
    if table:
        tuned_table.cache_clear()
    for cached in (tuned_entries, Op._tuned, Op.times, Op._fastest):
        cached.cache_clear()


def _transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is active; operators would ignore it."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def known_impls() -> tuple[str, ...]:
    """The names of all implementations: IMPLS, then those that were registered, of installed packages too."""
    from bert_fast.kernels._common import third_party  # which imports this module

    third_party.load_entry_points()
    registered = {name for op in OPS.values() for name in op.impls} - set(IMPLS)
    return (*IMPLS, *sorted(registered))


def check_impl(what: str, impl: str) -> None:
    """ValueError unless `impl` is "auto" or the name of an implementation of some op."""
    if impl in ("auto", *IMPLS) or impl in (known := known_impls()):
        return
    from bert_fast.kernels._common import third_party

    failed = "".join(f" (entry point {name}: {why})" for name, why in third_party.load_entry_points().items())
    raise ValueError(f"{what} is {impl!r}; expected one of {', '.join(('auto', *known))}{failed}")


def available_impls() -> dict[str, dict[str, Availability]]:
    """Whether each implementation of each op can run here, whether it is verified, and the reason where it can't, or
    where it ran without a part of its kernels.

    Returns:
        {op: {impl: Availability}}, with the implementations that exist, and those that were registered.
    """
    known_impls()
    return {
        name: {impl: implementation.state() for impl, implementation in op.impls.items()}
        for name, op in sorted(OPS.items())
    }


def implementations_table() -> str:
    """Markdown table of ops, implementations and dtypes: what exists, whether or not it can run here."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    lines = ["| op | " + " | ".join(IMPLS) + " |", "|---" * (1 + len(IMPLS)) + "|"]
    for name, op in sorted(OPS.items()):
        cells = [name]
        for impl in IMPLS:
            implementation = op.impls.get(impl)
            if implementation is None:
                cells.append("")
                continue
            dtypes = implementation.dtypes
            cell = "any" if dtypes is None else ", ".join(names[dtype] for dtype in dtypes)
            cells.append(f"{cell} ({implementation.built_on})" if implementation.built_on else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_OTHERS = ""  # the key for the ops that are not named
_default = [{_OTHERS: os.environ.get(_ENVIRONMENT, "auto")}]


def check_environment() -> None:
    """ValueError unless BERT_FAST_IMPL names an implementation; called when all ops exist."""
    check_impl(_ENVIRONMENT, _default[0][_OTHERS])


@contextmanager
def use_impl(impl: str | Mapping[str, str]) -> Iterator[None]:
    """Context manager within which `impl="auto"` means `impl`, for every op of the process or for some.

    The environment variable BERT_FAST_IMPL, read at import, sets the same default for the whole process. The setting
    is not thread-local: enter it from one thread.

    Args:
        impl: "auto", "reference", "triton", "cuda", "cpu" or a registered name; or {op: one of these}, which leaves
            the other ops as they are: `with use_impl("triton"), use_impl({"attention": "cuda"}): ...`.

    Returns:
        A context manager. Within it a call of an op that lacks its `impl` raises `ImplUnavailableError`.

    Raises:
        ValueError: `impl` is none of these or names no op, on entering the block.
    """
    chosen = dict(impl) if isinstance(impl, Mapping) else {_OTHERS: impl}
    for op, name in chosen.items():
        if op not in (_OTHERS, *OPS) or (op == _OTHERS and isinstance(impl, Mapping)):
            raise ValueError(f"impl names the op {op!r}; expected some of {', '.join(sorted(OPS))}")
        check_impl("impl", name)
    _default.append({**_default[-1], **chosen} if isinstance(impl, Mapping) else chosen)
    try:
        yield
    finally:
        _default.pop()
