"""The first tokens of long texts, for the cost of the text that they are made of.

A text can be cut where no rule of its tokenizer sees across: then the tokens of the part before the cut are the first
tokens of the whole text. Such places are between a visible character and a space or line break, and for tokenizers that
set CJK ideographs apart also between two of those. `cuts_of` says which of them hold for a tokenizer, from the types of
its components: one that isn't known here, or an added token with white space after a character,
may see across, and its texts are
tokenized whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

CHARACTERS = 8  # read of a text for each token that is wanted, at first
GROWTH = 4  # times as many, where those have too few tokens

# No combining mark, format character or letter that Unicode's grapheme clusters join with what follows (\w has
# U+0D4E and some of the blocks from U+11000 on): normalizers read clusters.
_VISIBLE = r"(?:(?<=[^\W\u0d4e\U00011000-\U00011fff])|(?<=[!-~\u3001\u3002\u300d\u300f\uff01-\uff5e]))"
_IDEOGRAPHS = "(?<=[\u4e00-\u9fff])(?=[\u4e00-\u9fff])"
# A place of each kind, and a text that has one: the tokenizer must split it there.
_KINDS = {"a b": f"(?= ){_VISIBLE}", "a\nb": f"(?=\n){_VISIBLE}", "\u4e00\u4e01": _IDEOGRAPHS}

# Components that change or split a text by single characters, by clusters, or by runs that end at white space.
_NORMALIZERS = {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "StripAccents", "Strip", "Precompiled"}
_PRE_TOKENIZERS = {
    *("BertPreTokenizer", "ByteLevel", "Digits", "Metaspace", "Punctuation", "Whitespace", "WhitespaceSplit"),
}
_SEVERAL_SPACES = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}


def encode_leading(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    count: int,
    encode: Callable[[list[str]], list[Encoding]],
    has_more: Callable[[Encoding], bool],
) -> list[Encoding]:
    """Encode texts, the long ones up to where they have more tokens than are wanted.

    Args:
        tokenizer: what `encode` uses.
        texts: of any length.
        count: the number of tokens that are wanted.
        encode: of a batch of texts.
        has_more: whether an encoding is of more tokens than are wanted.

    Returns:
        The encoding of each text, or of a part from its beginning that `has_more`. The tokens of the part are the
        first tokens of the text, without the special tokens after them.
    """
    limit = CHARACTERS * max(count, 1)
    parts = list(texts)
    places = cuts_of(tokenizer) if any(len(text) > limit for text in texts) else None
    if places is None:
        return encode(parts)
    cut = [index for index, text in enumerate(texts) if _shorten(parts, index, text, limit, places)]
    encodings = encode(parts)
    while cut := [index for index in cut if not has_more(encodings[index])]:
        limit *= GROWTH
        again = list(cut)
        cut = [index for index in again if _shorten(parts, index, texts[index], limit, places)]
        for index, encoding in zip(again, encode([parts[index] for index in again]), strict=True):
            encodings[index] = encoding
    return encodings


def _shorten(parts: list[str], index: int, text: str, limit: int, places: re.Pattern[str]) -> bool:
    """Set parts[index] to `text` up to its first place at or after `limit`; whether that is less than the text."""
    place = places.search(text, limit) if len(text) > limit else None
    parts[index] = text if place is None else text[: place.start()]
    return place is not None


def cuts_of(tokenizer: Tokenizer) -> re.Pattern[str] | None:
    """A pattern that matches, with no characters, where a text can be cut; None where nothing is known to be safe.

    The tokens of a text up to a match are the first tokens of the text.
    """
    normalizer, pre_tokenizer = tokenizer.normalizer, tokenizer.pre_tokenizer
    if pre_tokenizer is None or getattr(tokenizer.model, "dropout", None):
        return None
    if not all(map(_is_local_normalizer, _components(normalizer, "normalizers"))):
        return None
    if not all(part["type"] in _PRE_TOKENIZERS for part in _components(pre_tokenizer, "pretokenizers")):
        return None

    def normalized(text: str) -> str:
        return text if normalizer is None else str(normalizer.normalize_str(text))

    tokens = tokenizer.get_added_tokens_decoder().values()
    added = [normalized(token.content) if token.normalized else token.content for token in tokens]
    if any(re.search(r"\S\s", token) for token in added):
        return None
    kinds = [
        place
        for example, place in _KINDS.items()
        if len(pre_tokenizer.pre_tokenize_str(normalized(example))) > 1
        and not any(re.search(place, token) for token in added)
    ]
    return re.compile("|".join(kinds)) if kinds else None


def _components(component: Any, several: str) -> Iterator[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, or of each in a sequence."""
    if component is None:
        return
    pending = [json.loads(component.__getstate__())]
    while pending:
        settings = pending.pop()
        if settings["type"] == "Sequence":
            pending += settings[several]
        else:
            yield settings


def _is_local_normalizer(settings: dict[str, Any]) -> bool:
    if settings["type"] != "Replace":
        return settings["type"] in _NORMALIZERS
    pattern = settings["pattern"].get("String")
    return settings == _SEVERAL_SPACES or (pattern is not None and not re.search(r"\s", pattern))
