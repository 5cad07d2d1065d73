"""Micro-batches: which examples a step takes, how they are split among the ranks, and the forward pass of one.

A step takes `accumulation` consecutive batches of the epoch's plan, whatever the number of ranks, and redistributes
their examples over the micro-batches of all ranks, with nearly equal work in each. A run can therefore resume from a
position in the epoch with any number of ranks, and every example occurs once per epoch.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bert_fast.data import PackedBatch, PretrainingData
from bert_fast.models import BertConfig
from bert_fast.models.encoder import draw_rng_states

Array = NDArray[Any]


class Position(NamedTuple):
    """Index of a batch in the plan of an epoch."""

    epoch: int
    batch: int


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a step.

    Attributes:
        number: index among the step's micro-batches of all ranks; its dropout depends on it, and not on the rank.
        batch: the examples; may be empty.
        examples: (epoch, index in the epoch) of each example.
    """

    number: int
    batch: PackedBatch
    examples: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one rank for one step.

    Attributes:
        start, end: position of the step's first batch, and of the one after its last.
        micro: this rank's M micro-batches.
        examples, tokens, squares: of the step on all ranks: number of examples, number of real tokens, and sum of the
            squared lengths, to which the cost of attention is proportional.
        counts: int64 (M, 2), masked tokens and sentence pairs of each micro-batch.
    """

    start: Position
    end: Position
    micro: tuple[MicroBatch, ...]
    examples: int
    tokens: int
    squares: int
    counts: Tensor


def split_evenly(lengths: Array, parts: int) -> list[Array]:
    """Split examples into `parts` with nearly equal tokens and attention cost (the sum of the squared lengths).

    Greedy, from the longest example down, in rounds: each part gets one example per round, the part with the least
    work so far the longest. The numbers of examples differ by at most one.

    Args:
        lengths: (n,), tokens of each example.
        parts: at least 1.

    Returns:
        For each part the indices of its examples, int64, ascending; empty if there are too few examples.
    """
    order = np.argsort(-lengths, kind="stable")
    tokens = lengths.astype(np.float64)
    work = tokens / max(tokens.sum(), 1.0) + np.square(tokens) / max(np.square(tokens).sum(), 1.0)
    loads = np.zeros(parts)
    owner = np.empty(lengths.size, dtype=np.int64)
    for first in range(0, lengths.size, parts):
        examples = order[first : first + parts]
        takers = np.argsort(loads, kind="stable")[: examples.size]
        owner[examples] = takers
        loads[takers] += work[examples]
    return [np.flatnonzero(owner == part) for part in range(parts)]


def batch_transform(
    data: PretrainingData, *, label_rows: bool, static: bool
) -> Callable[[PackedBatch], PackedBatch] | None:
    """The transform of a micro-batch before the forward pass, or None for none.

    Args:
        data: the source of the batches.
        label_rows: add the rows that have labels, so that the last layer is computed at these rows only.
        static: pad every batch to one shape: the token budget, twice the sequences of the fullest batch of the first
            epoch, and the maximum number of labels of these.
    """
    if not (label_rows or static):
        return None
    options = data.config
    sequences = 2 * int(np.diff(data.plan(0).starts).max(initial=1))
    labels = math.ceil(options.mask_prob * options.token_budget) + sequences

    def transform(batch: PackedBatch) -> PackedBatch:
        batch = batch.with_label_rows() if label_rows else batch
        return batch.padded(options.token_budget, sequences, labels, options.seq_len) if static else batch

    return transform


class Feed:
    """The micro-batches of one rank for every step of a run.

    Args:
        data: the training split.
        accumulation: batches of the plan per step.
        rank, world_size: as in torch.distributed.
        transform: applied to every micro-batch; see `batch_transform`.

    Attributes:
        num_micro_batches: of a step on all ranks; the smallest multiple of `world_size` not below `accumulation`.
    """

    def __init__(
        self,
        data: PretrainingData,
        accumulation: int,
        rank: int = 0,
        world_size: int = 1,
        transform: Callable[[PackedBatch], PackedBatch] | None = None,
    ) -> None:
        self.data, self.accumulation, self.transform = data, accumulation, transform
        self.rank, self.world_size = rank, world_size
        self.num_micro_batches = -(-accumulation // world_size) * world_size

    def advance(self, position: Position, batches: int = 1) -> Position:
        """The position `batches` batches later; the end of an epoch is followed by the next epoch."""
        epoch, index = position
        index += batches
        while index >= (count := self.data.num_batches(epoch)):
            epoch, index = epoch + 1, index - count
        return Position(epoch, index)

    def step(self, start: Position) -> StepBatches:
        """This rank's micro-batches of the step that begins at `start`."""
        return self._step(start, range(self.rank, self.num_micro_batches, self.world_size))

    def step_of_all_ranks(self, start: Position) -> StepBatches:
        """The micro-batches of all ranks of the step that begins at `start`."""
        return self._step(start, range(self.num_micro_batches))

    def _step(self, start: Position, numbers: range) -> StepBatches:
        positions = [start]
        for _ in range(self.accumulation):
            positions.append(self.advance(positions[-1]))
        epochs, examples, batch_of = [], [], []
        for number, (epoch, index) in enumerate(positions[:-1]):
            first, last = self.data.plan(epoch).starts[index : index + 2].tolist()
            examples.append(np.arange(first, last))
            epochs.append(np.full(last - first, epoch))
            batch_of.append(np.full(last - first, number))
        epoch_of, example_of = np.concatenate(epochs), np.concatenate(examples)
        lengths = np.empty(example_of.size, dtype=np.int64)
        for epoch in {position.epoch for position in positions[:-1]}:
            in_epoch = epoch_of == epoch
            lengths[in_epoch] = self.data.plan(epoch).lengths[example_of[in_epoch]]
        parts = split_evenly(lengths, self.num_micro_batches)
        if max(int(lengths[part].sum()) for part in parts) > self.data.config.token_budget:
            # The batches are so full that equal parts exceed the budget; the plan's batches do not.
            parts = [np.flatnonzero(np.concatenate(batch_of) == number) for number in range(self.num_micro_batches)]
        micro = tuple(self._micro(number, epoch_of[parts[number]], example_of[parts[number]]) for number in numbers)
        counts = [
            [np.count_nonzero(x.numpy() != -100) for x in (m.batch.labels, m.batch.next_sentence_label)] for m in micro
        ]
        work = int(lengths.sum()), int(np.square(lengths).sum())
        return StepBatches(start, positions[-1], micro, lengths.size, *work, torch.tensor(counts))

    def _micro(self, number: int, epochs: Array, examples: Array) -> MicroBatch:
        batches = [self.data.select(epoch, examples[epochs == epoch]) for epoch in sorted(set(epochs.tolist()))]
        batch = PackedBatch.joined(batches or [self.data.select(0, examples)])
        if self.transform is not None:
            batch = self.transform(batch)
        return MicroBatch(number, batch, tuple(zip(epochs.tolist(), examples.tolist(), strict=True)))


class Prefetch:
    """Prepares steps ahead in a thread, in pinned memory for a GPU, so that the training loop does not wait for them.

    Args:
        feed: the source of the steps.
        start: position of the first step.
        ahead: maximum steps prepared ahead; 0 prepares each in `next`.
        pin: whether to copy the tensors into page-locked memory.

    An exception while a step is prepared is raised by the `next` that would have returned it.
    """

    def __init__(self, feed: Feed, start: Position, *, ahead: int, pin: bool) -> None:
        self._feed, self._position, self._pin = feed, start, pin
        self._queue: queue.Queue[StepBatches | BaseException] = queue.Queue(maxsize=max(ahead, 1))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True) if ahead else None
        if self._thread is not None:
            self._thread.start()

    def next(self) -> StepBatches:
        """The next step."""
        if self._thread is None:
            return self._prepare()
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        if self._thread is not None:
            while self._thread.is_alive():
                while not self._queue.empty():
                    self._queue.get_nowait()
                self._thread.join(timeout=0.01)

    def _prepare(self) -> StepBatches:
        batches = self._feed.step(self._position)
        self._position = batches.end
        if not self._pin:
            return batches
        micro = tuple(replace(m, batch=m.batch.pin_memory()) for m in batches.micro)
        return replace(batches, micro=micro, counts=batches.counts.pin_memory())

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                item: StepBatches | BaseException = self._prepare()
            except BaseException as error:
                item = error
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch's generators for a micro-batch. A function of its arguments, so no generator state is saved."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


def dropout_states(config: BertConfig, device: torch.device, seed: int, step: int, micro_batch: int) -> Tensor | None:
    """The dropout states of a micro-batch, a function of (seed, step, micro-batch): int64 (1 + 3L, 2), or None."""
    seed_dropout(seed, step, micro_batch)
    return draw_rng_states(config, device)


def forward(model: torch.nn.Module, batch: PackedBatch, rng_states: Tensor | None = None) -> Any:
    """The model's output for a PackedBatch; in training with the dropout of `rng_states`, or newly drawn if None."""
    return model(
        input_ids=batch.input_ids,
        token_type_ids=batch.token_type_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        labels=batch.labels,
        next_sentence_label=batch.next_sentence_label,
        label_rows=batch.label_rows,
        rng_states=rng_states,
        output_logits=False,
    )
