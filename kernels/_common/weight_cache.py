"""Packed-weight cache: values derived from weights (packed, cast) and kept between calls.

A float weight is kept packed only while it is frozen (`bert_fast.freeze`); any other is read at every call. A value
that costs too much to derive at every call is kept in either case, and for a weight that is not frozen every call
compares a hash of all its memory.

An entry belongs to the tensor objects it is derived from and is dropped when the first of them is deleted. It is stale
when the version counter (torch counts in-place changes), memory, shape or dtype of one of them changed, or, for a
weight that is not frozen, its hash. Writes that torch doesn't count (through `weight.data`, a NumPy array or DLPack
that shares the memory, another process) are not seen in a frozen weight; call `freeze` again after them.

There is no lock: two threads that meet a new weight both compute the value and one result stays. So a forked process
can't inherit a held lock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common import extensions


class _Entry(NamedTuple):
    owners: tuple[weakref.ref[Tensor], ...]
    states: tuple[Any, ...]
    storages: tuple[Any, ...]  # kept, so that no other tensor gets their addresses
    value: Any

    def is_valid(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether these objects are the owners (ids are reused) and have not changed."""
        for owner, state, weight in zip(self.owners, self.states, weights, strict=True):
            if owner() is not weight or _state(weight) != state:
                return False
        return True


_entries: dict[tuple[Any, ...], _Entry] = {}
_frozen: dict[int, weakref.ref[Tensor]] = {}  # by id


def cacheable(weights: tuple[Tensor, ...]) -> bool:
    """Whether the kernels read these weights in place: dense, contiguous, not empty, of no class but Parameter."""
    for weight in weights:
        if (
            type(weight) not in (Tensor, torch.nn.Parameter)
            or weight.layout is not torch.strided
            or not weight.is_contiguous()
            or not weight.numel()
        ):
            return False
    return True


def cached_weight(kind: str, weights: tuple[Tensor, ...], derive: Callable[[Tensor], Any]) -> Any:
    """`derive(weight)`, computed once and again after a change; several weights are concatenated along dim 0.

    Args:
        kind: the name of what `derive` computes, part of the key.
        weights: for which `cacheable` is True.
        derive: of one tensor, without gradients.
    """
    key = (kind, *map(id, weights))
    entry = _entries.get(key)
    if entry is not None and entry.is_valid(weights):
        return entry.value
    states = tuple(map(_state, weights))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        value = derive(weights[0].detach() if len(weights) == 1 else torch.cat(weights))

    def drop(_: Any) -> None:
        _entries.pop(key, None)

    owners = tuple(weakref.ref(weight, drop) for weight in weights)
    _entries[key] = _Entry(owners, states, tuple(weight.untyped_storage() for weight in weights), value)
    return value


def are_frozen(weights: tuple[Tensor, ...]) -> bool:
    """Whether `freeze_weights` was called for each of these objects."""
    return all(_is_frozen(weight) for weight in weights)


def freeze_weights(weights: Iterable[Tensor]) -> None:
    """Keep what is derived from `weights` from now on; what was kept before is derived again."""
    for weight in weights:
        invalidate(weight)
        if not _is_frozen(weight):
            _frozen[id(weight)] = weakref.ref(weight, _forget(id(weight)))


def unfreeze_weights(weights: Iterable[Tensor]) -> None:
    """Undo `freeze_weights`."""
    for weight in weights:
        if _is_frozen(weight):
            del _frozen[id(weight)]
        invalidate(weight)


def invalidate(weight: Tensor | None = None) -> None:
    """Drop the entries derived from `weight`, or all entries."""
    for key in [key for key in list(_entries) if weight is None or id(weight) in key[1:]]:
        _entries.pop(key, None)


def _is_frozen(weight: Tensor) -> bool:
    frozen = _frozen.get(id(weight))
    return frozen is not None and frozen() is weight


def _forget(key: int) -> Callable[[Any], None]:
    def forget(reference: Any) -> None:
        if _frozen.get(key) is reference:  # the id may be another tensor's by now
            _frozen.pop(key, None)

    return forget


def _state(weight: Tensor) -> tuple[Any, ...]:
    pointer = weight.data_ptr()
    version = None if weight.is_inference() else weight._version
    memory_hash = None if _is_frozen(weight) else extensions.fingerprint(pointer, weight.nbytes)
    return version, pointer, weight.shape, weight.dtype, memory_hash
