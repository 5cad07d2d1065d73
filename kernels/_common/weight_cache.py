"""What was made from a weight (packed, in another dtype), kept as long as the weight lives and is what it was.

An entry belongs to the tensor objects it was made from, and dies with the first of them. It counts as stale when one of
them has another version (torch counts every change in place), memory, dtype or fingerprint. The fingerprint is a
hash of 64 values spread over the weight: it sees what torch doesn't count, which is what was written through
`weight.data`, or in inference mode; but of such writes only those that change most of the weight, as loading and
training do. `invalidate` is for those that change a few values.

No lock: two threads that meet a new weight both make the same thing, and one of them is kept. So a fork can't leave one
locked.
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
    made: Any

    def is_of(self, weights: tuple[Tensor, ...]) -> bool:
        """Whether it was made of these weights as they are now; the objects of their ids may be others by now."""
        for owner, state, weight in zip(self.owners, self.states, weights, strict=True):
            if owner() is not weight or _state(weight) != state:
                return False
        return True


_entries: dict[tuple[Any, ...], _Entry] = {}


def cacheable(weights: tuple[Tensor, ...]) -> bool:
    """Whether `cached_weight` takes these weights: dense contiguous tensors, no subclass with other semantics."""
    for weight in weights:
        if type(weight) not in (Tensor, torch.nn.Parameter) or not weight.is_contiguous() or not weight.numel():
            return False
    return True


def cached_weight(kind: str, weights: tuple[Tensor, ...], make: Callable[[Tensor], Any]) -> Any:
    """What `make` makes of `weights` (of several: of all of them beneath each other), made again when they changed.

    `kind` names what is made; the weights are `cacheable`.
    """
    key = (kind, *map(id, weights))
    entry = _entries.get(key)
    if entry is not None and entry.is_of(weights):
        return entry.made
    states = tuple(map(_state, weights))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        made = make(weights[0].detach() if len(weights) == 1 else torch.cat(weights))

    def died(_: Any) -> None:
        _entries.pop(key, None)

    _entries[key] = _Entry(tuple(weakref.ref(weight, died) for weight in weights), states, made)
    return made


def invalidate(weight: Tensor | None = None) -> None:
    """Drop what is kept of `weight`, or of every weight; it is made again when it is wanted."""
    for key in [key for key in list(_entries) if weight is None or id(weight) in key[1:]]:
        _entries.pop(key, None)


def _state(weight: Tensor) -> tuple[Any, ...]:
    pointer = weight.data_ptr()
    version = None if weight.is_inference() else weight._version
    return version, pointer, weight.shape, weight.dtype, extensions.fingerprint(pointer, weight.nbytes)
