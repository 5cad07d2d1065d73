"""An embeddings server as a subject: OpenAI's dialect, or that of text-embeddings-inference (TEI)."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bert_fast.invariants.checks import RefusedError

DIALECTS = ("auto", "openai", "tei")
_REFUSALS = (400, 413, 422)  # the text is empty, or too long


class EndpointError(OSError):
    """The server can't be reached, or answers with something else than vectors."""


class Endpoint:
    """Embeds texts by a server.

    Args:
        url: of the server ("http://localhost:8080"), or of its route ("http://host/v1/embeddings", "http://host/embed").
        dialect: "openai", "tei", or "auto" for that of the route, else TEI's where the server has /info.
        model: the model's name in OpenAI's dialect.
        headers: further headers, such as Authorization.
        timeout: seconds for an answer.

    Raises:
        ValueError: `url` is no http or https URL, or `dialect` is unknown.
        EndpointError: the server can't be reached.
    """

    def __init__(
        self,
        url: str,
        *,
        dialect: str = "auto",
        model: str = "",
        headers: dict[str, str] | None = None,
        timeout: float = 60.0,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(f"endpoint is {url!r}; expected a URL, such as http://localhost:8080")
        if dialect not in DIALECTS:
            raise ValueError(f"dialect is {dialect!r}; expected one of {', '.join(DIALECTS)}")
        self.headers, self.model, self.timeout = dict(headers or {}), model, timeout
        base = url.rstrip("/")
        if dialect == "auto":
            dialect = self._dialect(base)
        self.dialect = dialect
        if dialect == "openai":
            base = base if base.endswith("/embeddings") else f"{base}{'' if base.endswith('/v1') else '/v1'}/embeddings"
        elif not base.endswith("/embed"):
            base = f"{base}/embed"
        self.url = base
        self.name = f"{self.url} ({dialect})"

    def _dialect(self, base: str) -> str:
        if base.endswith(("/v1", "/embeddings")):
            return "openai"
        if base.endswith("/embed"):
            return "tei"
        try:
            self._request(f"{base}/info", None)
        except RefusedError:
            return "openai"
        except EndpointError as error:
            if isinstance(error.__cause__, urllib.error.HTTPError):
                return "openai"
            raise
        return "tei"

    def embed(self, texts: Sequence[str]) -> Tensor:
        """The vectors (number of texts, D) in float64.

        Raises:
            RefusedError: the server does not take a text (status 400, 413 or 422).
            EndpointError: it answers with another error, or with something that is no list of vectors.
        """
        if self.dialect == "openai":
            answer = self._request(self.url, {"input": list(texts), "model": self.model, "encoding_format": "float"})
            rows = answer.get("data") if isinstance(answer, dict) else None
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise EndpointError(f"{self.url} answered without data; expected OpenAI's list of embeddings")
            indices = [row.get("index", position) for position, row in enumerate(rows)]
            if sorted(indices) != list(range(len(texts))):
                raise EndpointError(
                    f"{self.url} answered with the indices {indices[:5]}; expected 0 to {len(texts) - 1}"
                )
            vectors = [
                row.get("embedding") for _, row in sorted(zip(indices, rows, strict=True), key=lambda pair: pair[0])
            ]
        else:
            vectors = self._request(self.url, {"inputs": list(texts), "truncate": True})
        try:
            result = torch.tensor(vectors, dtype=torch.float64)
        except (ValueError, TypeError) as error:
            raise EndpointError(f"{self.url} answered with no vectors of one size: {error}") from None
        if result.dim() != 2 or len(result) != len(texts):
            raise EndpointError(
                f"{self.url} answered with shape {tuple(result.shape)}; expected {len(texts)} vectors for as many texts"
            )
        return result

    def _request(self, url: str, body: Any) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **self.headers}
        request = urllib.request.Request(url, data=data, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            text = error.read(500).decode("utf-8", "replace")
            if error.code in _REFUSALS and body is not None:
                raise RefusedError(f"HTTP {error.code} {' '.join(text.split())[:200]}") from None
            raise EndpointError(f"{url} answered with HTTP {error.code}: {' '.join(text.split())[:200]}") from error
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            raise EndpointError(f"{url}: {getattr(error, 'reason', error)}") from None
        except ValueError as error:
            raise EndpointError(f"{url} answered with no JSON: {error}") from None
