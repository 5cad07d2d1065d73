"""Packed-weight cache: values derived from weights (packed, cast), valid until a weight changes or is deleted.

An entry belongs to the tensor objects it is derived from and is dropped when the first of them is deleted. It is stale
when the version counter (torch counts in-place changes), memory, shape, dtype or fingerprint of one of them changed.
The fingerprint, a hash of 64 values spread over the weight, detects writes that torch doesn't count (through
`weight.data`, or in inference mode) if they change most of the weight, as loading and training do. After such a write
of a few values call `invalidate`.

There is no lock: two threads that meet a new weight both compute the value and one result stays. So a forked process
can't inherit a held lock.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common import extensions


class _Entry(NamedTuple):
    owners: tuple[weakref.ref[Tensor], ...]
    states: tuple[Any, ...]
    value: Any

    def is_valid(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether these objects are the owners (ids are reused) and have not changed."""
        for owner, state, weight in zip(self.owners, self.states, weights, strict=True):
            if owner() is not weight or _state(weight) != state:
                return False
        return True


_entries: dict[tuple[Any, ...], _Entry] = {}


def cacheable(weights: tuple[Tensor, ...]) -> bool:
    """Whether `cached_weight` takes these weights: contiguous, not empty, of no tensor subclass but Parameter."""
    for weight in weights:
        if type(weight) not in (Tensor, torch.nn.Parameter) or not weight.is_contiguous() or not weight.numel():
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

    _entries[key] = _Entry(tuple(weakref.ref(weight, drop) for weight in weights), states, value)
    return value


def invalidate(weight: Tensor | None = None) -> None:
    """Drop the entries derived from `weight`, or all entries."""
    for key in [key for key in list(_entries) if weight is None or id(weight) in key[1:]]:
        _entries.pop(key, None)


def _state(weight: Tensor) -> tuple[Any, ...]:
    pointer = weight.data_ptr()
    version = None if weight.is_inference() else weight._version
    return version, pointer, weight.shape, weight.dtype, extensions.fingerprint(pointer, weight.nbytes)
