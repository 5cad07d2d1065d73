"""Texts as a model's input, and what is done with those that are too long for one."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bert_fast.tasks.settings import TextSettings

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, text: TextSettings
) -> list[Encoding]:
    """One encoding for each text, or for each text with its pair, cut as `text` says.

    Raises:
        ValueError: text.long is windows, which makes several of one.
    """
    if text.long == "windows":
        raise ValueError("text.long is windows, which this task has no use for; expected head, tail or head_tail")
    return [found for (found,) in encode_parts(tokenizer, texts, pairs, text)]


def encode_parts(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, text: TextSettings
) -> list[list[Encoding]]:
    """The encodings of each text, or of each text with its pair: its windows with text.long=windows, else one.

    In a pair that is too long, text.truncation says which text is cut, or slid over; with head_tail and windows the
    other one keeps at most half of the input.
    """
    room = text.max_length - tokenizer.num_special_tokens_to_add(pairs is not None)
    if room < 1:
        raise ValueError(
            f"text.max_length is {text.max_length}, which leaves no room beside the {text.max_length - room} special "
            f"tokens of a {'text' if pairs is None else 'pair'}"
        )
    if text.long in ("head", "tail"):
        strategy = text.truncation if pairs is not None else "longest_first"
        direction = "right" if text.long == "head" else "left"
        tokenizer.enable_truncation(text.max_length, strategy=strategy, direction=direction)
        try:
            inputs = list(texts) if pairs is None else list(zip(texts, pairs, strict=True))
            return [[found] for found in tokenizer.encode_batch(inputs)]
        finally:
            tokenizer.no_truncation()
    firsts = _unprocessed(tokenizer, texts)
    if pairs is None:
        return [[tokenizer.post_process(part) for part in _cut(first, room, text)] for first in firsts]
    seconds = _unprocessed(tokenizer, pairs)
    return [_pair(tokenizer, first, second, room, text) for first, second in zip(firsts, seconds, strict=True)]


def _unprocessed(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """Without special tokens, and without what else `post_process` does: RoBERTa's takes spaces off the offsets."""
    processor = tokenizer.post_processor
    tokenizer.post_processor = None
    try:
        return tokenizer.encode_batch(list(texts))
    finally:
        tokenizer.post_processor = processor


def _pair(tokenizer: Tokenizer, first: Encoding, second: Encoding, room: int, text: TextSettings) -> list[Encoding]:
    if len(first) + len(second) <= room:
        return [tokenizer.post_process(first, second)]
    cut_first = text.truncation == "only_first" or (text.truncation == "longest_first" and len(first) >= len(second))
    long, other = (first, second) if cut_first else (second, first)
    # Where the one that is not cut is the longer, half of the input is not enough for both.
    other.truncate(max(min(len(other), room // 2), room - len(long)))
    parts = _cut(long, room - len(other), text)
    return [tokenizer.post_process(part, other) if cut_first else tokenizer.post_process(other, part) for part in parts]


def _cut(encoding: Encoding, size: int, text: TextSettings) -> list[Encoding]:
    """Its windows of `size` tokens; or one of its first and last tokens (Sun et al., 2019: 128 and 382 of 510)."""
    if len(encoding) <= size:
        return [encoding]
    if text.long == "windows":
        encoding.truncate(size, stride=min(text.overlap, size // 2))
        return [encoding, *encoding.overflowing]
    head = size // 4
    tail = copy.deepcopy(encoding)
    tail.truncate(size - head, direction="left")
    encoding.truncate(head)
    return [type(encoding).merge([encoding, tail], growing_offsets=False)]
