"""What was made from a weight (packed, in another dtype), kept as long as the weight lives and is what it was.

An entry belongs to the tensor objects it was made from, and dies with the first of them. It counts as stale when one of
them has another version (torch counts every change in place), memory, dtype or fingerprint. The fingerprint is a
hash of 64 values spread over the weight: it sees what torch doesn't count, which is what was written through
`weight.data`, or in inference mode; but of such writes only those that change most of the weight, as loading and
training do. `forget` is for those that change a few values.

No lock: two threads that meet a new weight both make the same thing, and one of them is kept. So a fork can't leave one
locked.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common import native


class _Entry(NamedTuple):
    owners: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]
    made: Any


_entries: dict[tuple[Any, ...], _Entry] = {}


def keepable(weights: tuple[Tensor, ...]) -> bool:
    """Whether `kept` takes these weights: tensors in memory of their own kind, not a subclass with other semantics."""
    return all(type(w) in (Tensor, torch.nn.Parameter) and w.is_contiguous() and w.numel() for w in weights)


def kept(kind: str, weights: tuple[Tensor, ...], make: Callable[[Tensor], Any]) -> Any:
    """What `make` makes of `weights` (of several: of all of them beneath each other), made again when they changed.

    `kind` names what is made; the weights are `keepable`.
    """
    key = (kind, *map(id, weights))
    state = tuple(map(_state, weights))
    entry = _entries.get(key)
    # The object of this id may be another one by now.
    if entry and entry.state == state and all(a() is b for a, b in zip(entry.owners, weights, strict=True)):
        return entry.made
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        made = make(weights[0].detach() if len(weights) == 1 else torch.cat(weights))

    def died(_: Any) -> None:
        _entries.pop(key, None)

    _entries[key] = _Entry(tuple(weakref.ref(weight, died) for weight in weights), state, made)
    return made


def forget(weight: Tensor | None = None) -> None:
    """Drop what is kept of `weight`, or of every weight; it is made again when it is wanted."""
    for key in [key for key in list(_entries) if weight is None or id(weight) in key[1:]]:
        _entries.pop(key, None)


def _state(weight: Tensor) -> tuple[Any, ...]:
    pointer = weight.data_ptr()
    version = None if weight.is_inference() else weight._version
    return version, pointer, weight.shape, weight.dtype, native.fingerprint(pointer, weight.nbytes)
