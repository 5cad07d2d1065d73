"""The invariants of an encoder: what each compares, the bound, and the text that breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bert_fast.invariants.faults import distance, name_fault, unit_vector
from bert_fast.invariants.reference import Reference

FACTOR, ULPS = 3.0, 4.0  # of eager PyTorch's error in the same dtype; DESIGN.md, section 4
TEXTS = (
    "A man is eating food.",
    "Yes.",
    "The quadratic formula gives both roots of the equation, 3.14159 and -2.71828.",
    "café naïve ÜBER Ελλάδα Москва 北京 🙂",
    "a A b B c C d D, and (then) [more] {signs} & others; 50% of them!",
    "Someone has a meal at a table while it rains outside, and nobody there says a word about the weather, for "
    "everybody has heard on the radio this morning that it will not stop before the end of the week.",
    "Yes.",
)
EMPTY = ("", "   ")


class RefusedError(Exception):
    """The subject does not take a text; the message has its reason."""


class Subject(Protocol):
    """What is tested: it embeds several texts at once.

    A subject that is a model in this process also has `hidden`, called with token ids of several texts and the layout
    "alone", "right padding", "left padding" or "packed", which returns the hidden states (S, E) of each.
    """

    name: str

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(number of texts, D); raises `RefusedError` where it takes a text not."""


@dataclass(frozen=True)
class Finding:
    """The text that breaks an invariant most, how far it is off, and what that looks like."""

    text: str
    distance: float
    mistake: str = ""


@dataclass(frozen=True)
class Row:
    """One invariant.

    Attributes:
        invariant: its name.
        texts: the number of texts compared.
        distance: the largest distance |x - expected| / |expected|.
        bound: what it may be.
        finding: the worst text where the distance is over the bound.
        note: what could not be compared, and why.
    """

    invariant: str
    texts: int
    distance: float
    bound: float
    finding: Finding | None = None
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.finding is None


def long_text(reference: Reference) -> str:
    """A text of half as many tokens again as the model has positions, in which no two parts are the same."""
    words: list[str] = []
    wanted = reference.longest + reference.longest // 2
    while len(reference.ids(" ".join(words), max_seqlen=wanted)) < wanted:
        words += [f"{number} birds on river {number * 7 % 31}" for number in range(len(words), len(words) + 40)]
    return " ".join(words)


def bound_of(reference: Reference, dtype: torch.dtype, texts: Sequence[str], unit: bool) -> float:
    """Three times the largest error of eager PyTorch in `dtype`, and four units in the last place."""
    eager = reference.in_dtype(dtype)
    pairs = [(eager.embed(text), reference.embed(text)) for text in texts]
    if unit:
        pairs = [(unit_vector(x), unit_vector(y)) for x, y in pairs]
    return FACTOR * max(distance(x, y) for x, y in pairs) + ULPS * torch.finfo(dtype).eps


def check_encoder(
    subject: Subject,
    reference: Reference,
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
    unit: bool = False,
    texts: Sequence[str] = TEXTS,
) -> Iterator[Row]:
    """Check the vectors of texts.

    Values (each text alone), empty texts, truncation, the composition of batches, padding beside a longer text, order
    and repetition; each against the reference in float64.

    Args:
        subject: what is tested.
        reference: the oracle.
        dtype: what the subject computes in; sets the bound.
        tolerance: the bound instead.
        unit: compare directions, for subjects that normalize or not as they like.
        texts: the texts, without the empty and the long ones.
    """
    long = long_text(reference)
    expected = {text: reference.embed(text) for text in (*texts, *EMPTY, long)}
    if unit:
        expected = {text: unit_vector(vector) for text, vector in expected.items()}
    bound = bound_of(reference, dtype, (*texts, long), unit) if tolerance is None else tolerance
    run = _Runner(subject, reference, expected, bound, unit)
    yield run.alone("values", texts)
    yield run.alone("empty text", EMPTY)
    yield run.alone("truncation", [long])
    yield run.together("batch composition", [list(texts), [texts[0], *texts[3:]], [texts[0]] * 3])
    yield run.together("order", [list(reversed(texts)), [*texts[1:], texts[0]]])
    yield run.together("padding beside a longer text", [[text, long] for text in texts[:3]] + [[long, texts[1]]])
    yield run.repeated("repetition", texts)


class _Runner:
    def __init__(
        self, subject: Subject, reference: Reference, expected: dict[str, Tensor], bound: float, unit: bool
    ) -> None:
        self.subject, self.reference, self.expected = subject, reference, expected
        self.bound, self.unit = bound, unit

    def embed(self, texts: Sequence[str]) -> Tensor:
        vectors = self.subject.embed(texts)
        if vectors.dim() != 2 or len(vectors) != len(texts):
            raise ValueError(f"{self.subject.name} returned shape {tuple(vectors.shape)} for {len(texts)} texts")
        return unit_vector(vectors) if self.unit else vectors.detach().double().cpu()

    def alone(self, invariant: str, texts: Sequence[str]) -> Row:
        return self.together(invariant, [[text] for text in texts])

    def together(self, invariant: str, batches: Sequence[Sequence[str]]) -> Row:
        """The vectors of each batch."""
        results: list[tuple[float, Sequence[str], int, Tensor]] = []
        notes: list[str] = []
        for batch in batches:
            try:
                vectors = self.embed(batch)
            except RefusedError as refusal:
                notes.append(str(refusal))
                continue
            for index, (text, vector) in enumerate(zip(batch, vectors, strict=True)):
                results.append((distance(vector, self.expected[text]), batch, index, vector))
        note = f"refused: {notes[0]}" if notes else ""
        if not results:
            return Row(invariant, 0, 0.0, self.bound, None, note)
        results.sort(key=lambda result: result[0], reverse=True)
        off, batch, index, _ = results[0]
        finding = None
        if not off <= self.bound:
            wrong = [result for result in results if not result[0] <= self.bound]
            finding = Finding(batch[index], off, self._name(wrong))
        return Row(invariant, len(results), off, self.bound, finding, note)

    def _name(self, wrong: list[tuple[float, Sequence[str], int, Tensor]]) -> str:
        """The fault of the worst vector, or of the next ones: a fault may have no place in one text."""
        for off, batch, index, vector in wrong[:12]:
            if mistake := name_fault(self.reference, batch, index, vector, off, self.unit):
                return mistake
        return ""

    def repeated(self, invariant: str, texts: Sequence[str]) -> Row:
        first, second = (self.embed(texts) for _ in range(2))
        apart = [distance(x, y) for x, y in zip(second, first, strict=True)]
        worst = max(range(len(texts)), key=apart.__getitem__)
        finding = None if apart[worst] <= self.bound else Finding(texts[worst], apart[worst], "it is not deterministic")
        return Row(invariant, len(texts), apart[worst], self.bound, finding)


LAYOUTS = ("alone", "right padding", "left padding", "packing")


def check_hidden(
    hidden: Callable[[Sequence[list[int]], str], Sequence[Tensor]],
    reference: Reference,
    *,
    dtype: torch.dtype = torch.float32,
    tolerance: float | None = None,
    layouts: Sequence[str] = LAYOUTS,
    texts: Sequence[str] = TEXTS,
) -> Iterator[Row]:
    """Check the hidden states of a batch in each layout.

    Args:
        hidden: (token ids of several texts, layout) -> the hidden states (S, E) of each.
        reference, dtype, tolerance: as for `check_encoder`.
        layouts: those that the model takes, of `LAYOUTS`.
        texts: the texts.
    """
    ids = [reference.ids(text) for text in texts]
    expected = [reference.hidden(row)[0] for row in ids]
    eager = reference.in_dtype(dtype)
    errors = [distance(eager.hidden(row)[0], states) for row, states in zip(ids, expected, strict=True)]
    bound = FACTOR * max(errors) + ULPS * torch.finfo(dtype).eps if tolerance is None else tolerance
    for layout in layouts:
        states = [hidden([row], layout)[0] for row in ids] if layout == "alone" else hidden(ids, layout)
        apart = [distance(x, y) for x, y in zip(states, expected, strict=True)]
        worst = max(range(len(ids)), key=apart.__getitem__)
        finding = None
        if not apart[worst] <= bound:
            finding = Finding(texts[worst], apart[worst], _hidden_fault(reference, ids, worst, states[worst], layout))
        yield Row(f"hidden states, {layout}", len(ids), apart[worst], bound, finding)


def _hidden_fault(reference: Reference, ids: Sequence[list[int]], index: int, states: Tensor, layout: str) -> str:
    """What is wrong with the hidden states of a layout; "" where it is not known."""
    row, longest = ids[index], max(map(len, ids))
    candidates: dict[str, dict[str, Any]] = {"padding is attended to": {"padded_to": longest, "masked": False}}
    if layout == "left padding":
        candidates["positions are counted from the padding"] = {"shift": longest - len(row)}
    if layout == "packing":
        before = sum(map(len, ids[:index]))
        candidates["positions run on over the texts of the batch"] = {"shift": before}
    for shift in (1, 2, -1, -2):
        candidates[f"positions are shifted by {shift}"] = {"shift": shift}
    off = distance(states, reference.hidden(row)[0])
    for name, options in candidates.items():
        try:
            mistaken = reference.hidden(row, **options)[0][: len(row)]
        except LookupError:
            continue
        if distance(states, mistaken) < 0.1 * off:
            return name
    return ""
