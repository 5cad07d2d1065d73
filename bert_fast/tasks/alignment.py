"""Between words, characters and the tokenizer's pieces.

A piece is one input token of the model. Positions in a text are characters of the Python string as it was given: what
the tokenizer drops or changes (accents, zero-width and control characters, capitals) moves no offset. Ranges are
(first, end), the end excluded.
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
    """The pieces of one text, or of one list of words, without special tokens.

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


@dataclass(frozen=True)
class Frame:
    """The special tokens of an input of one or two texts: [CLS] a [SEP] b [SEP], <s> a </s></s> b </s> ...

    Attributes:
        runs: (id, token type) of the special tokens before the first text, after it, and after the second.
        text_types: the token type of each text.
    """

    runs: tuple[tuple[tuple[int, int], ...], ...]
    text_types: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return sum(map(len, self.runs))

    def around(self, *texts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """Token ids and token types of the whole input, and where each text starts in it."""
        ids, types = map(list, zip(*self.runs[0], strict=True))
        starts = []
        for text, kind, run in zip(texts, self.text_types, self.runs[1:], strict=True):
            starts.append(len(ids))
            ids += [*text, *(number for number, _ in run)]
            types += [*[kind] * len(text), *(own for _, own in run)]
        return ids, types, starts


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


def frame_of(tokenizer: Tokenizer, texts: int) -> Frame:
    """What `tokenizer` puts around one text, or around and between two."""
    cls = tokenizer.encode("").tokens[0]
    # The name of a special token is one piece, whatever the vocabulary.
    first, second = (tokenizer.encode(cls, add_special_tokens=False) for _ in range(2))
    found = tokenizer.post_process(first, second if texts == 2 else None)
    runs: list[list[tuple[int, int]]] = [[]]
    text_types = []
    for number, kind, special in zip(found.ids, found.type_ids, found.special_tokens_mask, strict=True):
        if special:
            runs[-1].append((number, kind))
        else:
            runs.append([])
            text_types.append(kind)
    return Frame(tuple(map(tuple, runs)), tuple(text_types))


def text_pieces(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Pieces]:
    """The pieces of each text. Spaces that a piece starts with are not among its characters."""
    found = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [_pieces(encoding, text) for encoding, text in zip(found, texts, strict=True)]


def word_pieces(tokenizer: Tokenizer, sentences: Sequence[Sequence[str]]) -> list[Pieces]:
    """The pieces of each list of words. A word of dropped characters only, or an empty one, has no piece.

    Byte-level BPE has the space before a word in its first piece: here every word counts as one after a space, as in
    transformers with is_split_into_words and add_prefix_space.
    """
    words = [list(sentence) for sentence in sentences]
    found = _after_spaces(tokenizer).encode_batch(words, is_pretokenized=True, add_special_tokens=False)
    return [_pieces(encoding) for encoding in found]


def _after_spaces(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer` itself, or, of byte-level BPE, one that puts a space before each text."""
    settings = json.loads(tokenizer.to_str())
    first = settings["pre_tokenizer"] or {}
    parts = [first, *first.get("pretokenizers", [])]
    changed = [part for part in parts if part.get("type") == "ByteLevel" and not part["add_prefix_space"]]
    for part in changed:
        part["add_prefix_space"] = True
    return type(tokenizer).from_str(json.dumps(settings)) if changed else tokenizer


def _pieces(encoding: Encoding, text: str = "") -> Pieces:
    spans = list(encoding.offsets)
    for index, (start, end) in enumerate(spans if text else ()):
        while start < end and text[start].isspace():
            start += 1
        spans[index] = (start, end)
    return Pieces(list(encoding.ids), spans, [word for word in encoding.word_ids if word is not None])


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
    starts, stops = zip(*spans[first:end], strict=True)
    start, stop = min(starts), max(stops)
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
