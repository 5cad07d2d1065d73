"""Tokenises documents, and marks words that `##` pieces don't show.

A token of a shard is its id, with bit 30 set if it continues the word of the token before it: the characters of a
Chinese word, or the pieces of a word of segmented text. `##` pieces are not marked, the vocabulary shows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast.data.cleaning import Document
from bert_fast.data.host_numpy import CONTINUES, Array
from bert_fast.data.vocab import LONGEST, load_wordpiece, sentence_parts

_SENTENCES_PER_BATCH = 4096
_CHARACTERS_PER_BATCH = 2**20  # an encoding takes about 100 bytes a character
_LONGEST = LONGEST


class Encoder:
    """Tokenises documents.

    Args:
        tokenizer: path of the tokenizer.json.
        words: `pieces`, `spaces` or `rjieba`, see `PrepareConfig`.

    Attributes:
        unknown: number of [UNK] tokens so far.

    Raises:
        ImportError: `words` is `rjieba`, and rjieba is not installed.
    """

    def __init__(self, tokenizer: Path, words: str) -> None:
        self._tokenizer = load_wordpiece(tokenizer)
        self._tokenizer.encode_special_tokens = True  # "[SEP]" in a text is not a separator
        self._unknown = self._tokenizer.token_to_id("[UNK]")
        self._words = words
        self._cut: Any = None
        if words == "rjieba":
            import rjieba

            self._cut = rjieba.cut
        self.unknown = 0

    def encode(self, documents: Iterable[Document]) -> Iterator[tuple[Array, Array]]:
        """For each document the tokens, int32 (T,), and the position after each sentence, int32 (sentences,)."""
        documents = list(documents)
        encoded = self._sentences(sentence for document in documents for sentence in document)
        for document in documents:
            # A sentence of white space and control characters has no tokens.
            tokens = [ids for ids in islice(encoded, len(document)) if ids.size]
            ends = np.cumsum([ids.size for ids in tokens], dtype=np.int32)
            yield np.concatenate([np.empty(0, dtype=np.int32), *tokens]), ends

    def _sentences(self, sentences: Iterable[str]) -> Iterator[Array]:
        for batch in _batches(sentences):
            encoded = self._long(batch[0]) if len(batch[0]) > _LONGEST else self._ids(batch)
            for sentence, (tokens, starts) in zip(batch, encoded, strict=True):
                self.unknown += int(np.count_nonzero(tokens == self._unknown))
                if self._words != "pieces" and tokens.size > 1:
                    word = self._word_numbers(sentence)[starts]
                    tokens[1:][word[1:] == word[:-1]] |= CONTINUES
                yield tokens

    def _ids(self, texts: list[str]) -> list[tuple[Array, Array]]:
        """The ids of each text, int32 (T,), and, if words are needed, the first character of each token, int64 (T,)."""
        if self._words == "pieces":  # encode_batch_fast computes no offsets
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            return [(np.array(one.ids, dtype=np.int32), np.empty(0, dtype=np.int64)) for one in encodings]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        starts = ([start for start, _ in one.offsets] for one in encodings)
        return [
            (np.array(one.ids, dtype=np.int32), np.array(first, dtype=np.int64))
            for one, first in zip(encodings, starts, strict=True)
        ]

    def _long(self, sentence: str) -> list[tuple[Array, Array]]:
        ids, starts = [], []
        for begin, text in sentence_parts(sentence, _LONGEST):
            ((part, first),) = self._ids([text])
            ids.append(part)
            starts.append(first + begin)
        return [(np.concatenate(ids), np.concatenate(starts))]

    def _word_numbers(self, sentence: str) -> Array:
        """The index of the word of each character, int64 (characters,)."""
        if self._words == "spaces":
            return np.cumsum([character == " " for character in sentence])
        lengths = [len(word) for word in self._cut(sentence)]
        return np.repeat(np.arange(len(lengths)), lengths)


def _batches(sentences: Iterable[str]) -> Iterator[list[str]]:
    """Batches of bounded memory; a sentence of more than `_LONGEST` characters is one by itself."""
    batch: list[str] = []
    characters = 0
    for sentence in sentences:
        size = len(sentence)
        if batch and (
            len(batch) == _SENTENCES_PER_BATCH or characters + size > _CHARACTERS_PER_BATCH or size > _LONGEST
        ):
            yield batch
            batch, characters = [], 0
        batch.append(sentence)
        characters += size
        if size > _LONGEST:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
