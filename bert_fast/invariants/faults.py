"""Known faults of encoders and servers, as vectors that the reference computes: to name what a wrong vector is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bert_fast.invariants.folder import POOLINGS
from bert_fast.invariants.reference import Reference

LENGTHS = (32, 64, 128, 256, 384, 512)  # maximum lengths that settings have
Fault = Callable[[Reference, Sequence[str], int], Tensor]  # the vector of texts[index], among `texts`


def distance(x: Tensor, expected: Tensor) -> float:
    """|x - expected| / |expected|; inf where x has another size or a value that is not finite."""
    x, expected = x.detach().double().cpu(), expected.double()
    if x.shape != expected.shape or not bool(x.isfinite().all()):
        return float("inf")
    return float((x - expected).norm() / expected.norm().clamp(min=1e-300))


def name_fault(reference: Reference, texts: Sequence[str], index: int, vector: Tensor, off: float, unit: bool) -> str:
    """The fault whose vector is nearest to `vector`, if at most a tenth of `off` away; "" where none is.

    Args:
        texts: the texts that were embedded together; `vector` is that of texts[index].
        off: the distance of `vector` from the right one.
        unit: whether vectors are compared by their direction.
    """
    right = reference.embed(texts[index])
    if not unit and vector.shape == right.shape and distance(vector / vector.norm(), right / right.norm()) < 0.1 * off:
        norm, expected = float(vector.norm()), float(right.norm())
        return f"the vector has length {norm:.4g}, not {expected:.4g}: the direction is right"
    best, name = 0.1 * off, ""
    for fault, compute in _faults(reference).items():
        try:
            mistaken = compute(reference, texts, index)
        except (LookupError, RuntimeError, ValueError):
            continue  # the fault changes nothing here, or the model can't have it
        if unit:
            mistaken = mistaken / mistaken.norm()
        if (apart := distance(vector, mistaken)) < best:
            best, name = apart, fault
    return name


def _faults(reference: Reference) -> dict[str, Fault]:
    faults: dict[str, Fault] = {
        "tanh and erf GeLU are exchanged": _variant("activation"),
        "the token types are dropped": _variant("token types"),
        "positions run on over the texts of the batch": _flattened,
        "padding is pooled": _pooled_padding,
        "padding is attended to and pooled": _attended_padding,
        "padding is attended to": _attended,
        "special tokens are left out": lambda r, texts, i: r.pool(*r.hidden(r.ids(texts[i], special=False))),
        "the text is converted to lower case": lambda r, texts, i: r.embed(texts[i].lower()),
    }
    if reference.prompt:
        faults["the default prompt is left out"] = _without_prompt
    if reference.unpooled:
        faults["the tokens of the prompt are pooled"] = _pooled_prompt
    if reference.keep != "head":
        faults["the head is kept where a text is truncated"] = _other_end
    if reference.steps or reference.truncate_dim:
        faults["the modules after the pooling, or truncate_dim, are left out"] = _without_modules
    for shift in (1, 2, -1, -2):
        faults[f"positions are shifted by {shift}"] = _shifted(shift)
    for pooling in POOLINGS:
        if pooling != reference.pooling:
            faults[f"{pooling} pooling in place of {reference.pooling} pooling"] = _other_pooling(pooling)
    for length in (*LENGTHS, reference.longest):
        if length != reference.max_seqlen and length <= reference.longest:
            faults[f"the maximum length is {length}, not {reference.max_seqlen}"] = _other_length(length)
    return faults


def _variant(name: str) -> Fault:
    return lambda r, texts, i: r.pool(*r.hidden(r.ids(texts[i]), model=r.variant(name)))


def _shifted(shift: int) -> Fault:
    return lambda r, texts, i: r.pool(*r.hidden(r.ids(texts[i]), shift=shift))


def _other_pooling(pooling: str) -> Fault:
    return lambda r, texts, i: r.pool(*r.hidden(r.ids(texts[i])), pooling)


def _other_length(length: int) -> Fault:
    return lambda r, texts, i: r.pool(*r.hidden(r.ids(texts[i], max_seqlen=length)))


def _without_prompt(reference: Reference, texts: Sequence[str], index: int) -> Tensor:
    hidden, pooled = reference.hidden(reference.ids(texts[index], prompt=""))
    return reference.pool(hidden, pooled, unpooled=0)


def _pooled_prompt(reference: Reference, texts: Sequence[str], index: int) -> Tensor:
    return reference.pool(*reference.hidden(reference.ids(texts[index])), unpooled=0)


def _other_end(reference: Reference, texts: Sequence[str], index: int) -> Tensor:
    other = copy.copy(reference)
    other.keep = "head"
    return other.embed(texts[index])


def _without_modules(reference: Reference, texts: Sequence[str], index: int) -> Tensor:
    other = copy.copy(reference)
    other.steps, other.truncate_dim = (), None
    return other.embed(texts[index])


def _flattened(reference: Reference, texts: Sequence[str], index: int) -> Tensor:
    before = sum(len(reference.ids(text)) for text in texts[:index])
    if not before:
        raise LookupError
    return reference.pool(*reference.hidden(reference.ids(texts[index]), shift=before))


def _padding(reference: Reference, texts: Sequence[str], index: int) -> tuple[list[int], int]:
    lengths = [len(reference.ids(text)) for text in texts]
    if lengths[index] == max(lengths):
        raise LookupError
    return reference.ids(texts[index]), max(lengths)


def _pooled_padding(reference: Reference, texts: Sequence[str], index: int) -> Tensor:
    ids, longest = _padding(reference, texts, index)
    return reference.pool(*reference.hidden(ids, padded_to=longest))


def _attended_padding(reference: Reference, texts: Sequence[str], index: int) -> Tensor:
    ids, longest = _padding(reference, texts, index)
    return reference.pool(*reference.hidden(ids, padded_to=longest, masked=False))


def _attended(reference: Reference, texts: Sequence[str], index: int) -> Tensor:
    ids, longest = _padding(reference, texts, index)
    hidden, pooled = reference.hidden(ids, padded_to=longest, masked=False)
    return reference.pool(hidden[: len(ids)], pooled)


def unit_vector(vector: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector.double(), dim=-1)
