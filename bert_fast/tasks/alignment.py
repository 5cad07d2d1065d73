"""Alignment of characters, words and the tokenizer's pieces.

A piece is one token of the model. Offsets are characters of the original Python string, whatever the tokenizer removes
or changes (accents, zero-width and control characters, case). Ranges are half-open.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

Span = tuple[int, int]
Label = TypeVar("Label")

# Ideographs, as in BERT's tokenizer, and kana: scripts written without spaces.
_CJK = (
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2FA1F),
)

# White space as in BERT's tokenizer, which removes control characters other than tab and line ends: no word ends there.
_WORD = re.compile(r"(?:\S|[\x0b\x0c\x1c-\x1f\x85])+")


@dataclass(frozen=True)
class Pieces:
    """The pieces of one text, or of one list of words, without special tokens.

    Attributes:
        ids: the token ids.
        spans: the character range of each piece in the text, or in its word. The pieces of a single decomposed
            character share its range.
        words: the index of the word of each piece.
    """

    ids: list[int]
    spans: list[Span]
    words: list[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of an input of one or two texts: [CLS] a [SEP] b [SEP], <s> a </s></s> b </s> ...

    Attributes:
        groups: (id, token type) of the special tokens before the first text, after it, and after the second.
        text_types: the token type of each text.
    """

    groups: tuple[tuple[tuple[int, int], ...], ...]
    text_types: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of special tokens."""
        return sum(map(len, self.groups))

    def wrap(self, *texts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """The token ids and token types of the input, and the start of each text in it."""
        ids, types = map(list, zip(*self.groups[0], strict=True))
        starts = []
        for text, text_type, group in zip(texts, self.text_types, self.groups[1:], strict=True):
            starts.append(len(ids))
            ids += [*text, *(token_id for token_id, _ in group)]
            types += [*[text_type] * len(text), *(token_type for _, token_type in group)]
        return ids, types, starts


class Window(NamedTuple):
    """The pieces [start, end) of one model input, which is used for the outputs of `core`.

    The cores of a text's windows partition its pieces: each piece is in the core of the window with most context.
    """

    start: int
    end: int
    core: Span


def is_cjk(character: str) -> bool:
    """Whether a character is an ideograph or kana, each of which is a word."""
    code = ord(character)
    return code >= 0x3040 and any(first <= code <= last for first, last in _CJK)


def special_tokens_of(tokenizer: Tokenizer, texts: int) -> SpecialTokens:
    """The special tokens that `tokenizer` adds to one text, or to two."""
    cls = tokenizer.encode("").tokens[0]
    # The name of a special token is one piece in every vocabulary.
    first, second = (tokenizer.encode(cls, add_special_tokens=False) for _ in range(2))
    encoding = tokenizer.post_process(first, second if texts == 2 else None)
    groups: list[list[tuple[int, int]]] = [[]]
    text_types = []
    for token_id, token_type, special in zip(
        encoding.ids, encoding.type_ids, encoding.special_tokens_mask, strict=True
    ):
        if special:
            groups[-1].append((token_id, token_type))
        else:
            groups.append([])
            text_types.append(token_type)
    return SpecialTokens(tuple(map(tuple, groups)), tuple(text_types))


def text_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Pieces]:
    """The pieces of each text; their character ranges exclude leading spaces."""
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [_pieces(encoding, text) for encoding, text in zip(encodings, texts, strict=True)]


def word_pieces(tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]) -> list[Pieces]:
    """The pieces of each list of words; an empty word, or one that the tokenizer removes, has none.

    Byte-level BPE includes the space before a word in its first piece: every word is tokenized as if a space preceded
    it, as by transformers with is_split_into_words and add_prefix_space.
    """
    words = [list(sentence) for sentence in sentences]
    encodings = _with_prefix_space(tokenizer).encode_batch(words, is_pretokenized=True, add_special_tokens=False)
    return [_pieces(encoding) for encoding in encodings]


def _with_prefix_space(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, or for byte-level BPE a copy that adds a space before each text."""
    settings = json.loads(tokenizer.to_str())
    pre_tokenizer = settings["pre_tokenizer"] or {}
    steps = [pre_tokenizer, *pre_tokenizer.get("pretokenizers", [])]
    byte_level = [step for step in steps if step.get("type") == "ByteLevel" and not step["add_prefix_space"]]
    for step in byte_level:
        step["add_prefix_space"] = True
    return type(tokenizer).from_str(json.dumps(settings)) if byte_level else tokenizer


def _pieces(encoding: Encoding, text: str = "") -> Pieces:
    spans = list(encoding.offsets)
    for index, (start, end) in enumerate(spans if text else ()):
        while start < end and text[start].isspace():
            start += 1
        spans[index] = (start, end)
    return Pieces(list(encoding.ids), spans, [word for word in encoding.word_ids if word is not None])


def split_words(text: str) -> list[Span]:
    """The words of a text: separated by white space, with every CJK character and its marks a word."""
    spans: list[Span] = []
    for match in _WORD.finditer(text):
        start = match.start()
        for index in range(start + 1, match.end()):
            after_cjk = is_cjk(text[start]) and not unicodedata.category(text[index]).startswith("M")
            if after_cjk or is_cjk(text[index]):
                spans.append((start, index))
                start = index
        spans.append((start, match.end()))
    return spans


def piece_range(spans: Sequence[Span], start: int, end: int) -> Span | None:
    """The range of pieces that overlap the characters [start, end); None if there is none.

    Args:
        spans: the character ranges of all pieces of a text, in order.
        start, end: the characters.
    """
    inside = [index for index, (first, last) in enumerate(spans) if first < end and last > start]
    return (inside[0], inside[-1] + 1) if inside else None


def character_range(text: str, spans: Sequence[Span], first: int, end: int) -> Span:
    """The characters of `text` that the pieces [first, end) cover.

    Marks that the tokenizer removed from the last letter (accents, variation selectors) are included.
    """
    starts, stops = zip(*spans[first:end], strict=True)
    start, stop = min(starts), max(stops)
    limit = spans[end][0] if end < len(spans) else len(text)
    while stop < limit and unicodedata.category(text[stop]).startswith("M"):
        stop += 1
    return start, stop


def piece_labels(
    words: Sequence[int], labels: Sequence[Label], ignored: Label, *, continuations: bool = False
) -> list[Label]:
    """Expand the labels of words to pieces: the first piece of a word gets its label, the others `ignored`.

    Args:
        words: `Pieces.words`.
        labels: one per word.
        ignored: the label of pieces without one.
        continuations: give every piece of a word its label.
    """
    return [
        labels[word] if continuations or not index or words[index - 1] != word else ignored
        for index, word in enumerate(words)
    ]


def first_pieces(words: Sequence[int], count: int) -> list[int | None]:
    """The index of the first piece of each of `count` words, None for words without pieces."""
    firsts: list[int | None] = [None] * count
    for index, word in enumerate(words):
        if firsts[word] is None:
            firsts[word] = index
    return firsts


def windows(length: int, size: int, overlap: int, words: Sequence[int] | None = None) -> list[Window]:
    """Split `length` pieces into windows of at most `size` that overlap by `overlap`; at least one window.

    Args:
        length: the number of pieces.
        size: maximum pieces of a window.
        overlap: pieces that a window shares with the previous one; transformers calls it the stride.
        words: `Pieces.words`. If set, no core starts inside a word that fits into the overlap, so that all pieces of
            such a word are in one core.

    Raises:
        ValueError: size is less than 1, or overlap is not in [0, size).
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(f"overlap is {overlap} for windows of {size} pieces; expected 0 <= overlap < size, size >= 1")
    starts = [0]
    while starts[-1] + size < length:
        starts.append(starts[-1] + size - overlap)
    # In the middle of an overlap, both windows have equal context.
    borders = [0]
    for start in starts[1:]:
        border, lowest = start + overlap // 2, max(start, borders[-1])
        borders.append(border if words is None else _word_start(words, border, lowest))
    ends = [*borders[1:], length]
    return [
        Window(start, min(start + size, length), core)
        for start, core in zip(starts, zip(borders, ends, strict=True), strict=True)
    ]


def _word_start(words: Sequence[int], border: int, lowest: int) -> int:
    """The start of the word at `border`; `border` itself if the word starts before `lowest`."""
    start = border
    while start > lowest and words[start - 1] == words[start]:
        start -= 1
    return border if start and words[start - 1] == words[start] else start
