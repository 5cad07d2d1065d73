"""Planning, packing and masking in numpy: the definition of `bert_fast._host`, whose C++ gives the same bits.

All randomness is Philox4x32 with 10 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The
key is derived from (seed, epoch), the counter from what is decided, and every decision compares integers. So the
results depend neither on the implementation and the machine nor on the order of calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CONTINUATION, SPECIAL = 1, 2
CONTINUES = 2**30  # set in a token of a shard that continues the word of the token before it
IGNORE = -100
# The purpose of random bits: the last word of every counter, so that no two purposes share random bits.
KEY, PLAN, SHUFFLE, WORDS, REPLACE, SPANS = range(6)
_MASK32 = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


@dataclass(frozen=True)
class Masking:
    """The vocabulary and the settings of masking.

    Attributes:
        kinds: uint8 (V,), bits `CONTINUATION` (a `##` piece) and `SPECIAL`.
        replacements: int32 (R,), the ids of random replacements.
        cls_id, sep_id, mask_id: the ids of the special tokens.
        select_threshold: fraction of the tokens to predict, in units of 2^-32, at least 1.
        mask_threshold, random_threshold: a predicted token is replaced by [MASK] if its 32 random bits are below the
            first threshold, by a random token if below the second, and is kept otherwise.
        whole_words: whether the pieces of a word are masked together.
        span_thresholds: int64 (n,), non-decreasing, at most 2^32. If not empty, spans of 1 to n + 1 words are masked:
            one word, and another for each threshold that 32 random bits reach. See the function `span_thresholds`.
    """

    kinds: Array
    replacements: Array
    cls_id: int
    sep_id: int
    mask_id: int
    select_threshold: int
    mask_threshold: int
    random_threshold: int
    whole_words: bool
    span_thresholds: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))


def span_thresholds(longest: int, p: float) -> Array:
    """The thresholds of `Masking` for spans of geometric length, P(k) ~ p (1 - p)^(k - 1) for 1 <= k <= `longest`.

    Source: Joshi et al., "SpanBERT: Improving pre-training by representing and predicting spans", 2019, section 3.1:
    p = 0.2, at most 10 words, 3.8 on average.
    """
    shares = (1 - p) ** np.arange(1, longest)
    return np.round((1 - shares) / (1 - (1 - p) ** longest) * 2**32).astype(np.int64)


def philox(first: Any, second: Any, third: Any, purpose: int, key: Array) -> Array:
    """Philox4x32-10 of counters broadcast to a common shape: uint32 (*shape, 4).

    Args:
        first, second, third, purpose: the four words of the counter, integers below 2^32.
        key: uint32 (2,).
    """
    words = [np.asarray(word, dtype=np.uint64) for word in (first, second, third, purpose)]
    c0, c1, c2, c3 = np.broadcast_arrays(*words)
    k0, k1 = int(key[0]), int(key[1])
    for _ in range(10):
        low, high = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (high >> _SHIFT) ^ c1 ^ np.uint64(k0),
            high & _MASK32,
            (low >> _SHIFT) ^ c3 ^ np.uint64(k1),
            low & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)


def epoch_key(seed: int, epoch: int) -> Array:
    """The Philox key of one epoch, uint32 (2,): the hash of a 64-bit seed and a 64-bit epoch number."""
    seed, epoch = seed & (2**64 - 1), epoch & (2**64 - 1)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], dtype=np.uint32)
    return philox(epoch & 0xFFFFFFFF, epoch >> 32, 0, KEY, key)[:2].copy()


def shuffled(count: int, key: Array) -> Array:
    """A permutation of 0 .. count - 1, int64: the stable order of 64-bit random keys."""
    index = np.arange(count, dtype=np.uint64)
    words = philox(index & _MASK32, index >> _SHIFT, 0, SHUFFLE, key).astype(np.uint64)
    return np.argsort(words[:, 0] << _SHIFT | words[:, 1], kind="stable")


def _below(random: Array, count: Array | int) -> Array:
    """Map 32 random bits to 0 .. count - 1, int64."""
    return (random.astype(np.uint64) * np.asarray(count, dtype=np.uint64) >> _SHIFT).astype(np.int64)


def _checked(array: Array, name: str, dtype: type, size: int | None = None) -> Array:
    if array.dtype != dtype:
        raise ValueError(f"{name} has dtype {array.dtype}; expected {np.dtype(dtype)}")
    if array.ndim != 1:
        raise ValueError(f"{name} has {array.ndim} dimensions; expected 1")
    if not array.flags.c_contiguous:
        raise ValueError(f"{name} is not contiguous; pass numpy.ascontiguousarray({name})")
    if size is not None and array.size != size:
        raise ValueError(f"{name} has {array.size} elements; expected {size}")
    return array


def _check_units(ends: Array, documents: Array, max_tokens: int, short_threshold: int, pairs: bool) -> None:
    if not 2 <= max_tokens < 2**31:
        raise ValueError(f"max_tokens is {max_tokens}; expected 2 to 2^31 - 1")
    if not 0 <= short_threshold <= 2**32:
        raise ValueError(f"short_threshold is {short_threshold}; expected 0 to 2^32")
    if not (3 if pairs else 1) <= documents.size < 2**31:
        raise ValueError(f"document_units has {documents.size - 1} documents; sentence pairs need at least 2")
    if documents[0] != 0 or documents[-1] != ends.size:
        raise ValueError(f"document_units must start at 0 and end at the number of units, {ends.size}")
    if (invalid := np.flatnonzero(np.diff(documents) <= 0)).size:
        raise ValueError(f"document_units does not increase at element {invalid[0] + 1}")
    limit = max_tokens // 2 if pairs else max_tokens
    lengths = np.diff(ends, prepend=0)
    if (invalid := np.flatnonzero((lengths < 1) | (lengths > limit))).size:
        raise ValueError(
            f"unit_ends element {invalid[0]} makes a unit of {lengths[invalid[0]]} tokens; expected 1 to {limit}"
        )


def plan(
    unit_ends: Array,
    document_units: Array,
    unit_texts: Array,
    document_texts: Array,
    key: Array,
    max_tokens: int,
    short_threshold: int,
    pairs: bool,
) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """Cut documents into examples, each a range of tokens A and, for pairs, a range B.

    A *unit* is a sentence, or a part of a long one. Starting at the first unused unit, units are taken while they fit
    the target length, but at least two for pairs, if the document has them. The target is `max_tokens` or, with
    probability `short_threshold`, uniform in 2 .. `max_tokens`. A pair is split between two units at random. With
    probability 1/2 B is the second half; otherwise B consists of units from a random place in another document, of
    about the same length, and the second half is reused. A single remaining unit is paired with the unit before it. So
    every token of every document is in an A or in a true B.

    Documents of equal text count as one, and a random B never begins with the text that follows A: the next unit with
    another text is taken, in that document and then in the documents after it. If all others have that text alone, B is
    the true next.

    Args:
        unit_ends: int64 (U,), the position after each unit in the concatenation of all documents; a unit has 1 to
            `max_tokens` tokens, 1 to `max_tokens // 2` for pairs (so that any two fit).
        document_units: int64 (documents + 1,), the first unit of each document, then U.
        unit_texts: uint64 (U,), equal for units of equal text.
        document_texts: uint64 (documents,), equal for documents of equal text; for pairs at least two differ.
        key: uint32 (2,), see `epoch_key`.
        max_tokens: maximum number of tokens of A and B together.
        short_threshold: probability of a short target, in units of 2^-32.
        pairs: whether an example is a pair A, B, or A alone.

    Returns:
        a_start int64, a_length int32, b_start int64, b_length int32, label int8 (0 true next, 1 random, -100 no B),
        document int32, b_document int32 (-1 without B); each (examples,), in the order of the documents.

    Raises:
        ValueError: an argument is invalid; the message names it.
    """
    ends = _checked(unit_ends, "unit_ends", np.int64)
    documents = _checked(document_units, "document_units", np.int64)
    _checked(key, "key", np.uint32, 2)
    _checked(unit_texts, "unit_texts", np.uint64, ends.size)
    _checked(document_texts, "document_texts", np.uint64, max(documents.size - 1, 0))
    _check_units(ends, documents, max_tokens, short_threshold, pairs)
    if pairs and (document_texts == document_texts[0]).all():
        raise ValueError(f"the {document_texts.size} documents have equal texts; sentence pairs need 2 different ones")
    others = _Others(documents, unit_texts, document_texts)
    columns = []
    bounds = np.concatenate([[0], ends])  # unit u is the tokens bounds[u] .. bounds[u + 1]
    # Documents advance in lockstep: the random bits of the k-th example of a document depend on (document, k) alone.
    document = np.arange(documents.size - 1, dtype=np.int64)
    unit = documents[:-1].copy()
    step = 0
    while document.size:
        rows, unit = _plan_step(bounds, others, key, max_tokens, short_threshold, pairs, document, unit, step)
        columns.append(rows)
        unfinished = unit < documents[document + 1]
        document, unit, step = document[unfinished], unit[unfinished], step + 1
    table = [np.concatenate(column) for column in zip(*columns, strict=True)] if columns else [np.empty(0)] * 7
    order = np.argsort(table[5], kind="stable")
    types = (np.int64, np.int32, np.int64, np.int32, np.int8, np.int32, np.int32)
    return tuple(column[order].astype(dtype) for column, dtype in zip(table, types, strict=True))  # type: ignore[return-value]


class _Others:
    """Finds random texts for A that are not those of its own document.

    Attributes:
        documents, unit_texts, document_texts: as in `plan`.
        next_different: int64 (documents,), the next document, cyclically, with another text.
    """

    def __init__(self, documents: Array, unit_texts: Array, document_texts: Array) -> None:
        self.documents, self.unit_texts, self.document_texts = documents, unit_texts, document_texts
        count = document_texts.size
        # The ends of the runs of equal documents: the document after a run is the next different one.
        ends = np.flatnonzero(document_texts != np.roll(document_texts, -1))
        after = np.searchsorted(ends, np.arange(count))
        self.next_different = (ends[after % ends.size] + 1) % count if ends.size else np.arange(count)

    def document(self, document: Array, other: Array) -> Array:
        """`other`, or the next document whose text differs from that of `document`."""
        same = self.document_texts[other] == self.document_texts[document]
        return np.where(same, self.next_different[other], other)

    def unit(self, document: int, other: int, unit: int, text: int) -> tuple[int, int] | None:
        """The first unit from `unit` of document `other` whose text is not `text`, and its document; None if none."""
        first = other
        while True:
            begin, end = int(self.documents[other]), int(self.documents[other + 1])
            for place in (*range(unit, end), *range(begin, unit)):
                if self.unit_texts[place] != text:
                    return other, place
            other = (other + 1) % self.document_texts.size
            if self.document_texts[other] == self.document_texts[document]:
                other = int(self.next_different[other])
            if other == first:
                return None
            unit = int(self.documents[other])


def _plan_step(
    bounds: Array,
    others: _Others,
    key: Array,
    max_tokens: int,
    short_threshold: int,
    pairs: bool,
    document: Array,
    unit: Array,
    step: int,
) -> tuple[tuple[Array, ...], Array]:
    """The next example of each document, and the unit at which its following example starts."""
    ends, documents = bounds[1:], others.documents
    blocks = [philox((2 * step + i) & 0xFFFFFFFF, document, 0, PLAN, key) for i in (0, 1)]
    random = np.concatenate(blocks, axis=1)
    first, last = documents[document], documents[document + 1]
    target = np.where(random[:, 0] < short_threshold, 2 + _below(random[:, 1], max_tokens - 1), max_tokens)
    fit = np.searchsorted(ends, bounds[unit] + target, side="right")
    end = np.minimum(np.maximum(fit, unit + (2 if pairs else 1)), last)
    if not pairs:
        no_document = np.full(document.size, -1)
        zero = np.zeros(document.size, dtype=np.int64)
        return (bounds[unit], bounds[end] - bounds[unit], zero, zero, zero + IGNORE, document, no_document), end

    is_next = random[:, 2] >> np.uint32(31) == 0
    several = end - unit >= 2
    single = ~several & (unit > first)
    split = np.where(several, unit + 1 + _below(random[:, 3], np.maximum(end - unit - 1, 1)), end)
    b_target = np.where(several, bounds[end] - bounds[split], bounds[end] - bounds[unit])
    b_target = np.where(single & ~is_next, bounds[unit] - bounds[unit - 1], b_target)
    a_unit = np.where(single & is_next, unit - 1, unit)
    split = np.where(single & is_next, unit, split)
    a_start, a_length = bounds[a_unit], bounds[split] - bounds[a_unit]
    true_next = is_next & (split < end)

    other = _below(random[:, 4], documents.size - 2)
    other = others.document(document, other + (other >= document))
    other_unit = documents[other] + _below(random[:, 5], documents[other + 1] - documents[other])
    texts = others.unit_texts
    equal = (split < end) & (texts[other_unit] == texts[np.minimum(split, texts.size - 1)])
    for row in np.flatnonzero(equal & ~true_next).tolist():
        found = others.unit(int(document[row]), int(other[row]), int(other_unit[row]), texts[split[row]])
        true_next[row] = found is None
        other[row], other_unit[row] = found or (other[row], other_unit[row])
    b_capacity = max_tokens - a_length
    reach = np.searchsorted(ends, bounds[other_unit] + b_target, side="left") + 1
    fits = np.searchsorted(ends, bounds[other_unit] + b_capacity, side="right")
    other_end = np.minimum(np.minimum(reach, fits), documents[other + 1])
    other_length = np.where(other_end > other_unit, bounds[other_end] - bounds[other_unit], b_capacity)

    b_start = np.where(true_next, bounds[split], bounds[other_unit])
    b_length = np.where(true_next, bounds[end] - bounds[split], other_length)
    label = np.where(true_next, 0, 1)
    b_document = np.where(true_next, document, other)
    return (a_start, a_length, b_start, b_length, label, document, b_document), np.where(true_next, end, split)


def pack(lengths: Array, token_budget: int) -> Array:
    """Cut a sequence of examples into batches of consecutive examples, each filled up to the token budget.

    Args:
        lengths: int32 (n,), number of tokens of each example, from 1 to `token_budget`.
        token_budget: maximum number of tokens of a batch.

    Returns:
        int64 (batches + 1,), the first example of each batch, then n; (1,) if n is 0.

    Raises:
        ValueError: a length is outside 1 .. `token_budget`.
    """
    _checked(lengths, "lengths", np.int32)
    if (invalid := np.flatnonzero((lengths < 1) | (lengths > token_budget))).size:
        raise ValueError(
            f"lengths element {invalid[0]} is {lengths[invalid[0]]}; expected 1 to the token budget, {token_budget}"
        )
    total = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    starts = [0]
    while starts[-1] < lengths.size:
        starts.append(int(np.searchsorted(total, total[starts[-1]] + token_budget, side="right")) - 1)
    return np.array(starts, dtype=np.int64)


def build_batch(
    tokens: Array, a_lengths: Array, b_lengths: Array, indices: Array, key: Array, masking: Masking
) -> tuple[Array, Array, Array, Array, Array, int]:
    """Assemble, mask and concatenate examples: [CLS] A [SEP] B [SEP], or [CLS] A [SEP] if B is empty.

    Of the n non-special tokens of an example, max(1, round(`select_threshold` n / 2^32)) are predicted: words are
    visited in random order and selected if they fit this budget. If no word fits, a shortest one is selected. With
    spans, the words after a selected word are selected as well, up to a random length, while they fit; the tokens of a
    span are all replaced by [MASK], all by random tokens, or all kept.

    Args:
        tokens: int32 (n,), the texts A, B of the first example, of the second, ...: ids, with `CONTINUES` set in a
            token that continues a word without being a `##` piece.
        a_lengths, b_lengths: int32 (B,), lengths of A, at least 1, and of B, with the sum n.
        indices: int64 (B,), the indices of the examples in the epoch; with `key` they determine the random bits.
        key: uint32 (2,), see `epoch_key`.
        masking: vocabulary and settings.

    Returns:
        input_ids, token_type_ids, position_ids int64 (T,), cu_seqlens int32 (B + 1,), labels int64 (T,) with -100 for
        tokens that are not predicted, and the length of the longest example.

    Raises:
        ValueError: an argument is invalid; the message names it.

    Source: Devlin et al., "BERT: Pre-training of deep bidirectional transformers", 2019, section 3.1.
    """
    max_seqlen = _check_batch(tokens, a_lengths, b_lengths, indices, key, masking)
    examples = []
    begin = 0
    for a_length, b_length, index in zip(a_lengths.tolist(), b_lengths.tolist(), indices.tolist(), strict=True):
        text = tokens[begin : begin + a_length + b_length]
        examples.append(_example(text, a_length, b_length, index & (2**64 - 1), key, masking))
        begin += a_length + b_length
    cu_seqlens = np.zeros(a_lengths.size + 1, dtype=np.int32)
    np.cumsum([ids.size for ids, *_ in examples], out=cu_seqlens[1:])
    columns = zip(*examples, strict=True) if examples else [[np.empty(0, dtype=np.int64)]] * 4
    input_ids, types, positions, labels = (np.concatenate(column) for column in columns)
    return input_ids, types, positions, cu_seqlens, labels, max_seqlen


def _check_batch(
    tokens: Array, a_lengths: Array, b_lengths: Array, indices: Array, key: Array, masking: Masking
) -> int:
    _checked(tokens, "tokens", np.int32)
    _checked(a_lengths, "a_lengths", np.int32)
    _checked(b_lengths, "b_lengths", np.int32, a_lengths.size)
    _checked(indices, "indices", np.int64, a_lengths.size)
    _checked(key, "key", np.uint32, 2)
    _check_masking(masking)
    for i in np.flatnonzero((a_lengths < 1) | (b_lengths < 0))[:1]:
        raise ValueError(
            f"example {i} has lengths ({a_lengths[i]}, {b_lengths[i]}); "
            "expected A of 1 or more and B of 0 or more tokens"
        )
    lengths = a_lengths.astype(np.int64) + b_lengths
    if lengths.sum() != tokens.size:
        raise ValueError(
            f"a_lengths and b_lengths add up to {lengths.sum()}; expected the {tokens.size} elements of tokens"
        )
    vocab = masking.kinds.size
    ids = np.where(tokens < 0, tokens, tokens & ~CONTINUES)
    for i in np.flatnonzero((ids < 0) | (ids >= vocab))[:1]:
        raise ValueError(f"tokens element {i} is id {ids[i]}; expected 0 to {vocab - 1} as in masking.kinds")
    with_special = lengths + np.where(b_lengths > 0, 3, 2)
    if with_special.sum() >= 2**31:
        raise ValueError(f"the batch has {with_special.sum()} tokens; expected less than 2^31")
    return int(with_special.max(initial=0))


def _check_masking(masking: Masking) -> None:
    vocab = _checked(masking.kinds, "masking.kinds", np.uint8).size
    replacements = _checked(masking.replacements, "masking.replacements", np.int32)
    if replacements.size == 0:
        raise ValueError("masking.replacements is empty; expected the ids of random replacements")
    for token in replacements[(replacements < 0) | (replacements >= vocab)][:1]:
        raise ValueError(f"masking.replacements has id {token}; expected 0 to {vocab - 1}")
    ranges = [(name, 0, vocab - 1) for name in ("cls_id", "sep_id", "mask_id")]
    ranges += [("select_threshold", 1, 2**32), ("mask_threshold", 0, 2**32)]
    ranges += [("random_threshold", masking.mask_threshold, 2**32)]
    spans = _checked(masking.span_thresholds, "masking.span_thresholds", np.int64)
    for i in np.flatnonzero((np.diff(spans, prepend=0) < 0) | (spans > 2**32))[:1]:
        raise ValueError(
            f"masking.span_thresholds element {i} is {spans[i]}; expected 0 to 4294967296 in non-decreasing order"
        )
    for name, low, high in ranges:
        if not low <= getattr(masking, name) <= high:
            raise ValueError(f"masking.{name} is {getattr(masking, name)}; expected {low} to {high}")


def _example(
    text: Array, a_length: int, b_length: int, index: int, key: Array, masking: Masking
) -> tuple[Array, Array, Array, Array]:
    cls, sep = np.array([masking.cls_id]), np.array([masking.sep_id])
    parts = [cls, text[:a_length], sep] + ([text[a_length:], sep] if b_length else [])
    marked = np.concatenate(parts).astype(np.int64)
    ids = marked & ~CONTINUES
    types = np.zeros(ids.size, dtype=np.int64)
    types[a_length + 2 :] = 1
    labels = np.full(ids.size, IGNORE, dtype=np.int64)
    is_text = np.ones(ids.size, dtype=bool)
    is_text[[0, a_length + 1, -1]] = False
    kinds = masking.kinds[ids] | (marked & CONTINUES != 0) * np.uint8(CONTINUATION)
    targets, begins = _select(kinds, is_text, index, key, masking)
    labels[targets] = ids[targets]
    random = philox(targets, index & 0xFFFFFFFF, index >> 32, REPLACE, key)
    if masking.span_thresholds.size:
        random[:, 0] = philox(begins, index & 0xFFFFFFFF, index >> 32, REPLACE, key)[:, 0]
    replaced = masking.replacements[_below(random[:, 1], masking.replacements.size)]
    ids[targets] = np.where(
        random[:, 0] < masking.mask_threshold,
        masking.mask_id,
        np.where(random[:, 0] < masking.random_threshold, replaced, ids[targets]),
    )
    return ids, types, np.arange(ids.size, dtype=np.int64), labels


def _select(kinds: Array, is_text: Array, index: int, key: Array, masking: Masking) -> tuple[Array, Array]:
    """The positions to predict, and the position at which the span of each begins, int64."""
    candidate = is_text & (kinds & SPECIAL == 0)
    begins = candidate.copy()
    if masking.whole_words:
        begins[1:] &= ~(candidate[:-1] & (kinds[1:] & CONTINUATION != 0))
    starts = np.flatnonzero(begins)
    if starts.size == 0:
        return starts, starts
    lengths = np.bincount(np.cumsum(begins)[candidate] - 1, minlength=starts.size)
    blocks, low, high = np.arange((starts.size + 3) // 4), index & 0xFFFFFFFF, index >> 32
    order = np.argsort(philox(blocks, low, high, WORDS, key).reshape(-1)[: starts.size], kind="stable")
    span_words = np.ones(starts.size, dtype=np.int64)
    if masking.span_thresholds.size:
        random = philox(blocks, low, high, SPANS, key).reshape(-1)[: starts.size]
        span_words += np.searchsorted(masking.span_thresholds, random.astype(np.int64), side="right")
    budget = max(1, (int(candidate.sum()) * masking.select_threshold + 2**31) >> 32)
    span_of: dict[int, int] = {}  # selected word: first word of its span
    for first in order.tolist():
        if first in span_of or lengths[first] > budget:
            continue
        for word in range(first, min(first + int(span_words[first]), starts.size)):
            adjacent = word == first or starts[word] == starts[word - 1] + lengths[word - 1]
            if word in span_of or not adjacent or lengths[word] > budget:
                break
            span_of[word] = first
            budget -= int(lengths[word])
        if budget == 0:
            break
    if not span_of:
        shortest = int(order[np.argmin(lengths[order])])
        span_of = {shortest: shortest}
    positions = [np.arange(starts[word], starts[word] + lengths[word]) for word in span_of]
    spans = [np.full(lengths[word], starts[first]) for word, first in span_of.items()]
    return np.concatenate(positions), np.concatenate(spans)
