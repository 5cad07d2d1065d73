"""Tokenization of texts and pairs, with truncation or windows for long texts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bert_fast.data.leading import encode_leading
from bert_fast.tasks.settings import TextSettings

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


def encode_texts(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, text: TextSettings
) -> list[Encoding]:
    """One encoding per text, or per pair of texts, truncated as `text` says.

    Raises:
        ValueError: text.long is windows, or text.max_length has no space for a text.
    """
    if text.long == "windows":
        raise ValueError("text.long is windows; expected head, tail or head_tail for this task")
    return [encoding for (encoding,) in encode_windows(tokenizer, texts, pairs, text)]


def encode_windows(
    tokenizer: Tokenizer, texts: Sequence[str], pairs: Sequence[str] | None, text: TextSettings
) -> list[list[Encoding]]:
    """The encodings of each text, or of each pair: its windows if text.long is windows, else one.

    In a pair that is too long, text.truncation selects the text that is truncated or split into windows; with head_tail
    and windows the other text is truncated to half of the input.

    Args:
        tokenizer: of the model.
        texts: the texts, or the first texts of pairs.
        pairs: the second texts of pairs, or None.
        text: how texts are tokenized.

    Raises:
        ValueError: text.max_length has no space for a text after the special tokens.
    """
    size = text.max_length - tokenizer.num_special_tokens_to_add(pairs is not None)
    if size < 1:
        raise ValueError(
            f"text.max_length is {text.max_length}; expected more than the {text.max_length - size} special tokens of "
            f"a {'text' if pairs is None else 'pair'}"
        )
    if text.long in ("head", "tail"):
        strategy = text.truncation if pairs is not None else "longest_first"
        direction = "right" if text.long == "head" else "left"
        tokenizer.enable_truncation(text.max_length, strategy=strategy, direction=direction)
        try:
            if pairs is not None:  # how a pair is truncated depends on the lengths of both texts
                encodings = tokenizer.encode_batch(list(zip(texts, pairs, strict=True)))
            elif direction == "left":
                encodings = tokenizer.encode_batch(list(texts))
            else:
                encodings = encode_leading(tokenizer, texts, text.max_length, tokenizer.encode_batch, _has_overflow)
            return [[encoding] for encoding in encodings]
        finally:
            tokenizer.no_truncation()
    firsts = _unprocessed(tokenizer, texts)
    if pairs is None:
        return [[tokenizer.post_process(part) for part in _truncate(first, size, text)] for first in firsts]
    seconds = _unprocessed(tokenizer, pairs)
    return [_pair(tokenizer, first, second, size, text) for first, second in zip(firsts, seconds, strict=True)]


def is_truncated(windows: Sequence[Encoding]) -> bool:
    """Whether tokens of a text, or of a pair, are in none of its encodings, which `encode_windows` returned."""
    return _has_overflow(windows[-1])


def _has_overflow(encoding: Encoding) -> bool:
    return len(encoding.overflowing) > 0


def _unprocessed(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Encoding]:
    """Encode without `post_process`, which adds special tokens and, for RoBERTa, removes spaces from the offsets."""
    processor = tokenizer.post_processor
    tokenizer.post_processor = None
    try:
        return tokenizer.encode_batch(list(texts))
    finally:
        tokenizer.post_processor = processor


def _pair(tokenizer: Tokenizer, first: Encoding, second: Encoding, size: int, text: TextSettings) -> list[Encoding]:
    if len(first) + len(second) <= size:
        return [tokenizer.post_process(first, second)]
    cut_first = text.truncation == "only_first" or (text.truncation == "longest_first" and len(first) >= len(second))
    long, other = (first, second) if cut_first else (second, first)
    # The other text may be the longer one: it gets half of the input, or what the first leaves.
    other.truncate(max(min(len(other), size // 2), size - len(long)))
    parts = _truncate(long, size - len(other), text)
    return [tokenizer.post_process(part, other) if cut_first else tokenizer.post_process(other, part) for part in parts]


def _truncate(encoding: Encoding, size: int, text: TextSettings) -> list[Encoding]:
    """Windows of `size` tokens, or one encoding of head and tail (Sun et al., 2019: 128 and 382 of 510 tokens)."""
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
