"""Between words, characters and the tokenizer's pieces.

A piece is one input token of the model. Positions in a text are characters of the Python string as it was given: what
the tokenizer drops or changes (accents, zero-width and control characters, capitals) moves no offset. Ranges are
(first, end), the end excluded.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Span = tuple[int, int]
Label = TypeVar("Label")

# Ideographs, as BERT's tokenizer tells them, and kana: scripts written without spaces.
_CJK = (
    (0x3040, 0x30FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x2FA1F),
)


# White space as BERT's tokenizer has it: control characters other than tab and line ends are dropped, and part nothing.
_WORD = re.compile(r"(?:\S|[\x0b\x0c\x1c-\x1f\x85])+")


@dataclass(frozen=True)
class Pieces:
    """The pieces of one text, or of one list of words, without [CLS] and [SEP].

    Attributes:
        ids: the token ids.
        spans: the characters each piece stands for; of the text, or of its own word. Pieces that one character
            decomposes into share its span.
        words: the number of the word that each piece belongs to.
    """

    ids: list[int]
    spans: list[Span]
    words: list[int]

    def __len__(self) -> int:
        return len(self.ids)


class Window(NamedTuple):
    """A run of pieces that goes into the model at once: pieces `start` to `end`, of which it answers for `core`.

    The cores of a text's windows lie end to end: each piece is in exactly one, that of the window which sees most
    around it.
    """

    start: int
    end: int
    core: Span


def is_cjk(character: str) -> bool:
    """Whether a character is an ideograph or kana, which count as words of their own."""
    code = ord(character)
    return code >= 0x3040 and any(first <= code <= last for first, last in _CJK)


def special_ids(tokenizer: Tokenizer) -> tuple[int, int]:
    """The ids of [CLS] and [SEP]."""
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    if cls is None or sep is None:
        raise ValueError("the tokenizer has no [CLS] or no [SEP]; expected BERT's")
    return cls, sep


def text_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Pieces]:
    """The pieces of each text."""
    return [_pieces(encoding) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def word_pieces(tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]) -> list[Pieces]:
    """The pieces of each list of words. A word of dropped characters only, or an empty one, has no piece."""
    found = tokenizer.encode_batch([list(words) for words in sentences], is_pretokenized=True, add_special_tokens=False)
    return [_pieces(encoding) for encoding in found]


def _pieces(encoding: object) -> Pieces:
    return Pieces(list(encoding.ids), list(encoding.offsets), list(encoding.word_ids))  # type: ignore[attr-defined]


def split_words(text: str) -> list[Span]:
    """The words of a text: between white space, and every CJK character, with its marks, on its own."""
    found: list[Span] = []
    for match in _WORD.finditer(text):
        start = match.start()
        for place in range(start + 1, match.end()):
            after_cjk = is_cjk(text[start]) and not unicodedata.category(text[place]).startswith("M")
            if after_cjk or is_cjk(text[place]):
                found.append((start, place))
                start = place
        found.append((start, match.end()))
    return found


def piece_range(spans: Sequence[Span], start: int, end: int) -> Span | None:
    """The pieces that stand for any of the characters `start` to `end`; None where there is none.

    Args:
        spans: of all pieces of a text, in the text's order.
    """
    inside = [index for index, (first, last) in enumerate(spans) if first < end and last > start]
    return (inside[0], inside[-1] + 1) if inside else None


def character_range(text: str, spans: Sequence[Span], first: int, end: int) -> Span:
    """The characters of `text` that the pieces `first` to `end` stand for.

    Marks that the tokenizer stripped off the last letter (accents, variation selectors) belong to it.
    """
    start = min(span[0] for span in spans[first:end])
    stop = max(span[1] for span in spans[first:end])
    limit = spans[end][0] if end < len(spans) else len(text)
    while stop < limit and unicodedata.category(text[stop]).startswith("M"):
        stop += 1
    return start, stop


def spread(
    words: Sequence[int], labels: Sequence[Label], ignored: Label, *, continuations: bool = False
) -> list[Label]:
    """The labels of words as labels of pieces: at a word's first piece, `ignored` at its others.

    Args:
        words: `Pieces.words`.
        labels: one a word.
        ignored: for pieces that take no part.
        continuations: label the other pieces of a word like its first.
    """
    return [
        labels[word] if continuations or not index or words[index - 1] != word else ignored
        for index, word in enumerate(words)
    ]


def first_pieces(words: Sequence[int], count: int) -> list[int | None]:
    """The first piece of each of `count` words, None for words without pieces; undoes `spread`."""
    found: list[int | None] = [None] * count
    for index, word in enumerate(words):
        if found[word] is None:
            found[word] = index
    return found


def windows(length: int, size: int, overlap: int, words: Sequence[int] | None = None) -> list[Window]:
    """Cut `length` pieces into windows of at most `size` that share `overlap` pieces; at least one window.

    Args:
        overlap: what a window repeats of the one before; transformers calls it the stride.
        words: `Pieces.words`; given, no core starts inside a word that fits into the overlap, so that the pieces of a
            word are answered for together.

    Raises:
        ValueError: no window of such a size and overlap gets ahead.
    """
    if size < 1 or not 0 <= overlap < size:
        raise ValueError(
            f"windows of {size} pieces can't overlap by {overlap}; expected at least 0 and less than the size"
        )
    starts = [0]
    while starts[-1] + size < length:
        starts.append(starts[-1] + size - overlap)
    # The middle of what two windows share is as far from the end of one as from the start of the other.
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
    """The start of the word that `border` is in; `border` where the word starts before `lowest`."""
    place = border
    while place > lowest and words[place - 1] == words[place]:
        place -= 1
    return border if place and words[place - 1] == words[place] else place
