"""The queue: batches over requests, limits, deadlines, cancellation, failures, the end."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

import pytest

pytest.importorskip("fastapi")

from bert_fast.serve.batching import Batcher
from bert_fast.serve.errors import BackendError, DeadlineError, OverloadedError, StoppingError


class Doubling:
    """A computation that doubles numbers, and can be stopped; it records its batches."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Event()

    def __call__(self, batch: Sequence[int]) -> list[int]:
        self.batches.append(list(batch))
        assert self.go.wait(30)
        if 13 in batch:
            raise RuntimeError("thirteen")
        return [2 * number for number in batch]


@pytest.fixture
def doubling() -> Iterator[Doubling]:
    compute = Doubling()
    yield compute
    compute.go.set()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 60))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def submit(batcher: Batcher, compute: Any, *numbers: int, timeout: float = 30) -> asyncio.Task[Any]:
    """A request for numbers, each of ten tokens."""
    return asyncio.ensure_future(batcher.submit(compute, numbers, [10] * len(numbers), timeout))


def test_waiting_requests_share_batches_up_to_the_budget(doubling: Doubling) -> None:
    sizes = []
    batcher = Batcher(40, 10_000, on_batch=lambda size, tokens: sizes.append((size, tokens)))

    async def requests() -> None:
        first = submit(batcher, doubling, 0)
        await until(lambda: len(doubling.batches) == 1)
        others = [submit(batcher, doubling, *numbers) for numbers in ([1, 2, 3], [4, 5, 6, 7, 8, 9], [10])]
        await until(lambda: batcher.waiting_jobs == 3)
        doubling.go.set()
        assert (await first)[0] == [0]
        assert [(await other)[0] for other in others] == [[2, 4, 6], [8, 10, 12, 14, 16, 18], [20]]

    run(requests)
    assert doubling.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10]]
    assert sizes == [(1, 10), (4, 40), (4, 40), (2, 20)]
    batcher.close()


def test_other_computations_have_other_batches_in_turn(doubling: Doubling) -> None:
    batcher = Batcher(1000, 10_000)
    other = Doubling()
    other.go.set()

    async def requests() -> None:
        tasks = [submit(batcher, doubling, 0)]
        await until(lambda: len(doubling.batches) == 1)
        tasks += [submit(batcher, compute, n) for n, compute in enumerate([other, doubling, other, doubling], 1)]
        await until(lambda: batcher.waiting_jobs == 4)
        doubling.go.set()
        assert [(await task)[0] for task in tasks] == [[2 * n] for n in range(5)]

    run(requests)
    assert (doubling.batches, other.batches) == ([[0], [2, 4]], [[1, 3]])
    batcher.close()


def test_max_batch_requests(doubling: Doubling) -> None:
    batcher = Batcher(1000, 10_000, max_batch_requests=2)
    doubling.go.set()

    async def requests() -> None:
        assert (await submit(batcher, doubling, *range(5)))[0] == [0, 2, 4, 6, 8]

    run(requests)
    assert doubling.batches == [[0, 1], [2, 3], [4]]
    batcher.close()


def test_a_full_queue_refuses_and_says_when_to_come_back(doubling: Doubling) -> None:
    batcher = Batcher(20, 40)

    async def requests() -> None:
        running = submit(batcher, doubling, 0)
        await until(lambda: len(doubling.batches) == 1)
        big = submit(batcher, doubling, *range(6))  # more than the queue takes, and it is empty
        await until(lambda: batcher.waiting_jobs == 1)
        with pytest.raises(OverloadedError, match="60 tokens are waiting; the queue takes 40") as caught:
            await submit(batcher, doubling, 1)
        assert int(caught.value.headers["Retry-After"]) >= 1
        doubling.go.set()
        await running
        await big
        assert (await submit(batcher, doubling, 1))[0] == [2]

    run(requests)
    batcher.close()


@pytest.mark.parametrize("how", ["deadline", "cancelled"])
def test_a_request_that_is_given_up_leaves_the_queue(doubling: Doubling, how: str) -> None:
    batcher = Batcher(20, 10_000)

    async def requests() -> None:
        running = submit(batcher, doubling, 0)
        await until(lambda: len(doubling.batches) == 1)
        given_up = submit(batcher, doubling, 1, 2, 3, timeout=0.05 if how == "deadline" else 30)
        waiting = submit(batcher, doubling, 4)
        await until(lambda: batcher.waiting_jobs == 2)
        if how == "cancelled":
            given_up.cancel()
        with pytest.raises(DeadlineError if how == "deadline" else asyncio.CancelledError):
            await given_up
        await until(lambda: batcher.waiting_jobs == 1)
        doubling.go.set()
        assert [(await task)[0] for task in (running, waiting)] == [[0], [8]]

    run(requests)
    assert doubling.batches == [[0], [4]]
    batcher.close()


def test_a_failure_reaches_the_request_that_causes_it_and_no_other(doubling: Doubling) -> None:
    batcher = Batcher(1000, 10_000)

    async def requests() -> None:
        running = submit(batcher, doubling, 0)
        await until(lambda: len(doubling.batches) == 1)
        tasks = [submit(batcher, doubling, n) for n in (1, 13, 2)]
        await until(lambda: batcher.waiting_jobs == 3)
        doubling.go.set()
        await running
        with pytest.raises(BackendError, match="RuntimeError: thirteen"):
            await tasks[1]
        assert [(await tasks[n])[0] for n in (0, 2)] == [[2], [4]]

    run(requests)
    assert batcher.alive
    batcher.close()


def test_a_failure_of_a_part_ends_the_whole_request(doubling: Doubling) -> None:
    batcher = Batcher(20, 10_000)
    doubling.go.set()

    async def requests() -> None:
        with pytest.raises(BackendError):
            await submit(batcher, doubling, 13, 1, 2, 3, 4, 5)
        assert (await submit(batcher, doubling, 6))[0] == [12]

    run(requests)
    batcher.close()


def test_closing_answers_what_waits_and_refuses_the_rest(doubling: Doubling) -> None:
    batcher = Batcher(20, 10_000)

    async def requests() -> None:
        tasks = [submit(batcher, doubling, 0)]
        await until(lambda: len(doubling.batches) == 1)
        tasks += [submit(batcher, doubling, n) for n in range(1, 5)]
        await until(lambda: batcher.waiting_jobs == 4)
        closing = asyncio.get_running_loop().run_in_executor(None, batcher.close)
        await until(lambda: not batcher.alive)
        with pytest.raises(StoppingError):
            await submit(batcher, doubling, 9)
        doubling.go.set()
        assert [(await task)[0] for task in tasks] == [[0], [2], [4], [6], [8]]
        await closing

    run(requests)


def test_times_are_those_of_the_queue_and_of_the_batches(doubling: Doubling) -> None:
    batcher = Batcher(20, 10_000)

    async def requests() -> None:
        running = submit(batcher, doubling, 0)
        await until(lambda: len(doubling.batches) == 1)
        waiting = submit(batcher, doubling, 1, 2, 3)
        await until(lambda: batcher.waiting_jobs == 1)
        start = time.monotonic()
        await asyncio.sleep(0.05)
        waited = time.monotonic() - start
        doubling.go.set()
        assert (await running)[1].inference >= waited
        assert (await waiting)[1].queue >= waited

    run(requests)
    batcher.close()
