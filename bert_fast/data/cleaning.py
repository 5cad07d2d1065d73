"""Cleans the text of a row: a document, which is a list of sentences, or the reason why it is dropped."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable
from typing import NamedTuple

from bert_fast._text import split_lines

Document = list[str]  # sentences

# Why a document is dropped, in the order of the checks; `duplicate` and `no_tokens` are detected later.
REASONS = {
    "undecodable": "not UTF-8",
    "malformed": "a row that can't be read",
    "missing": "no text in the row",
    "damaged": "a file that can't be read to its end",
    "control_characters": "mostly control characters",
    "near_empty": "fewer characters than min_characters",
    "duplicate": "equal to an earlier document",
    "no_tokens": "no visible character",
}
UNREADABLE = ("undecodable", "malformed", "missing", "damaged")
# C0 and C1 but for tab, line breaks and separators that count as white space; the replacement character; private use.
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufffd\ue000-\uf8ff]")
_MAX_CONTROL = 0.1
_PARAGRAPH = re.compile(r"\n[^\S\n]*\n")


class Raw(NamedTuple):
    """A document as read from its source.

    Attributes:
        where: file and line, or row.
        value: a text, a list of sentences, or a list of sentences that are lists of words; None if it can't be read.
        problem: a key of `REASONS`, or "".
        detail: the problem in words.
    """

    where: str
    value: object
    problem: str = ""
    detail: str = ""


def split_sentences(text: str, language: str = "en") -> list[str]:
    """Split text into sentences with sentencex, and strip them.

    Raises:
        ImportError: sentencex is not installed.
    """
    import sentencex

    return [stripped for sentence in sentencex.segment(language, text) if (stripped := sentence.strip())]


def splitter(mode: str, language: str) -> Callable[[str], list[str]]:
    """A function that splits a text into sentences; `mode` is `lines`, `split` or `split_wrapped`, as in the config."""
    if mode == "lines":
        return split_lines
    if mode == "split":
        return lambda text: [part for line in split_lines(text) for part in split_sentences(line, language)]
    return lambda text: [
        part
        for paragraph in _PARAGRAPH.split(text)
        if not paragraph.isspace()
        for part in split_sentences(" ".join(paragraph.split()), language)
    ]


def is_text(value: object) -> bool:
    """Whether a row's value can be a document: a string, a list of strings, or a list of lists of strings."""
    if isinstance(value, str):
        return True
    if not isinstance(value, list):
        return False
    return all(isinstance(part, str) or (isinstance(part, list) and all_strings(part)) for part in value)


def all_strings(values: list[object]) -> bool:
    return all(isinstance(value, str) for value in values)


def clean(raw: Raw, split: Callable[[str], list[str]], min_characters: int) -> tuple[Document, Raw]:
    """The sentences of a document with normalised white space; if dropped, none, and `raw` with the problem."""
    if raw.problem:
        return [], raw
    value = raw.value
    if not is_text(value):
        kind = "null" if value is None else type(value).__name__
        return [], raw._replace(problem="missing", detail=f"the value is {kind}; expected text or a list of sentences")
    try:
        parts = split(value) if isinstance(value, str) else [_joined(part) for part in value]  # type: ignore[attr-defined]
        sentences = [sentence for part in parts if (sentence := " ".join(part.split()))]
        text = "".join(sentences)
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        return [], raw._replace(problem="undecodable", detail=f"not Unicode ({error.reason})")
    if (count := sum(1 for _ in _CONTROL.finditer(text))) > _MAX_CONTROL * len(text):
        return [], raw._replace(
            problem="control_characters", detail=f"{count} of {len(text)} characters are control characters"
        )
    if (visible := len(text) - text.count(" ")) < max(1, min_characters):
        return [], raw._replace(problem="near_empty", detail=f"{visible} characters")
    return sentences, raw


def _joined(sentence: str | list[str]) -> str:
    return sentence if isinstance(sentence, str) else " ".join("".join(word.split()) for word in sentence)


def digest(document: Document) -> int:
    """A 64-bit hash that does not depend on case, white space and Unicode form."""
    text = " ".join(document)
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    text = " ".join(text.casefold().split())
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
