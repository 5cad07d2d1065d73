"""Which examples a step takes, and how they are split into micro-batches of nearly equal work for the ranks.

A step takes `accumulation` consecutive batches of the epoch's plan, whatever the number of ranks; their examples are
dealt out anew over the micro-batches of all ranks. The position in the epoch is therefore a number that any number of
ranks can go on from, and every example is seen once an epoch.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bert_fast.data import PackedBatch, PretrainingData

Array = NDArray[Any]


class Position(NamedTuple):
    """A batch of an epoch's plan."""

    epoch: int
    batch: int


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch of a step.

    Attributes:
        number: of the step's micro-batches, 0 to M - 1; its dropout depends on it, and not on the rank.
        batch: the examples; there may be none.
        examples: (epoch, number in the epoch) of each.
    """

    number: int
    batch: PackedBatch
    examples: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StepBatches:
    """What a rank computes in one step.

    Attributes:
        start, end: the step's first batch of the plan, and the one after its last.
        micro: this rank's micro-batches.
        examples, tokens, squares: of the whole step, on all ranks: how many, their real tokens, and the sum of the
            squares of their lengths, to which the attention's work is proportional.
        counts: int64 (M, 2), of each of `micro`: the masked tokens and the sentence pairs.
    """

    start: Position
    end: Position
    micro: tuple[MicroBatch, ...]
    examples: int
    tokens: int
    squares: int
    counts: Tensor


def split_evenly(lengths: Array, parts: int) -> list[Array]:
    """Examples dealt into `parts` of nearly equal tokens and attention work (the sum of squares of the lengths).

    The longest first, in rounds: each part gets one example a round, the part with the least work so far the longest of
    them. The numbers of examples differ by at most one, and each part keeps the order of the examples.

    Args:
        lengths: (n,), tokens of each example.
        parts: at least 1.

    Returns:
        For each part the places of its examples in `lengths`, int64, rising; empty where there are too few.
    """
    order = np.argsort(-lengths, kind="stable")
    tokens = lengths.astype(np.float64)
    work = tokens / max(tokens.sum(), 1.0) + np.square(tokens) / max(np.square(tokens).sum(), 1.0)
    loads = np.zeros(parts)
    owner = np.empty(lengths.size, dtype=np.int64)
    for first in range(0, lengths.size, parts):
        round_ = order[first : first + parts]
        takers = np.argsort(loads, kind="stable")[: round_.size]
        owner[round_] = takers
        loads[takers] += work[round_]
    return [np.flatnonzero(owner == part) for part in range(parts)]


def shaping(data: PretrainingData, *, label_rows: bool, static: bool) -> Callable[[PackedBatch], PackedBatch] | None:
    """What is made of a micro-batch before the model gets it.

    Args:
        data: whose batches.
        label_rows: say where the labels are, so that the last layer is computed there only.
        static: the same shape for all: the token budget, twice the sequences of the fullest batch of the first epoch,
            and as many labels as these can have.
    """
    if not (label_rows or static):
        return None
    options = data.config
    sequences = 2 * int(np.diff(data.plan(0).starts).max(initial=1))
    labels = math.ceil(options.mask_prob * options.token_budget) + sequences

    def shape(batch: PackedBatch) -> PackedBatch:
        batch = batch.with_label_rows() if label_rows else batch
        return batch.padded(options.token_budget, sequences, labels, options.seq_len) if static else batch

    return shape


class Feed:
    """The steps of a run, as one rank sees them.

    Args:
        data: the training split.
        accumulation: batches of the plan that make a step.
        rank, ranks: which of how many processes this is.
        shape: what is made of every micro-batch; see `shaping`.

    Attributes:
        pieces: micro-batches of a step; the smallest multiple of `ranks` that is at least `accumulation`.
    """

    def __init__(
        self,
        data: PretrainingData,
        accumulation: int,
        rank: int = 0,
        ranks: int = 1,
        shape: Callable[[PackedBatch], PackedBatch] | None = None,
    ) -> None:
        self.data, self.accumulation, self.shape = data, accumulation, shape
        self.rank, self.ranks = rank, ranks
        self.pieces = -(-accumulation // ranks) * ranks

    def after(self, position: Position, batches: int = 1) -> Position:
        """The position `batches` batches later; epochs follow each other without a gap."""
        epoch, index = position
        index += batches
        while index >= (count := self.data.num_batches(epoch)):
            epoch, index = epoch + 1, index - count
        return Position(epoch, index)

    def step(self, start: Position) -> StepBatches:
        """This rank's part of the step that begins at `start`."""
        return self._step(start, range(self.rank, self.pieces, self.ranks))

    def whole_step(self, start: Position) -> StepBatches:
        """All micro-batches of the step that begins at `start`, of every rank."""
        return self._step(start, range(self.pieces))

    def _step(self, start: Position, numbers: range) -> StepBatches:
        places = [start]
        for _ in range(self.accumulation):
            places.append(self.after(places[-1]))
        epochs, examples, batch_of = [], [], []
        for number, (epoch, index) in enumerate(places[:-1]):
            first, last = self.data.plan(epoch).starts[index : index + 2].tolist()
            examples.append(np.arange(first, last))
            epochs.append(np.full(last - first, epoch))
            batch_of.append(np.full(last - first, number))
        epoch_of, example_of = np.concatenate(epochs), np.concatenate(examples)
        lengths = np.empty(example_of.size, dtype=np.int64)
        for epoch in {place.epoch for place in places[:-1]}:
            chosen = epoch_of == epoch
            lengths[chosen] = self.data.plan(epoch).lengths[example_of[chosen]]
        parts = split_evenly(lengths, self.pieces)
        if max(int(lengths[part].sum()) for part in parts) > self.data.config.token_budget:
            # Batches so full that equal parts don't fit: the plan's own do.
            parts = [np.flatnonzero(np.concatenate(batch_of) == number) for number in range(self.pieces)]
        micro = tuple(self._micro(number, epoch_of[parts[number]], example_of[parts[number]]) for number in numbers)
        labelled = [
            [np.count_nonzero(x.numpy() != -100) for x in (m.batch.labels, m.batch.next_sentence_label)] for m in micro
        ]
        work = int(lengths.sum()), int(np.square(lengths).sum())
        return StepBatches(start, places[-1], micro, lengths.size, *work, torch.tensor(labelled))

    def _micro(self, number: int, epochs: Array, examples: Array) -> MicroBatch:
        found = [self.data.select(epoch, examples[epochs == epoch]) for epoch in sorted(set(epochs.tolist()))]
        batch = PackedBatch.joined(found or [self.data.select(0, examples)])
        if self.shape is not None:
            batch = self.shape(batch)
        return MicroBatch(number, batch, tuple(zip(epochs.tolist(), examples.tolist(), strict=True)))


class Prefetch:
    """Makes the steps ahead in a thread, pinned where the device is a GPU, so that the loop never waits for them.

    Args:
        feed: where the steps come from.
        start: the first.
        ahead: most steps that are made before they are asked for; 0 makes each when it is asked for.
        pin: whether to put the tensors into page-locked memory.

    An error while a step is made is raised by the `next` that would have returned it.
    """

    def __init__(self, feed: Feed, start: Position, *, ahead: int, pin: bool) -> None:
        self._feed, self._next, self._pin = feed, start, pin
        self._made: queue.Queue[StepBatches | BaseException] = queue.Queue(maxsize=max(ahead, 1))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True) if ahead else None
        if self._thread is not None:
            self._thread.start()

    def next(self) -> StepBatches:
        """The next step."""
        if self._thread is None:
            return self._make()
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        if self._thread is not None:
            while self._thread.is_alive():
                for _ in self._drained():
                    pass
                self._thread.join(timeout=0.01)

    def _drained(self) -> Iterator[object]:
        while not self._made.empty():
            yield self._made.get_nowait()

    def _make(self) -> StepBatches:
        made = self._feed.step(self._next)
        self._next = made.end
        if not self._pin:
            return made
        micro = tuple(replace(m, batch=m.batch.pin_memory()) for m in made.micro)
        return replace(made, micro=micro, counts=made.counts.pin_memory())

    def _run(self) -> None:
        while not self._closed.is_set():
            try:
                made: StepBatches | BaseException = self._make()
            except BaseException as error:
                made = error
            while not self._closed.is_set():
                try:
                    self._made.put(made, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(made, BaseException):
                return


def seed_dropout(seed: int, step: int, micro_batch: int) -> None:
    """Seed torch's generators for one micro-batch: a function of these three, so nothing of it has to be saved."""
    words = np.random.SeedSequence((seed, step, micro_batch)).generate_state(2, np.uint32)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
