"""Texts and tokenizers as arguments: what is accepted, and the error that names what is not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def text_windows(texts: Any, size: int) -> Iterator[list[str]]:
    """The texts, `size` at a time.

    Args:
        texts: a sequence of str, an iterator, a pandas Series, or a NumPy or Arrow array of one dimension.

    Raises:
        TypeError: `texts` is none of these, or an element is no str that UTF-8 can represent; the message has its
            index.
    """
    for start, window in enumerate(_windows(as_iterable(texts), size)):
        check_texts(window, start * size)
        yield window


def check_texts(texts: Sequence[Any], first: int = 0, *, name: str = "texts") -> None:
    """TypeError unless every element is a str that UTF-8 can represent; `first` is the index of the first one."""
    for index, text in enumerate(texts, first):
        if not isinstance(text, str):
            hint = ": decode it" if isinstance(text, bytes) else ""
            hint = ": pairs can't be embedded as one text" if isinstance(text, (list, tuple)) else hint
            raise TypeError(f"{name}[{index}] is {_describe(text)}; expected a str{hint}")
        check_text(text, f"{name}[{index}]")


def check_text(text: Any, name: str) -> None:
    """TypeError unless `text` is a str that UTF-8 can represent."""
    if not isinstance(text, str):
        raise TypeError(f"{name} is {_describe(text)}; expected a str")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            code = ord(text[error.start])
            raise TypeError(
                f"{name} has the lone surrogate U+{code:04X} at position {error.start}; expected text that UTF-8 can "
                "represent"
            ) from None


def as_tokenizer(tokenizer: Any) -> Tokenizer:
    """The `tokenizers.Tokenizer` in `tokenizer`: itself, or the backend of transformers' fast tokenizer.

    A backend that pads or truncates, as the last call of transformers' tokenizer left it, is copied without.

    Raises:
        TypeError: it is another object, such as transformers' slow tokenizer.
        ValueError: a `tokenizers.Tokenizer` pads or truncates.
    """
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        if backend.padding is None and backend.truncation is None:
            return backend
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_padding()
        copy.no_truncation()
        return copy
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"tokenizer is of type {type(tokenizer).__name__}; expected what bert_fast.data.load_tokenizer returns, or "
            "transformers' fast tokenizer"
        )
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise ValueError("the tokenizer pads or truncates; call its no_padding() and no_truncation(), use max_seqlen")
    return tokenizer


def lowercased(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer` with texts in lower case before its own normalization: sentence-transformers' do_lower_case."""
    from tokenizers.normalizers import Lowercase, Sequence

    own = tokenizer.normalizer
    state = {} if own is None else json.loads(own.__getstate__())
    if any(part["type"] == "Lowercase" for part in (state, *state.get("normalizers", ())) if part):
        return tokenizer
    tokenizer.normalizer = Lowercase() if own is None else Sequence([Lowercase(), own])
    return tokenizer


@dataclass(frozen=True)
class Truncation:
    """Truncates token ids. The tokenizer's own truncation is a state of the tokenizer, which threads share.

    Attributes:
        longest: the maximum number of tokens.
        leading, trailing: the number of special tokens that the tokenizer puts before and after a text; they are kept.
        keep: head, tail, or head_tail: a quarter from the head, the rest from the tail.
    """

    longest: int
    leading: int
    trailing: int
    keep: str = "head"

    @classmethod
    def of(cls, tokenizer: Tokenizer, longest: int, keep: str = "head") -> Truncation:
        mask = tokenizer.encode("a").special_tokens_mask
        if 0 not in mask:
            return cls(longest, 1, 1, keep)
        return cls(longest, mask.index(0), mask[::-1].index(0), keep)

    def __call__(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.longest:
            return ids
        end = len(ids) - self.trailing
        if self.keep == "head":
            return ids[: self.longest - self.trailing] + ids[end:]
        size = self.longest - self.leading - self.trailing
        head = size // 4 if self.keep == "head_tail" else 0
        return ids[: self.leading + head] + ids[end - (size - head) :]

    def prompt_length(self, tokenizer: Tokenizer, prompt: str) -> int:
        """The number of tokens of a prompt alone, with the special tokens before it."""
        return len(self(tokenizer.encode(prompt).ids)) - self.trailing


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the block; afterwards, also after an exception, every module has its own mode again.

    Threads can share a model that is in eval mode already.
    """
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_integer_argument(name: str, value: Any, low: int, high: int | None = None, what: str = "") -> None:
    """TypeError unless `value` is an int, ValueError unless it is in [low, high]."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{name} is {_describe(value)}; expected an int")
    if value < low or (high is not None and value > high):
        expected = f"{low} or more" if high is None else f"{low} to {high}{what}"
        raise ValueError(f"{name} is {value}; expected {expected}")


def as_iterable(texts: Any) -> Iterable[Any]:
    """`texts`, or the list of its values. TypeError where it is not what `text_windows` takes."""
    if isinstance(texts, (str, bytes, Mapping, Set)) or texts is None:
        raise TypeError(f"texts is {_describe(texts)}; expected a sequence of str")
    if hasattr(texts, "columns") or getattr(texts, "ndim", 1) != 1:
        raise TypeError(f"texts is of type {type(texts).__name__}; expected one column of it, or a sequence of str")
    for method in ("tolist", "to_pylist"):  # Series, NumPy and Arrow arrays, whose elements are no str
        if not isinstance(texts, Sequence) and hasattr(texts, method):
            listed: list[Any] = getattr(texts, method)()
            return listed
    if not isinstance(texts, Iterable) and not (hasattr(texts, "__getitem__") and hasattr(texts, "__len__")):
        raise TypeError(f"texts is {_describe(texts)}; expected a sequence of str")
    return texts


def _windows(texts: Iterable[Any], size: int) -> Iterator[list[Any]]:
    if isinstance(texts, Sequence):
        for start in range(0, len(texts), size):
            yield list(texts[start : start + size])
        return
    iterator = iter(texts)
    while window := list(islice(iterator, size)):
        yield window


def _describe(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, bytes, int, float, type(None))) else ""
    return text if 0 < len(text) <= 40 else f"of type {type(value).__name__}"
