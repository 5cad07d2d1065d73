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
        direction: cut a text's end (right) or its beginning (left).
    """

    max_length: int = 128
    truncation: Literal["longest_first", "only_first", "only_second"] = "longest_first"
    direction: Literal["right", "left"] = "right"

    def __post_init__(self) -> None:
        if self.max_length < 4:
            raise ValueError(f"text.max_length is {self.max_length}; expected 4 or more: [CLS] a b [SEP]")
