"""The clients that people have: openai, huggingface_hub's InferenceClient, curl."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

from tests.serve.conftest import TEXTS, serving

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
openai = pytest.importorskip("openai")

FILLED = [text for text in TEXTS if text]


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> np.ndarray[Any, Any]:
    """sentence-transformers' vectors of `FILLED`."""
    transformer = Transformer(str(folders["embedder"]))
    model = SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu")
    return np.asarray(model.encode(FILLED, normalize_embeddings=True))


def close(found: Any, expected: Any) -> None:
    # Two computations in float32 of numbers below 1: eps (6e-8) times some ten roundings a layer.
    np.testing.assert_allclose(np.array(found), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("encoding_format", ["float", "base64", None])
def test_openai(server: Any, expected: Any, encoding_format: Any) -> None:
    # Without a format the client itself asks for base64.
    format_of = {} if encoding_format is None else {"encoding_format": encoding_format}
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        answer = client.embeddings.create(model="embedder", input=FILLED, **format_of)
        if encoding_format != "base64":
            close([entry.embedding for entry in answer.data], expected)
        assert answer.usage.prompt_tokens > 0
        assert next(model.id for model in client.models.list()) == "embedder"
        short = client.embeddings.create(model="embedder", input=FILLED[0], dimensions=4)
        cut = expected[0, :4]
        close(short.data[0].embedding, cut / np.linalg.norm(cut))
        with pytest.raises(openai.NotFoundError, match="there is no model 'gpt'"):
            client.embeddings.create(model="gpt", input="a")
        with pytest.raises(openai.UnprocessableEntityError, match="dimensions is 33"):
            client.embeddings.create(model="embedder", input="a", dimensions=33)


def test_huggingface_hub(server: Any, folders: dict[str, Path], expected: Any) -> None:
    client = huggingface_hub.InferenceClient(server.url)
    close(client.feature_extraction(FILLED[0], normalize=True)[0], expected[0])
    cosines = client.sentence_similarity(FILLED[0], other_sentences=FILLED[1:])
    close(cosines, expected[1:] @ expected[0])
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="422"):
        client.feature_extraction(FILLED[0], prompt_name="none")
    with serving(folders["classifier"], "--precision", "fp32", "--log", "none") as running:
        found = huggingface_hub.InferenceClient(running.url).text_classification(FILLED[0])
        direct = server.client.post("/predict", json={"inputs": FILLED[0]}).json()
        assert [(one.label, one.score) for one in found] == [(one["label"], one["score"]) for one in direct]


def test_curl(server: Any, expected: Any) -> None:
    command = ["curl", "--silent", "--show-error", "--fail", f"{server.url}/embed", "--json"]
    done = subprocess.run([*command, json.dumps({"inputs": FILLED})], capture_output=True, check=True)
    close(json.loads(done.stdout), expected)
    compressed = subprocess.run(
        ["curl", "--silent", "--http1.0", f"{server.url}/health", "--write-out", "%{http_code}"],
        capture_output=True,
        check=True,
    )
    assert compressed.stdout.endswith(b"200")
