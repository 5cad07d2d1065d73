"""BERT's WordPiece vocabulary: training and loading."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bert_fast.data.host_numpy import CONTINUATION, SPECIAL, Array
from bert_fast.data.tokenizer import count_ids
from bert_fast.data.tokenizer_classes import MAX_WORD, OF_MODEL, build_tokenizer
from bert_fast.data.tokenizer_files import TokenizerFiles

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST = 2**17  # characters; a longer sentence is tokenised in parts
_MAYBE_LONG = re.compile(rf"\S{{{MAX_WORD + 1}}}")

_logger = logging.getLogger("bert_fast")

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def train_vocab(
    sentences: Iterable[str],
    *,
    vocab_size: int = 8192,
    lowercase: bool = True,
    alphabet_size: int = 1000,
    show_progress: bool = False,
) -> Tokenizer:
    """Train a WordPiece vocabulary, deterministically.

    Words of more than 100 characters, which WordPiece turns into [UNK], are left out. A warning is logged if the
    vocabulary has fewer than `vocab_size` tokens.

    Args:
        sentences: the text; iterated over twice.
        vocab_size: maximum number of tokens, including the special ones, whose ids are 0 to 4.
        lowercase: lower-case the text and strip accents first, as bert-base-uncased does.
        alphabet_size: maximum number of characters; rarer ones become [UNK]. Chinese text has about 8000.
        show_progress: show the progress of the training on stderr.

    Returns:
        The tokenizer.

    Raises:
        ValueError: `vocab_size` is too small for the alphabet of the text.
    """
    from tokenizers import trainers

    tokenizer = _bert_tokenizer({token: i for i, token in enumerate(SPECIAL_TOKENS)}, lowercase)
    # Another tokenizer: the one that is trained is locked.
    sentences = _ShortWords(sentences, _bert_tokenizer({token: i for i, token in enumerate(SPECIAL_TOKENS)}, lowercase))
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(tokenizer.normalizer.normalize_str(sentence))
    counts = Counter({character: count for character, count in counts.items() if not character.isspace()})
    alphabet = sorted(sorted(counts, key=lambda character: (-counts[character], character))[:alphabet_size])
    # The trainer numbers characters in the order of a hash map, and breaks ties by number. Passed as special tokens,
    # they are numbered in the order passed, which makes training deterministic.
    # The normalizer puts spaces around a Chinese character, so it never continues a word.
    inner = [character for character in alphabet if " " not in tokenizer.normalizer.normalize_str(character)]
    letters = [*alphabet, *(f"##{character}" for character in inner)]
    if vocab_size < len(SPECIAL_TOKENS) + len(letters):
        raise ValueError(
            f"vocab_size is {vocab_size}; expected at least {len(SPECIAL_TOKENS) + len(letters)}: the text has "
            f"{len(alphabet)} different characters, {len(inner)} of them two tokens each (alone and after ##), and "
            f"{len(SPECIAL_TOKENS)} tokens are special"
        )
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *letters],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
        show_progress=show_progress,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        cause = f"of {len(counts)} different characters alphabet_size keeps {alphabet_size}; raise it"
        if len(counts) <= alphabet_size:
            cause = "the text has no more pieces to join; give more text"
        _logger.warning("the vocabulary has %d tokens, vocab_size is %d: %s", size, vocab_size, cause)
    return _bert_tokenizer(tokenizer.get_vocab(), lowercase)


def sentence_parts(sentence: str, longest: int = LONGEST) -> Iterator[tuple[int, str]]:
    """The start and text of each part of at most `longest` characters, cut at a space where there is one.

    WordPiece cuts words at spaces anyway, and a tokenizer takes about 100 bytes a character.
    """
    begin = 0
    while len(sentence) - begin > longest:
        space = sentence.rfind(" ", begin + 1, begin + longest)
        end = space if space > 0 else begin + longest
        yield begin, sentence[begin:end]
        begin = end
    yield begin, sentence[begin:]


class _ShortWords:
    """An iterable of sentences, cut if they are huge, without the words that are longer than WordPiece's limit."""

    def __init__(self, sentences: Iterable[str], tokenizer: Tokenizer) -> None:
        self.sentences, self.tokenizer = sentences, tokenizer

    def __iter__(self) -> Iterator[str]:
        for sentence in self.sentences:
            for _, text in sentence_parts(sentence):
                yield self._shortened(text) if _MAYBE_LONG.search(text) else text

    def _shortened(self, sentence: str) -> str:
        text = self.tokenizer.normalizer.normalize_str(sentence)
        words = self.tokenizer.pre_tokenizer.pre_tokenize_str(text)
        return " ".join(word for word, _ in words if len(word) <= MAX_WORD)


def load_wordpiece(path: str | Path) -> Tokenizer:
    """Load a BERT tokenizer from a folder, a `tokenizer.json` or a `vocab.txt`, as `load_tokenizer` does.

    Raises:
        ValueError: there is no such file, it can't be read, or it is not BERT's WordPiece.
    """
    files = TokenizerFiles.read(Path(path))
    if files.file.is_dir():
        raise ValueError(f"{path}: expected a tokenizer.json, a vocab.txt or a folder with one of them")
    tokenizer = files.tokenizer()
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "WordPiece" or model.get("continuing_subword_prefix") != "##":
        raise ValueError(
            f"{files.file}: a {model['type']} tokenizer; expected BERT's WordPiece with '##' continuations"
        )
    known = model["vocab"].keys() | {token.content for token in files.added}
    if missing := ", ".join(token for token in SPECIAL_TOKENS if token not in known):
        raise ValueError(f"{files.file}: the vocabulary has no {missing}; BERT needs {' '.join(SPECIAL_TOKENS)}")
    return tokenizer


def _bert_tokenizer(vocab: dict[str, int], lowercase: bool) -> Tokenizer:
    return build_tokenizer(OF_MODEL["bert"], vocab, {"do_lower_case": lowercase})


def is_lowercase(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer lower-cases text."""
    normalizer = json.loads(tokenizer.to_str())["normalizer"] or {}
    return bool(normalizer.get("lowercase") or normalizer.get("type") == "Lowercase")


def token_kinds(tokenizer: Tokenizer) -> Array:
    """`kinds` of `host_numpy.Masking`: whether each id is a `##` continuation or a special token, uint8 (V,)."""
    kinds = np.full(count_ids(tokenizer), SPECIAL, dtype=np.uint8)  # an id without a token is never predicted
    for token, number in tokenizer.get_vocab().items():
        kinds[number] = 0
        if token.startswith("##") and len(token) > 2:
            kinds[number] = CONTINUATION
        elif token in SPECIAL_TOKENS or token.startswith("[unused"):
            kinds[number] = SPECIAL
    for number, added in tokenizer.get_added_tokens_decoder().items():
        if added.special:
            kinds[number] = SPECIAL
    return kinds
