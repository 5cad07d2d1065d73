"""Settings of labelled files, tokenization and augmentation, without importing torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bert_fast._config import check, convert_fields


@dataclass(frozen=True)
class FormatSettings:
    r"""How text files are read; what is None is detected, and printed where it is not what the suffix says.

    Args:
        delimiter: between the fields of .csv and .tsv files: one character, tab, or several without quoting.
        quote: the quotation mark of .csv and .tsv files; empty if quotation marks are ordinary characters.
        escape: the character before a quotation mark inside a quoted field; empty if it is doubled instead.
        encoding: of any text file, such as cp1252 or gb18030; by default UTF-8, or UTF-16 where the first bytes say so.
    """

    delimiter: str | None = None
    quote: str | None = None
    escape: str | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        convert_fields(self, "format.")
        if self.delimiter in ("tab", "\\t"):
            object.__setattr__(self, "delimiter", "\t")
        check(self.delimiter != "", "format.delimiter is empty; expected a character such as ';', or tab")
        for name, value in (("quote", self.quote), ("escape", self.escape)):
            check(len(value or "") <= 1, f"format.{name} is {value!r}; expected one character, or empty for none")
        if self.delimiter is not None:
            named = f"format.delimiter is {self.delimiter!r}"
            check(len(self.delimiter) == 1 or not (self.quote or self.escape), f"{named}; quoting needs one character")
            check(self.delimiter not in ("\n", "\r", self.quote, self.escape), f"{named}, a line end or the quote")
        if self.encoding is not None:
            try:
                "a".encode(self.encoding)
            except LookupError as error:
                raise ValueError(f"format.encoding is {self.encoding!r}; expected a codec of Python") from error


@dataclass(frozen=True)
class TextSettings:
    """How texts are tokenized.

    Args:
        max_length: maximum tokens of an example, including [CLS] and [SEP].
        truncation: of a pair that is too long: truncate the longer text, or always the first or the second.
        long: of a text that is too long, keep its head, its tail, or head_tail (a quarter from the head, the rest from
            the tail); or split it into windows, each a training example, whose logits are averaged in prediction
            (classification, multi-label and regression; token-classification and question-answering always use
            windows).
        overlap: tokens that a window shares with the previous one, at most half a window.
    """

    max_length: int = 128
    truncation: Literal["longest_first", "only_first", "only_second"] = "longest_first"
    long: Literal["head", "tail", "head_tail", "windows"] = "head"
    overlap: int = 32

    def __post_init__(self) -> None:
        convert_fields(self, "text.")
        if self.max_length < 4:
            raise ValueError(f"text.max_length is {self.max_length}; expected 4 or more: [CLS] a b [SEP]")
        if self.overlap < 0:
            raise ValueError(f"text.overlap is {self.overlap}; expected 0 or more")


@dataclass(frozen=True)
class AugmentSettings:
    """Augmentation of the training rows, anew in each epoch (Wei and Zou, "EDA", 2019); off by default.

    Words are separated by spaces; in mostly Chinese or Japanese texts each character is a word. Tasks whose targets
    depend on the words (token-classification, question-answering, multiple-choice) support only `mask`.

    Args:
        mask: share of the tokens replaced by [MASK].
        delete: share of the words deleted; at least one remains.
        duplicate: share of the words duplicated.
        swap: share of the words swapped with another.
        synonym: share of the words replaced by another word of their line in `synonyms`.
        synonyms: a file of synonyms, one group per line, separated by commas.
        rows: share of the rows augmented in each epoch.
    """

    mask: float = 0.0
    delete: float = 0.0
    duplicate: float = 0.0
    swap: float = 0.0
    synonym: float = 0.0
    synonyms: str | None = None
    rows: float = 1.0

    def __post_init__(self) -> None:
        convert_fields(self, "augment.")
        for name in ("mask", "delete", "duplicate", "swap", "synonym"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"augment.{name} is {getattr(self, name)}; expected a share in [0, 1)")
        if not 0 < self.rows <= 1:
            raise ValueError(f"augment.rows is {self.rows}; expected a share in (0, 1]")
        if bool(self.synonym) != (self.synonyms is not None):
            raise ValueError(
                f"augment.synonym is {self.synonym} and augment.synonyms is {self.synonyms}; set both or neither"
            )

    @property
    def of_words(self) -> bool:
        """Whether words are augmented, not only tokens."""
        return any((self.delete, self.duplicate, self.swap, self.synonym))

    @property
    def any(self) -> bool:
        """Whether augmentation is on."""
        return self.of_words or bool(self.mask)
