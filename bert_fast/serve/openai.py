"""OpenAI's /v1/embeddings and /v1/models, and /v1/rerank as Cohere and Jina have it."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Request

from bert_fast.serve import schemas
from bert_fast.serve.answers import json_response
from bert_fast.serve.context import Usage, server_of
from bert_fast.serve.errors import EmptyInputError
from bert_fast.serve.tei import as_list, embed, rank

router = APIRouter(prefix="/v1")


@router.post("/embeddings")
async def embeddings(request: Request, body: schemas.OpenAIEmbeddings) -> Any:
    """Vectors of length 1, as OpenAI's are; `dimensions` keeps the first components, then scales."""
    server = server_of(request)
    model = server.model(body.model, "embedding")
    texts, _ = as_list(body.input)
    if any(text == "" for text in texts):
        raise EmptyInputError(f"input has an empty text at index {texts.index('')}; OpenAI's API takes none")
    vectors = await embed(server, request, model, texts, normalize=True, dimensions=body.dimensions)
    usage: Usage = request.state.usage
    return json_response(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _encoded(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "model": model.name,
            "usage": {"prompt_tokens": usage.tokens, "total_tokens": usage.tokens},
        }
    )


def _encoded(vector: np.ndarray[Any, Any], encoding: str) -> Any:
    if encoding == "float":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


@router.get("/models")
async def models(request: Request) -> Any:
    """The names of the models."""
    server = server_of(request)
    listed = [{"id": model.name, "object": "model", "created": 0, "owned_by": "bert_fast"} for model in server.models]
    return json_response({"object": "list", "data": listed})


@router.post("/rerank")
async def rerank(request: Request, body: schemas.V1Rerank) -> Any:
    """Documents in the order of their scores for a query."""
    server = server_of(request)
    model = server.model(body.model, "reranker")
    texts = [document if isinstance(document, str) else document.text for document in body.documents]
    ranked = (await rank(server, request, model, body.query, texts, raw_scores=False))[: body.top_n]
    usage: Usage = request.state.usage
    return json_response(
        {
            "model": model.name,
            "results": [
                {
                    "index": index,
                    "relevance_score": score,
                    **({"document": {"text": texts[index]}} if body.return_documents else {}),
                }
                for index, score in ranked
            ],
            "usage": {"total_tokens": usage.tokens},
        }
    )
