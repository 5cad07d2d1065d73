"""The application: routes, errors, the page at /."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from bert_fast.serve import openai, tei
from bert_fast.serve.answers import json_response
from bert_fast.serve.context import Limits, Server, server_of
from bert_fast.serve.errors import InvalidInputError, ServeError
from bert_fast.serve.metrics import CONTENT_TYPE
from bert_fast.serve.middleware import UNEXPECTED, Requests, error_body
from bert_fast.serve.model import ServedModel

_PAGE = Path(__file__).with_name("page.html")
# The page has its script and style in itself and asks nobody but this server.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"


def create_app(models: Sequence[ServedModel], limits: Limits | None = None, api_key: str | None = None) -> Requests:
    """The ASGI application of a server, for uvicorn or another ASGI server with one worker.

    Args:
        models: one or more, of different names.
        limits: see `Limits`.
        api_key: expected as `Authorization: Bearer KEY` by every route but the page, /health and /ping; None for none.

    Raises:
        ValueError: there is no model, or two have the same name.
    """
    server = Server(models, limits or Limits())

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        server.close()

    app = FastAPI(title="bert_fast", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server
    app.include_router(tei.router)
    app.include_router(openai.router)
    app.add_api_route("/", _page, methods=["GET"], include_in_schema=False)
    app.add_api_route("/metrics", _metrics, methods=["GET"])
    app.add_exception_handler(ServeError, _on_error)
    app.add_exception_handler(Exception, _on_unexpected)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(ValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(404, _on_http_error)
    app.add_exception_handler(405, _on_http_error)
    return Requests(app, server, api_key)


async def _page() -> Response:
    headers = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}
    return Response(_PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=headers)


async def _metrics(request: Request) -> Response:
    server = server_of(request)
    return Response(server.metrics.text(server.batcher.waiting_jobs), media_type=CONTENT_TYPE)


async def _on_error(request: Request, error: Any) -> Response:
    return json_response(error_body(request.url.path, error), error.status, error.headers)


async def _on_unexpected(request: Request, _: Any) -> Response:
    return await _on_error(request, ServeError(UNEXPECTED))


async def _on_invalid(request: Request, error: Any) -> Response:
    """pydantic's first error as a sentence: the field, what came, what was expected."""
    first = error.errors()[0]
    names = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not names:
        problem = first.get("ctx", {}).get("error", first["msg"])
        return await _on_error(request, InvalidInputError(f"the body is no JSON object: {problem}"))
    # The errors of a union are those of each of its members, one by one; what came is that of the field.
    message = f"{names[0]} is {'missing' if first['type'] == 'missing' else _shown(error, names[0])}"
    expected = _EXPECTED.get(names[0], first["msg"].replace("Input should be ", ""))
    return await _on_error(request, InvalidInputError(f"{message}; expected {expected}"))


def _shown(error: Any, name: str) -> str:
    body = getattr(error, "body", None)
    value = body[name] if isinstance(body, dict) and name in body else error.errors()[0]["input"]
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]} ..."


_EXPECTED = {
    "inputs": "a text or a list of texts; to embed also token ids, to predict also lists of two texts",
    "input": "a text, a list of texts, a list of token ids, or a list of such lists",
    "documents": 'a list of texts, or of objects like {"text": "..."}',
}


async def _on_http_error(request: Request, error: Any) -> Response:
    wrapped = InvalidInputError(str(error.detail))
    wrapped.status = error.status_code
    wrapped.kind = "Validation"
    return json_response(error_body(request.url.path, wrapped), error.status_code)
