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
