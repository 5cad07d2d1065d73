"""What a route needs: the models, the queue, the limits; waiting for a result as long as the client is there."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from bert_fast.models.texts import check_texts
from bert_fast.serve.batching import Batcher, Compute, Timing
from bert_fast.serve.errors import (
    DeadlineError,
    DisconnectedError,
    EmptyInputError,
    InvalidInputError,
    OverloadedError,
    TooLargeError,
    UnknownModelError,
)
from bert_fast.serve.metrics import Metrics
from bert_fast.serve.model import ServedModel, Tokens

Value = TypeVar("Value")


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Args:
        max_concurrent_requests: more are answered by 429.
        max_batch_tokens: of a batch.
        max_batch_requests: the maximum number of texts in a batch; None for any number.
        max_client_batch_size: the maximum number of texts in a request.
        max_queue_batches: the queue takes this number of full batches.
        payload_limit: bytes of a body.
        timeout: seconds until a request is given up, and until its body must have come.
        tokenization_workers: threads.
    """

    max_concurrent_requests: int = 512
    max_batch_tokens: int = 16384
    max_batch_requests: int | None = None
    max_client_batch_size: int = 2048
    max_queue_batches: int = 64
    payload_limit: int = 8_000_000
    timeout: float = 60.0
    tokenization_workers: int = 2


@dataclass
class Usage:
    """What a request cost, for its headers, its log line and the metrics; `deadline` is of time.monotonic."""

    characters: int = 0
    tokens: int = 0
    tokenization: float = 0.0
    timing: Timing = field(default_factory=Timing)
    deadline: float = math.inf


class Server:
    """The models and the queue behind an application."""

    def __init__(self, models: Sequence[ServedModel], limits: Limits) -> None:
        names = [model.name for model in models]
        if not models or len(set(names)) < len(names):
            raise ValueError(f"the models are {', '.join(names) or 'none'}; expected one or more, of different names")
        self.models, self.limits, self.metrics = list(models), limits, Metrics()
        self.batcher = Batcher(
            limits.max_batch_tokens,
            limits.max_batch_tokens * limits.max_queue_batches,
            limits.max_batch_requests,
            self.metrics.on_batch,
        )
        self._threads = ThreadPoolExecutor(limits.tokenization_workers, thread_name_prefix="bert_fast_tokenize")
        self.active = 0

    def model(self, name: str | None, *kinds: str) -> ServedModel:
        """The model of this name, or the first one of the first of these kinds that there is.

        Raises:
            UnknownModelError: there is none.
        """
        if name is not None:
            for model in self.models:
                if model.name == name:
                    model.need(*kinds)
                    return model
            names = ", ".join(model.name for model in self.models)
            raise UnknownModelError(f"there is no model {name!r}; this server has {names}")
        for kind in kinds:
            for model in self.models:
                if model.kind == kind:
                    return model
        served = ", ".join(f"{model.name} ({model.kind})" for model in self.models)
        raise UnknownModelError(f"no model is of kind {' or '.join(kinds)}; this server has {served}")

    def check_count(self, count: int, what: str = "texts") -> None:
        """EmptyInputError or TooLargeError unless a request may have this number of texts."""
        if count == 0:
            raise EmptyInputError(f"there are no {what}; expected one or more")
        if count > self.limits.max_client_batch_size:
            raise TooLargeError(f"there are {count} {what}; expected at most {self.limits.max_client_batch_size}")

    async def tokenize(
        self, request: Request, tokenize: Callable[[], list[Tokens]], texts: Sequence[Any]
    ) -> list[Tokens]:
        """Run `tokenize` in a thread; counts its tokens and characters.

        Raises:
            InvalidInputError: a text is none that UTF-8 can represent.
        """
        usage: Usage = request.state.usage
        start = time.perf_counter()
        tokens = await self.in_thread(request, tokenize, texts)
        usage.tokenization += time.perf_counter() - start
        usage.tokens += sum(len(one.ids) for one in tokens)
        usage.characters += sum(one.characters for one in tokens)
        for one in tokens:
            self.metrics.input_length.observe(len(one.ids))
        self.metrics.tokenization.observe(usage.tokenization)
        return tokens

    async def in_thread(self, request: Request, function: Callable[[], Value], texts: Sequence[Any] = ()) -> Value:
        """Run a function of `texts` in one of the threads of tokenization; given up as `compute` is.

        Raises:
            InvalidInputError: a text is none that UTF-8 can represent.
            ServeError: the client has disconnected, or the deadline has passed.
        """
        try:
            check_texts([text for text in texts if isinstance(text, str)], name="inputs")
        except TypeError as error:
            raise InvalidInputError(str(error)) from None
        work = asyncio.get_running_loop().run_in_executor(self._threads, function)
        return await _while_connected(request, work, _time_left(request))

    async def compute(self, request: Request, compute: Compute, tokens: Sequence[Tokens]) -> list[Any]:
        """The results of `compute` for each of `tokens`, in order; given up when the client disconnects.

        Raises:
            ServeError: see `Batcher.submit`; DisconnectedError.
        """
        usage: Usage = request.state.usage
        lengths = [len(one.ids) for one in tokens]
        left = _time_left(request)
        work = asyncio.ensure_future(self.batcher.submit(compute, tokens, lengths, left))
        results, timing = await _while_connected(request, work, left)
        usage.timing.queue += timing.queue
        usage.timing.inference += timing.inference
        self.metrics.queue.observe(timing.queue)
        self.metrics.inference.observe(timing.inference)
        return results

    def enter(self) -> None:
        """Count a request that is being answered.

        Raises:
            OverloadedError: there are `max_concurrent_requests`.
        """
        if self.active >= self.limits.max_concurrent_requests:
            raise OverloadedError(
                f"{self.active} requests are being answered; this server takes {self.limits.max_concurrent_requests}",
                {"Retry-After": str(self.batcher.retry_after())},
            )
        self.active += 1

    def leave(self) -> None:
        """The end of what `enter` counted."""
        self.active -= 1

    def close(self) -> None:
        """Answer what is in the queue, and end the threads."""
        self.batcher.close(self.limits.timeout)
        self._threads.shutdown(cancel_futures=True)


async def _while_connected(request: Request, work: asyncio.Future[Value], timeout: float) -> Value:
    """The result of `work`, which is cancelled when the client disconnects or `timeout` has passed."""
    gone = asyncio.ensure_future(_disconnected(request))
    both: set[asyncio.Future[Any]] = {work, gone}
    try:
        await asyncio.wait(both, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        if gone.done():
            raise DisconnectedError("the client has disconnected")
        raise DeadlineError("not computed in time")
    finally:
        for future in both:
            future.cancel()


def _time_left(request: Request) -> float:
    usage: Usage = request.state.usage
    return max(0.0, usage.deadline - time.monotonic())


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def server_of(request: Request) -> Server:
    """The server of a request's application."""
    server: Server = request.app.state.server
    return server
