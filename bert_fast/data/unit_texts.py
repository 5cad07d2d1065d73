"""Which sentences and documents of a split have equal texts, by 64-bit hashes of their tokens."""

from __future__ import annotations

import numpy as np

from bert_fast.data.host_numpy import Array
from bert_fast.data.shards import TokenStore

_CHUNK = 2**20  # tokens hashed at a time
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def unit_texts(store: TokenStore, unit_ends: Array, document_units: Array, *, pairs: bool) -> tuple[Array, Array]:
    """The hashes that `host_numpy.plan` compares; zeros if they are not needed.

    The hash of a unit is that of the sentence it is in and of its position there: a sentence that one document cuts and
    another does not begins with the same text.

    Args:
        store: the split.
        unit_ends, document_units: as in `host_numpy.plan`.
        pairs: whether examples are pairs.

    Returns:
        uint64 (U,), one for each unit, and uint64 (documents,).
    """
    if not pairs:
        return np.zeros(unit_ends.size, dtype=np.uint64), np.zeros(document_units.size - 1, dtype=np.uint64)
    ends, sentences = store.sentence_ends, store.document_sentences
    hashes = _sentence_hashes(store)
    starts = np.concatenate([[0], unit_ends[:-1]])
    sentence = np.searchsorted(ends, starts, side="right")
    offset = starts - np.concatenate([[0], ends[:-1]])[sentence]
    number = (np.arange(ends.size) - np.repeat(sentences[:-1], np.diff(sentences))).astype(np.uint64)
    documents = np.add.reduceat(_mixed(hashes ^ _mixed(number)), sentences[:-1])
    return _mixed(hashes[sentence] ^ _mixed(offset.astype(np.uint64))), documents


def _sentence_hashes(store: TokenStore) -> Array:
    """A hash of the tokens of each sentence, uint64: the sum of the hashes of (token, position)."""
    ends = store.sentence_ends
    starts = np.concatenate([[0], ends[:-1]])
    sums = np.zeros(ends.size, dtype=np.uint64)
    position = 0
    for part in store.parts:
        for begin in range(0, part.size, _CHUNK):
            tokens = part[begin : begin + _CHUNK]
            first, last = np.searchsorted(ends, [position, position + tokens.size - 1], side="right")
            places = np.maximum(starts[first : last + 1] - position, 0)
            offsets = np.arange(position, position + tokens.size) - np.repeat(
                starts[first : last + 1], np.diff(np.append(places, tokens.size))
            )
            values = _mixed(tokens.astype(np.uint64) ^ (offsets.astype(np.uint64) << np.uint64(32)))
            sums[first : last + 1] += np.add.reduceat(values, places)
            position += tokens.size
    return sums


def _mixed(values: Array) -> Array:
    """A bijection of 64 bits in which each bit of the result depends on all bits (the finalizer of splitmix64)."""
    values = (values + _MULTIPLIER).astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
