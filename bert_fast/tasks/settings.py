"""What a task can be told about texts, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TextSettings:
    """How texts become tokens.

    Args:
        max_length: most tokens of an example, [CLS] and [SEP] among them.
        truncation: where a pair is too long: cut the longer text, or always the first or the second.
        long: what is kept of a text that is too long: its head, its tail, a quarter of head and the rest of tail; or
            all, in windows, each an example of its own in training, whose logits are averaged for a prediction
            (classification, multi-label and regression; tokens and answers have windows whatever is said here).
        overlap: tokens that a window shares with the one before, at most half of it.
    """

    max_length: int = 128
    truncation: Literal["longest_first", "only_first", "only_second"] = "longest_first"
    long: Literal["head", "tail", "head_tail", "windows"] = "head"
    overlap: int = 32

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise ValueError(f"text.max_length is {self.max_length}; expected 4 or more: [CLS] a b [SEP]")
        if self.long not in ("head", "tail", "head_tail", "windows"):
            raise ValueError(f"text.long is {self.long!r}; expected head, tail, head_tail or windows")
        if self.overlap < 0:
            raise ValueError(f"text.overlap is {self.overlap}; expected 0 or more")


@dataclass(frozen=True)
class AugmentSettings:
    """How training rows are changed, anew in each epoch (Wei and Zou, "EDA", 2019); all shares are 0 to begin with.

    Words are what stands between spaces; characters in a text that is mostly Chinese or Japanese. Words can't be moved
    in tasks whose targets are words or places of the text: token-classification, question-answering and
    multiple-choice take `mask` only.

    Args:
        mask: share of the tokens that become [MASK].
        delete: share of the words that are left out; one stays.
        duplicate: share of the words that come twice.
        swap: share of the words that change places with another.
        synonym: share of the words that are replaced by another of their line in `synonyms`.
        synonyms: a file whose lines are words of like meaning, separated by commas.
        rows: share of the rows that are changed at all; the others stay as they are in that epoch.
    """

    mask: float = 0.0
    delete: float = 0.0
    duplicate: float = 0.0
    swap: float = 0.0
    synonym: float = 0.0
    synonyms: str | None = None
    rows: float = 1.0

    def __post_init__(self) -> None:
        for name in ("mask", "delete", "duplicate", "swap", "synonym"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; expected a share from 0, and below 1")
        if not 0 < self.rows <= 1:
            raise ValueError(f"augment.rows is {self.rows}; expected a share above 0, up to 1")
        if bool(self.synonym) != (self.synonyms is not None):
            raise ValueError(
                f"augment.synonym is {self.synonym} and augment.synonyms is {self.synonyms}; expected both, or none"
            )

    @property
    def of_words(self) -> bool:
        """Whether words are changed, and not tokens alone."""
        return any((self.delete, self.duplicate, self.swap, self.synonym))

    @property
    def any(self) -> bool:
        """Whether anything is changed."""
        return self.of_words or bool(self.mask)
