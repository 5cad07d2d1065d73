"""Steps: the same examples on any number of ranks, in micro-batches of nearly equal work."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_fast.data import PretrainingData, PretrainingDataConfig
from bert_fast.pretrain.micro_batches import Feed, Position, Prefetch, seed_dropout, split_evenly

BUDGET = 128


@pytest.fixture(scope="module")
def data(prepared: Path) -> PretrainingData:
    return PretrainingData(PretrainingDataConfig(str(prepared), seq_len=32, token_budget=BUDGET))


@pytest.mark.parametrize("parts", [1, 2, 3, 8], ids=lambda parts: f"{parts} parts")
def test_parts_have_nearly_equal_tokens_and_attention_work(parts: int) -> None:
    lengths = np.random.default_rng(0).choice([5, 20, 60, 128, 128, 128], 40 * parts)
    split = split_evenly(lengths, parts)
    assert sorted(np.concatenate(split).tolist()) == list(range(lengths.size))
    for work in (lengths, lengths**2):
        sums = np.array([work[part].sum() for part in split])
        # The last examples dealt are the shortest, so the difference is below one of the longest, of 40 per part.
        assert sums.max() - sums.min() < work.max(), sums
    assert all(a < b for part in split for a, b in pairwise(part.tolist()))


def test_too_few_examples_leave_parts_empty() -> None:
    assert [part.tolist() for part in split_evenly(np.array([3, 9]), 4)] == [[1], [0], [], []]
    assert [part.tolist() for part in split_evenly(np.array([], dtype=np.int64), 2)] == [[], []]


@pytest.mark.parametrize("accumulation", [1, 4, 6])
def test_a_step_has_the_same_examples_on_any_number_of_ranks(data: PretrainingData, accumulation: int) -> None:
    start = Position(0, data.num_batches(0) - accumulation // 2 - 1)  # ends in the next epoch, of 4 or 6
    steps = {}
    for ranks in (1, 2, 3, 4):
        feeds = [Feed(data, accumulation, rank, ranks) for rank in range(ranks)]
        parts = [feed.step(start) for feed in feeds]
        assert {part.end for part in parts} == {Feed(data, accumulation).advance(start, accumulation)}
        assert len({len(part.micro) for part in parts}) == 1
        micro = sorted((m for part in parts for m in part.micro), key=lambda m: m.number)
        assert [m.number for m in micro] == list(range(feeds[0].num_micro_batches))
        assert all(m.batch.num_tokens <= BUDGET for m in micro)
        assert {part.tokens for part in parts} == {sum(m.batch.num_tokens for m in micro)}
        on_all_ranks = feeds[0].step_of_all_ranks(start).micro
        assert [m.examples for m in on_all_ranks] == [m.examples for m in micro]
        steps[ranks] = micro
    every = {ranks: sorted(pair for m in micro for pair in m.examples) for ranks, micro in steps.items()}
    assert every[1] == every[2] == every[3] == every[4]
    assert {epoch for epoch, _ in every[1]} == ({0, 1} if accumulation > 1 else {0})
    if accumulation == 4:  # 1, 2 and 4 divide it, so the micro-batches are the same
        assert [m.examples for m in steps[1]] == [m.examples for m in steps[4]]
    for m in steps[1]:
        for place, (epoch, number) in enumerate(m.examples):
            rows = slice(int(m.batch.cu_seqlens[place]), int(m.batch.cu_seqlens[place + 1]))
            assert np.array_equal(m.batch.labels[rows].numpy(), data.example(epoch, number).labels)


def test_batches_too_full_to_be_equal_stay_as_planned(data: PretrainingData) -> None:
    feed = Feed(data, 3)
    for index in range(0, data.num_batches(0) - 3):
        assert all(m.batch.num_tokens <= BUDGET for m in feed.step(Position(0, index)).micro)


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetched_steps_are_those_of_the_feed(data: PretrainingData, ahead: int) -> None:
    feed = Feed(data, 2)
    prefetch = Prefetch(feed, Position(0, 4), ahead=ahead, pin=False)
    position = Position(0, 4)
    for _ in range(5):
        expected, actual = feed.step(position), prefetch.next()
        assert (actual.start, actual.end) == (expected.start, expected.end)
        assert [m.examples for m in actual.micro] == [m.examples for m in expected.micro]
        position = expected.end
    prefetch.close()


def test_an_error_in_the_prefetching_thread_is_raised_by_next(data: PretrainingData) -> None:
    class Broken(Feed):
        def step(self, start: Position) -> None:  # type: ignore[override]
            raise OSError("the shard went away")

    prefetch = Prefetch(Broken(data, 1), Position(0, 0), ahead=2, pin=False)
    with pytest.raises(OSError, match="the shard went away"):
        prefetch.next()
    prefetch.close()


def test_dropout_is_a_function_of_seed_step_and_micro_batch() -> None:
    def drawn(*state: int) -> float:
        seed_dropout(*state)
        return float(torch.rand(()))

    states = [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1), (2**40, 1, 0)]
    assert len({drawn(*state) for state in states}) == len(states)
    assert drawn(0, 1, 0) == drawn(0, 1, 0)
