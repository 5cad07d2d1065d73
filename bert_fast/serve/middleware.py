"""What stands before the routes: limits of bodies, the API key, one log line a request, headers of time and usage."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from bert_fast.serve.answers import json_response
from bert_fast.serve.context import Server, Usage
from bert_fast.serve.errors import (
    DeadlineError,
    DisconnectedError,
    MediaTypeError,
    ServeError,
    TooLargeError,
    UnauthorizedError,
)

_logger = logging.getLogger("bert_fast.serve")
_OPEN = ("/health", "/ping")  # without an API key: what asks whether the server lives has none
_LONGEST_NAME = 200
UNEXPECTED = "an unexpected error; the log of the server says more"


def error_body(path: str, error: ServeError) -> dict[str, Any]:
    """The JSON of an error: OpenAI's under /v1, else TEI's."""
    if path.startswith("/v1/"):
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return {"error": {"message": str(error), "type": kind, "param": None, "code": error.kind.lower()}}
    return {"error": str(error), "error_type": error.kind}


class Requests:
    """ASGI middleware around the application.

    A body is read here, up to a size and within a time, so that a route never waits for a slow client; the number of
    requests that are answered at a time is limited.

    Args:
        app: the application.
        server: whose limits and metrics are used.
        api_key: expected as `Authorization: Bearer KEY`; None for none.
    """

    def __init__(self, app: ASGIApp, server: Server, api_key: str | None = None) -> None:
        self.app, self.server = app, server
        self._key = None if api_key is None else hashlib.sha256(api_key.encode()).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        usage, headers = Usage(), {name.lower(): value for name, value in scope["headers"]}
        scope.setdefault("state", {})["usage"] = usage
        # Cut, then stripped: a header that ends with a space can't be sent.
        request_id = headers.get(b"x-request-id", b"").decode("latin-1")[:_LONGEST_NAME].strip() or uuid.uuid4().hex
        method = scope["path"].lstrip("/").split("/")[-1] or "root"
        status: list[int] = []

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                message["headers"] = [*message.get("headers", []), *_headers(usage, start, request_id)]
            await send(message)

        try:
            self._authorize(scope, headers)
            if scope["method"] != "POST":
                await self.app(scope, receive, send_with_headers)
            else:
                self.server.metrics.requests.labels(method if method in _COUNTED else "other").inc()
                _check_type(headers)
                self.server.enter()
                try:
                    complete = await self._body(receive, headers)
                    usage.deadline = time.monotonic() + self.server.limits.timeout
                    await self.app(scope, complete, send_with_headers)
                finally:
                    self.server.leave()
        except Exception as error:  # also what a route did not foresee: the client gets an error of the usual form
            if not isinstance(error, ServeError):
                _logger.error("an unexpected error: %s", error, exc_info=error)
            if not status:
                shown = error if isinstance(error, ServeError) else ServeError(UNEXPECTED)
                answer = json_response(error_body(scope["path"], shown), shown.status, shown.headers)
                await answer(scope, receive, send_with_headers)
        finally:
            self._record(scope, method, status[0] if status else 499, usage, start, request_id)

    def _authorize(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        page = scope["method"] == "GET" and scope["path"] == "/"  # it says nothing of the models, and asks for the key
        if self._key is None or page or scope["path"] in _OPEN:
            return
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        # Of digests: the time of the comparison depends on neither key.
        if scheme.lower() != b"bearer" or not hmac.compare_digest(hashlib.sha256(key.strip()).digest(), self._key):
            raise UnauthorizedError("the API key is missing or wrong; expected Authorization: Bearer KEY")

    async def _body(self, receive: Receive, headers: dict[bytes, bytes]) -> Receive:
        """Read the body; returns the `receive` of the application, which has it at once."""
        limit = self.server.limits.payload_limit
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > limit:
            raise TooLargeError(f"the body has {int(length)} bytes; expected at most {limit}")
        try:
            body = await asyncio.wait_for(_read(receive, limit), self.server.limits.timeout)
        except asyncio.TimeoutError:
            raise DeadlineError(f"the body was not complete within {self.server.limits.timeout:g} s") from None
        first = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            message = next(first, None)
            if message is not None:
                return message
            return await receive()

        return replay

    def _record(self, scope: Scope, method: str, status: int, usage: Usage, start: float, request_id: str) -> None:
        seconds = time.perf_counter() - start
        if scope["method"] == "POST":
            if status < 400:
                self.server.metrics.successes.labels(method if method in _COUNTED else "other").inc()
            else:
                self.server.metrics.failures.labels(_ERRORS.get(status, "other")).inc()
            self.server.metrics.duration.observe(seconds)
        entry = {
            "request_id": request_id,
            "client": (scope.get("client") or ("",))[0],
            "method": scope["method"],
            "path": scope["path"][:_LONGEST_NAME],
            "status": status,
            "ms": round(seconds * 1000, 2),
            "tokens": usage.tokens,
            "queue_ms": round(usage.timing.queue * 1000, 2),
            "inference_ms": round(usage.timing.inference * 1000, 2),
        }
        _logger.info(json.dumps(entry))  # JSON escapes what a path could do to a terminal


_COUNTED = (
    "embed", "embed_all", "embed_sparse", "similarity", "rerank", "predict", "tokenize", "decode", "fill_mask",
    "entities", "embeddings", "root",
)  # fmt: skip
_ERRORS = {400: "empty", 401: "unauthorized", 413: "validation", 422: "tokenizer", 424: "inference", 429: "overloaded",
           499: "disconnected", 503: "unhealthy", 504: "timeout"}  # fmt: skip


def _check_type(headers: dict[bytes, bytes]) -> None:
    """A page of another site can send a form without asking, but no JSON."""
    kind = headers.get(b"content-type", b"").decode("latin-1")
    if kind.partition(";")[0].strip().lower() != "application/json":
        raise MediaTypeError(f"Content-Type is {kind[:_LONGEST_NAME]!r}; expected application/json")


async def _read(receive: Receive, limit: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError("the client has disconnected")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise TooLargeError(f"the body has more than {limit} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


def _headers(usage: Usage, start: float, request_id: str) -> list[tuple[bytes, bytes]]:
    """TEI's headers of time, in milliseconds, and usage."""
    values = {
        "x-request-id": request_id,
        "x-compute-type": "bert_fast",
        "x-total-time": _ms(time.perf_counter() - start),
        "x-tokenization-time": _ms(usage.tokenization),
        "x-queue-time": _ms(usage.timing.queue),
        "x-inference-time": _ms(usage.timing.inference),
        "x-compute-characters": str(usage.characters),
        "x-compute-tokens": str(usage.tokens),
    }
    return [(name.encode(), value.encode("latin-1")) for name, value in values.items()]


def _ms(seconds: float) -> str:
    return str(round(seconds * 1000))
