"""Training examples generated on the fly: a pure function of (seed, epoch, index), with random access.

An epoch is planned once: which tokens form which example, the order of the examples, and which examples share a batch.
Batches are then assembled from memory-mapped tokens and masked on request, as `bert_fast.data.host_numpy` defines.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from bert_fast.data.batch import PackedBatch
from bert_fast.data.host_numpy import (
    CONTINUATION,
    CONTINUES,
    Array,
    Masking,
    epoch_key,
    shuffled,
    span_thresholds,
)
from bert_fast.data.remote import local_folder
from bert_fast.data.shards import TOKENIZER, TokenStore, verify_files
from bert_fast.data.unit_texts import unit_texts
from bert_fast.data.vocab import load_wordpiece, token_kinds

HOST_IMPLS = ("auto", "cpp", "numpy")


@dataclass
class PretrainingDataConfig:
    """The data to train on, and how examples are generated from it.

    Attributes:
        folder: a folder written by `bert-fast prepare`, or its URL.
        split: `train` or `heldout`.
        seq_len: maximum number of tokens of an example, including [CLS] and [SEP].
        token_budget: maximum number of tokens of a batch; at least `seq_len`.
        seed: seed of all random choices.
        short_seq_prob: probability that an example has a random shorter target length.
        next_sentence: whether examples are pairs A, B for next-sentence prediction, or single texts.
        whole_words: whether all pieces of a word are masked together; `words` of `PrepareConfig` defines a word.
        max_span: maximum number of words of a masked span, 1 for no spans; 10 in SpanBERT. Lengths are geometric.
        span_p: probability that a span ends after a word; 0.2 in SpanBERT.
        mask_prob: fraction of the tokens to predict.
        mask_token_prob: fraction of the predicted tokens that are replaced by [MASK].
        random_token_prob: fraction of the predicted tokens that are replaced by a random token; the rest is kept.
        checksums: whether to verify the checksums of the shards when they are opened, in addition to their sizes.
        host: implementation that generates batches: `auto`, `cpp` or `numpy`; the results are identical.
        cache: folder of local copies if `folder` is a URL, see `bert_fast.data.local_folder`.

    Raises:
        ValueError: a value is out of range, or contradicts another one.
    """

    folder: str
    split: str = "train"
    seq_len: int = 128
    token_budget: int = 8192
    seed: int = 0
    short_seq_prob: float = 0.1
    next_sentence: bool = True
    whole_words: bool = True
    max_span: int = 1
    span_p: float = 0.2
    mask_prob: float = 0.15
    mask_token_prob: float = 0.8
    random_token_prob: float = 0.1
    checksums: bool = True
    host: str = "auto"
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.seq_len < 5:
            raise ValueError(f"seq_len is {self.seq_len}; expected 5 or more: [CLS] A [SEP] B [SEP]")
        if self.token_budget < self.seq_len:
            raise ValueError(
                f"token_budget is {self.token_budget}; expected at least seq_len, {self.seq_len}: an example must fit"
            )
        for name in ("short_seq_prob", "mask_token_prob", "random_token_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; expected 0 to 1")
        if not 2.0**-32 <= self.mask_prob <= 1.0:
            raise ValueError(f"mask_prob is {self.mask_prob}; expected more than 0 and at most 1")
        if not (1 <= self.max_span <= 1000 and 0.0 < self.span_p < 1.0):
            raise ValueError(
                f"max_span is {self.max_span} and span_p {self.span_p}; expected 1 to 1000 words, and more than 0 "
                "and less than 1"
            )
        if self.mask_token_prob + self.random_token_prob > 1.0 + 1e-9:
            total = self.mask_token_prob + self.random_token_prob
            raise ValueError(f"mask_token_prob + random_token_prob is {total}; expected at most 1")


@dataclass(frozen=True)
class Example:
    """One example of S tokens: int64 (S,) arrays as in a `PackedBatch`, and their origin in the split.

    Attributes:
        document, b_document: the documents of A and B; b_document is -1 without B.
        a_start, a_length, b_start, b_length: the token ranges of A and B.
    """

    input_ids: Array
    token_type_ids: Array
    position_ids: Array
    labels: Array
    next_sentence_label: int
    document: int
    b_document: int
    a_start: int
    a_length: int
    b_start: int
    b_length: int


@dataclass(frozen=True)
class Plan:
    """The examples of an epoch in order, (examples,) each; `starts`, (batches + 1,), has the first of each batch."""

    key: Array
    a_start: Array
    a_length: Array
    b_start: Array
    b_length: Array
    label: Array
    document: Array
    b_document: Array
    starts: Array

    @property
    def lengths(self) -> Array:
        """Number of tokens of each example, including special tokens, int32 (examples,)."""
        return _full_lengths(self.a_length, self.b_length)


def _full_lengths(a_length: Array, b_length: Array) -> Array:
    return (a_length + b_length + np.where(b_length > 0, 3, 2)).astype(np.int32)


def host(impl: str = "auto") -> ModuleType:
    """The module that implements `plan`, `pack` and `build_batch` of `bert_fast.data.host_numpy`.

    Args:
        impl: `cpp` (the extension `bert_fast._host`), `numpy` (the same bits), or `auto`: the value of the environment
            variable BERT_FAST_HOST if set, else `cpp` if built, else `numpy`.

    Raises:
        ValueError: `impl`, or BERT_FAST_HOST, is none of the three.
        ImportError: `cpp` is requested and not built.
    """
    if impl == "auto":
        impl = os.environ.get("BERT_FAST_HOST", "auto")
    if impl not in HOST_IMPLS:
        raise ValueError(f"the host implementation is {impl!r}; expected one of {', '.join(HOST_IMPLS)}")
    if impl != "numpy":
        try:
            return importlib.import_module("bert_fast._host")
        except ImportError as error:
            if impl == "cpp":
                raise ImportError(
                    "bert_fast._host is not built: install with a C++ compiler and pybind11, or use impl='numpy'"
                ) from error
    return importlib.import_module("bert_fast.data.host_numpy")


class PretrainingData:
    """The examples and batches of one split of a prepared folder.

    Args:
        config: see `PretrainingDataConfig`.

    Attributes:
        vocab_size: V.
        documents: number of documents of the split.
        tokens: number of tokens of the split.

    Raises:
        ValueError: the folder is not a prepared one, one of its files is missing, truncated or corrupt (the message
            names it), the split has too few documents, or `config` is invalid.
        ImportError: `config.host` is `cpp`, which is not built.
    """

    def __init__(self, config: PretrainingDataConfig) -> None:
        config.__post_init__()  # again: its attributes may have changed
        self.config = config
        self._host = host(config.host)
        folder = local_folder(config.folder, config.cache)
        verify_files(folder, TOKENIZER, checksums=config.checksums)
        self.store = TokenStore(folder, config.split, checksums=config.checksums)
        self.documents, self.tokens = self.store.documents, self.store.tokens
        needed = 2 if config.next_sentence else 1
        if self.documents < needed:
            raise ValueError(
                f"{config.folder}, {config.split}: {self.documents} documents; expected at least {needed}"
                + (" (B of a sentence pair may come from another document)" if needed == 2 else "")
            )
        tokenizer = load_wordpiece(folder)
        vocab = tokenizer.get_vocab()
        kinds = token_kinds(tokenizer)
        self.vocab_size = int(kinds.size)
        self._masking = Masking(
            kinds=kinds,
            replacements=np.flatnonzero(kinds <= CONTINUATION).astype(np.int32),
            cls_id=vocab["[CLS]"],
            sep_id=vocab["[SEP]"],
            mask_id=vocab["[MASK]"],
            select_threshold=round(config.mask_prob * 2**32),
            mask_threshold=round(config.mask_token_prob * 2**32),
            random_threshold=min(round((config.mask_token_prob + config.random_token_prob) * 2**32), 2**32),
            whole_words=config.whole_words,
            span_thresholds=span_thresholds(config.max_span, config.span_p),
        )
        self._max_tokens = config.seq_len - (3 if config.next_sentence else 2)
        limit = self._max_tokens // 2 if config.next_sentence else self._max_tokens
        self._unit_ends, self._document_units = _units(self.store, kinds, limit, config.next_sentence)
        self._texts = unit_texts(self.store, self._unit_ends, self._document_units, pairs=config.next_sentence)
        if config.next_sentence and (self._texts[1] == self._texts[1][0]).all():
            raise ValueError(
                f"{config.folder}, {config.split}: its {self.documents} documents have equal texts; expected 2 "
                "different ones (B of a sentence pair may come from another document), or next_sentence=false"
            )
        self._plans: dict[int, Plan] = {}

    def plan(self, epoch: int) -> Plan:
        """The plan of an epoch; the latest two are cached."""
        if epoch not in self._plans:
            plan = self._make_plan(epoch)
            self._plans = dict([*list(self._plans.items())[-1:], (epoch, plan)])
        return self._plans[epoch]

    def _make_plan(self, epoch: int) -> Plan:
        key = epoch_key(self.config.seed, epoch)
        short = round(self.config.short_seq_prob * 2**32)
        columns = self._host.plan(
            self._unit_ends, self._document_units, *self._texts, key, self._max_tokens, short, self.config.next_sentence
        )
        order = shuffled(columns[0].size, key)
        names = ("a_start", "a_length", "b_start", "b_length", "label", "document", "b_document")
        ordered = {name: column[order] for name, column in zip(names, columns, strict=True)}
        lengths = _full_lengths(ordered["a_length"], ordered["b_length"])
        return Plan(key=key, **ordered, starts=self._host.pack(lengths, self.config.token_budget))

    def num_examples(self, epoch: int = 0) -> int:
        """Number of examples of an epoch."""
        return int(self.plan(epoch).a_start.size)

    def num_batches(self, epoch: int = 0) -> int:
        """Number of batches of an epoch."""
        return int(self.plan(epoch).starts.size - 1)

    def batch(self, epoch: int, index: int) -> PackedBatch:
        """Batch `index` of an epoch, on the CPU.

        Raises:
            IndexError: `index` is outside 0 to `num_batches(epoch) - 1`.
        """
        plan = self.plan(epoch)
        if not 0 <= index < plan.starts.size - 1:
            raise IndexError(f"batch {index} of epoch {epoch}; expected 0 to {plan.starts.size - 2}")
        return self.select(epoch, np.arange(plan.starts[index], plan.starts[index + 1]))

    def select(self, epoch: int, indices: Array) -> PackedBatch:
        """The examples `indices`, int64 (B,), of an epoch as one batch; masking does not depend on the batch."""
        plan = self.plan(epoch)
        ids, types, positions, cu_seqlens, labels, max_seqlen = self._build(plan, indices)
        return PackedBatch(
            input_ids=torch.from_numpy(ids),
            token_type_ids=torch.from_numpy(types),
            position_ids=torch.from_numpy(positions),
            cu_seqlens=torch.from_numpy(cu_seqlens),
            max_seqlen=max_seqlen,
            labels=torch.from_numpy(labels),
            next_sentence_label=torch.from_numpy(plan.label[indices].astype(np.int64)),
        )

    def batches(self, epoch: int, start: int = 0) -> Iterator[PackedBatch]:
        """The batches of an epoch in order, from index `start`."""
        for index in range(start, self.num_batches(epoch)):
            yield self.batch(epoch, index)

    def example(self, epoch: int, index: int) -> Example:
        """Example `index` of an epoch, the same as in its batch.

        Raises:
            IndexError: `index` is outside 0 to `num_examples(epoch) - 1`.
        """
        plan = self.plan(epoch)
        if not 0 <= index < plan.a_start.size:
            raise IndexError(f"example {index} of epoch {epoch}; expected 0 to {plan.a_start.size - 1}")
        ids, types, positions, _, labels, _ = self._build(plan, np.array([index]))
        names = ("document", "b_document", "a_start", "a_length", "b_start", "b_length")
        origin = {name: int(getattr(plan, name)[index]) for name in names}
        return Example(ids, types, positions, labels, next_sentence_label=int(plan.label[index]), **origin)

    def _build(self, plan: Plan, indices: Array) -> tuple[Array, Array, Array, Array, Array, int]:
        a_lengths, b_lengths = plan.a_length[indices], plan.b_length[indices]
        starts = np.stack([plan.a_start[indices], plan.b_start[indices]], axis=1).reshape(-1)
        lengths = np.stack([a_lengths, b_lengths], axis=1).reshape(-1)
        tokens = self.store.gather(starts, lengths)
        columns: tuple[Array, Array, Array, Array, Array, int] = self._host.build_batch(
            tokens, a_lengths, b_lengths, indices.astype(np.int64), plan.key, self._masking
        )
        return columns


def _units(store: TokenStore, kinds: Array, limit: int, pairs: bool) -> tuple[Array, Array]:
    """The end of each unit, and the first unit of each document.

    A unit is a sentence, or a part of a sentence of more than `limit` tokens, which is cut between words. For pairs, a
    document of one sentence is cut at the word boundary nearest to its middle, so that a text has a next one.
    """
    ends = store.sentence_ends
    starts = np.concatenate([[0], ends[:-1]])
    cuts: list[int] = []
    for i in np.flatnonzero(ends - starts > limit).tolist():
        words = _word_starts(store, kinds, starts[i], ends[i])
        cuts += [int(starts[i]) + cut for cut in _cut_long(words, int(ends[i] - starts[i]), limit)]
    if pairs:
        single = store.document_sentences[:-1][np.diff(store.document_sentences) == 1]
        for i in single[ends[single] - starts[single] <= limit].tolist():
            words = _word_starts(store, kinds, starts[i], ends[i])
            if words.size:
                middle = (ends[i] - starts[i]) / 2
                cuts.append(int(starts[i] + words[np.argmin(np.abs(words - middle))]))
    unit_ends = np.sort(np.concatenate([ends, np.array(cuts, dtype=np.int64)]))
    document_ends = ends[store.document_sentences[1:] - 1]
    document_units = np.concatenate([[0], np.searchsorted(unit_ends, document_ends, side="right")])
    return unit_ends, document_units.astype(np.int64)


def _word_starts(store: TokenStore, kinds: Array, start: int, end: int) -> Array:
    """The positions in a sentence at which words start, except the first."""
    tokens = store.gather(np.array([start]), np.array([end - start]))
    begins = (kinds[tokens & ~CONTINUES] != CONTINUATION) & (tokens & CONTINUES == 0)
    return np.flatnonzero(begins[1:]) + 1


def _cut_long(words: Array, length: int, limit: int) -> list[int]:
    """Cut `length` tokens into parts of at most `limit` and similar length, between words where possible."""
    cuts = [0]
    while (rest := length - cuts[-1]) > limit:
        target = cuts[-1] + -(-rest // -(-rest // limit))
        candidates = words[(words > cuts[-1]) & (words <= target)]
        cuts.append(int(candidates[-1]) if candidates.size else target)
    return cuts[1:]
