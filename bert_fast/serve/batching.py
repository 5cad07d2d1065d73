"""Dynamic batching: one thread computes the sequences of all waiting requests, up to a budget of tokens a batch.

Sequences are packed without padding, so that a batch of different lengths costs what its tokens cost, and a sequence's
result doesn't depend on what else is in the batch. Requests are taken in the order in which they came.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bert_fast.serve.errors import BackendError, DeadlineError, OverloadedError, StoppingError

_logger = logging.getLogger("bert_fast.serve")
Compute = Callable[[Sequence[Any]], Sequence[Any]]


@dataclass
class Timing:
    """Seconds that a request waited for its first batch, and that its batches took."""

    queue: float = 0.0
    inference: float = 0.0


@dataclass(eq=False)
class _Job:
    """The sequences of one request for one computation.

    Attributes:
        compute: of a batch; jobs with the same one share batches.
        sequences, lengths: what is computed, and the number of tokens of each.
        results: one for each sequence that has been computed.
        started: the number of sequences that are or were in a batch.
    """

    compute: Compute
    sequences: Sequence[Any]
    lengths: Sequence[int]
    future: asyncio.Future[tuple[list[Any], Timing]]
    loop: asyncio.AbstractEventLoop
    deadline: float
    queued: float = field(default_factory=time.monotonic)
    results: list[Any] = field(default_factory=list)
    started: int = 0
    timing: Timing = field(default_factory=Timing)

    def waiting_tokens(self) -> int:
        return sum(self.lengths[self.started :])


class Batcher:
    """The queue and its thread; see the module.

    Args:
        max_batch_tokens: of a batch; a longer sequence is a batch by itself.
        max_batch_requests: the maximum number of sequences in a batch; None for any number.
        max_queue_tokens: more waiting tokens are refused, unless the queue is empty.
        on_batch: called with the numbers of sequences and of tokens of each batch.
    """

    def __init__(
        self,
        max_batch_tokens: int,
        max_queue_tokens: int,
        max_batch_requests: int | None = None,
        on_batch: Callable[[int, int], None] | None = None,
    ) -> None:
        self.max_batch_tokens, self.max_queue_tokens = max_batch_tokens, max_queue_tokens
        self.max_batch_requests = max_batch_requests
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._rate = 0.0  # tokens a second, of the last batches
        self._waiting = 0  # tokens
        self._thread = threading.Thread(target=self._run, name="bert_fast_compute", daemon=True)
        self._thread.start()

    @property
    def waiting_jobs(self) -> int:
        """The number of requests in the queue."""
        return len(self._jobs)

    @property
    def alive(self) -> bool:
        """Whether the thread computes."""
        return self._thread.is_alive() and not self._closed

    def retry_after(self) -> int:
        """Seconds until the queue is computed at the speed of the last batches; 1 or more."""
        return max(1, math.ceil(self._waiting / self._rate)) if self._rate else 1

    async def submit(
        self, compute: Compute, sequences: Sequence[Any], lengths: Sequence[int], timeout: float
    ) -> tuple[list[Any], Timing]:
        """Compute sequences; cancelling the call removes from the queue what is not in a batch yet.

        Args:
            compute: maps a batch of sequences to as many results.
            sequences: one or more.
            lengths: the number of tokens of each.
            timeout: seconds.

        Raises:
            OverloadedError: the queue is full.
            DeadlineError: `timeout` has passed.
            StoppingError: the server is shutting down.
            BackendError: the computation failed.
        """
        loop = asyncio.get_running_loop()
        job = _Job(compute, sequences, lengths, loop.create_future(), loop, time.monotonic() + timeout)
        with self._changed:
            if self._closed:
                raise StoppingError("the server is shutting down")
            if self._jobs and self._waiting + sum(lengths) > self.max_queue_tokens:
                raise OverloadedError(
                    f"{self._waiting} tokens are waiting; the queue takes {self.max_queue_tokens}",
                    {"Retry-After": str(self.retry_after())},
                )
            self._jobs.append(job)
            self._waiting += sum(lengths)
            self._changed.notify()
        try:
            return await asyncio.wait_for(job.future, timeout)
        except asyncio.TimeoutError:
            raise DeadlineError("not computed in time") from None
        finally:
            self._remove(job)

    def close(self, timeout: float | None = None) -> None:
        """Refuse new requests, compute those in the queue, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _remove(self, job: _Job) -> None:
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)
                self._waiting -= job.waiting_tokens()

    def _run(self) -> None:
        while batch := self._next_batch():
            self._compute(batch)

    def _next_batch(self) -> list[tuple[_Job, int, int]]:
        """(job, start, end) of the sequences of the next batch; empty where the queue is closed and empty."""
        with self._changed:
            while not self._jobs:
                if self._closed:
                    return []
                self._changed.wait()
            compute, batch, total, count = self._jobs[0].compute, [], 0, 0
            for job in list(self._jobs):
                if job.compute != compute:
                    continue
                start = end = job.started
                while end < len(job.sequences) and self._fits(total, count, job.lengths[end]):
                    total, count, end = total + job.lengths[end], count + 1, end + 1
                if end == start:
                    break
                batch.append((job, start, end))
                job.started = end
                if end < len(job.sequences):
                    break
                self._jobs.remove(job)
            self._waiting -= total
        now = time.monotonic()
        for job, start, _ in batch:
            if start == 0:
                job.timing.queue = now - job.queued
        if self._on_batch is not None:
            self._on_batch(count, total)
        return batch

    def _fits(self, total: int, count: int, length: int) -> bool:
        if count == 0:
            return True
        return total + length <= self.max_batch_tokens and count != self.max_batch_requests

    def _compute(self, batch: list[tuple[_Job, int, int]]) -> None:
        sequences = [sequence for job, start, end in batch for sequence in job.sequences[start:end]]
        started = time.monotonic()
        try:
            results = list(batch[0][0].compute(sequences))
            if len(results) != len(sequences):
                raise RuntimeError(f"{len(results)} results of {len(sequences)} sequences")
        except Exception as error:
            if len(batch) > 1:  # the others' answers must not depend on the one that fails
                for part in batch:
                    self._compute([part])
                return
            _logger.error("the computation failed: %s", error, exc_info=error)
            self._fail(batch[0][0], BackendError(f"the computation failed: {type(error).__name__}: {error}"))
            return
        seconds = time.monotonic() - started
        tokens = sum(sum(job.lengths[start:end]) for job, start, end in batch)
        self._rate = tokens / seconds if not self._rate else 0.8 * self._rate + 0.2 * tokens / max(seconds, 1e-6)
        for job, start, end in batch:
            job.results += results[: end - start]
            results = results[end - start :]
            job.timing.inference += seconds
            if len(job.results) == len(job.sequences):
                _deliver(job, lambda job=job: job.future.set_result((job.results, job.timing)))  # type: ignore[misc]

    def _fail(self, job: _Job, error: Exception) -> None:
        self._remove(job)
        _deliver(job, lambda: job.future.set_exception(error))


def _deliver(job: _Job, action: Callable[[], None]) -> None:
    """Run `action` in the loop of the request, unless it has been cancelled or the loop has ended."""

    def run() -> None:
        if not job.future.done():
            action()

    try:
        job.loop.call_soon_threadsafe(run)
    except RuntimeError:
        _logger.warning("a result came after the end of the event loop")
