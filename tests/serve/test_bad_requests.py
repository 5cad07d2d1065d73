"""Bodies that are wrong, too large, slow or hostile: the status, the sentence, and a server that goes on."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.serve.conftest import serving

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

BAD = [
    ("/embed", {"inputs": 3}, 422, "inputs is 3; expected a text or a list of texts"),
    ("/embed", {"inputs": ["a", 3]}, 422, 'inputs is ["a", 3]; expected a text or a list of texts'),
    ("/embed", {"inputs": [True]}, 422, "inputs is [true]"),
    ("/embed", {"inputs": None}, 422, "inputs is null"),
    ("/embed", {}, 422, "inputs is missing"),
    ("/embed", [], 422, "the body is no JSON object"),
    ("/embed", {"inputs": []}, 400, "there are no texts"),
    ("/embed", {"inputs": ["a"] * 65}, 413, "there are 65 texts; expected at most 64"),
    ("/embed", {"inputs": "a", "normalize": "yes"}, 422, 'normalize is "yes"'),
    ("/embed", {"inputs": "a", "dimensions": 0}, 422, "dimensions is 0"),
    ("/embed", {"inputs": "a", "dimensions": 33}, 422, "dimensions is 33; expected 1 to 32"),
    ("/embed", {"inputs": "a", "prompt_name": "x"}, 422, "prompt_name is 'x'"),
    ("/embed", {"inputs": [7, 20000]}, 422, "the token id 20000 is none of the model's; expected 0 to 19"),
    ("/embed", {"inputs": [-1]}, 422, "the token id -1"),
    ("/embed", {"inputs": [10**30]}, 422, ""),
    ("/embed", {"inputs": "a", "model": "unknown"}, 404, "there is no model 'unknown'; this server has embedder"),
    ("/embed", {"inputs": "a", "model": "reranker"}, 404, "reranker is of kind reranker; this route needs embedding"),
    ("/embed", {"inputs": "a", "truncation_direction": "up"}, 422, 'truncation_direction is "up"'),
    ("/rerank", {"query": "a", "texts": []}, 400, "there are no texts"),
    ("/rerank", {"query": "a"}, 422, "texts is missing"),
    ("/rerank", {"query": ["a"], "texts": ["b"]}, 422, 'query is ["a"]'),
    ("/predict", {"inputs": [["a", "b", "c"]]}, 422, "inputs is"),
    ("/predict", {"inputs": ["a", "b", "c"]}, 422, "more than two texts"),
    ("/predict", {"inputs": [["a"], ["b", "c"]]}, 422, "inputs has texts and pairs"),
    ("/fill_mask", {"inputs": "the cat"}, 422, "inputs has no [MASK]"),
    ("/decode", {"ids": [99]}, 422, "none of the model's 20"),
    ("/similarity", {"inputs": {"source_sentence": "a"}}, 422, "inputs"),
    ("/", {}, 400, "the body has no inputs"),
    ("/none", {"inputs": "a"}, 404, "Not Found"),
]


@pytest.mark.parametrize(("path", "body", "status", "message"), BAD)
def test_wrong_bodies(server: Any, path: str, body: Any, status: int, message: str) -> None:
    answer = server.client.post(path, json=body)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error", "error_type"}
    assert message in answer.json()["error"]
    assert len(answer.json()["error"]) < 1000


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"input": ""}, 400, "input has an empty text at index 0"),
        ({"input": "a", "encoding_format": "hex"}, 422, 'encoding_format is "hex"'),
        ({"input": "a", "model": "gpt"}, 404, "there is no model 'gpt'"),
        ({}, 422, "input is missing"),
    ],
)
def test_errors_of_v1_are_in_openais_form(server: Any, body: Any, status: int, message: str) -> None:
    answer = server.client.post("/v1/embeddings", json=body)
    assert answer.status_code == status
    assert message in answer.json()["error"]["message"]
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b'{"inputs": "a"', 422),
        (b'{"inputs": NaN}', 422),
        (b'{"inputs": "\\ud800"}', 422),
        (b'{"inputs": ["a", "\\udfff b"]}', 422),
        (b'{"inputs": "\xff\xfe"}', 400),
        (b'{"inputs": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", 400),
        (b'{"inputs": "a", "inputs": 3}', 422),
        (b'{"inputs": ' + b"9" * 5000 + b"}", 400),
        (b'{"inputs": "' + b"a" * 9_000_000 + b'"}', 413),
    ],
)
def test_hostile_bodies(server: Any, content: bytes, status: int) -> None:
    answer = server.client.post("/embed", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text[:300]
    assert len(answer.text) < 1000
    assert server.client.post("/embed", json={"inputs": "a"}).status_code == 200


def test_other_content_types_and_methods(server: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = server.client.post("/embed", content=b'{"inputs": "a"}', headers={"Content-Type": kind})
        assert answer.status_code == 415
        assert "expected application/json" in answer.json()["error"]
    assert server.client.get("/embed").status_code == 405
    assert server.client.delete("/info").status_code == 405


def test_a_chunked_body_is_limited_as_well(server: Any) -> None:
    def chunks() -> Any:
        for _ in range(200):
            yield b" " * 100_000

    headers = {"Content-Type": "application/json"}
    try:
        answer = server.client.post("/embed", content=chunks(), headers=headers)
        assert answer.status_code == 413
    except httpx.WriteError:
        pass  # the server has answered and closed the connection before everything was sent
    assert server.client.post("/embed", json={"inputs": "a"}).status_code == 200


def connect(url: str) -> socket.socket:
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def test_a_body_that_never_ends_is_given_up(folders: dict[str, Path]) -> None:
    with serving(folders["embedder"], "--timeout", 4, "--log", "none") as running:
        head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        with connect(running.url) as connection:
            connection.sendall(head.encode() + b'{"inputs"')
            answer = connection.recv(65536)
        assert b" 504 " in answer.split(b"\r\n")[0]
        assert running.client.post("/embed", json={"inputs": "a"}).status_code == 200


def test_half_open_clients_take_no_place(folders: dict[str, Path]) -> None:
    with serving(folders["embedder"], "--max_concurrent_requests", 2, "--log", "none") as running:
        idle = [connect(running.url) for _ in range(20)]  # that send nothing
        for connection in idle[:10]:
            connection.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\n")
        assert running.client.post("/embed", json={"inputs": "a"}).status_code == 200
        for connection in idle:
            connection.close()


def test_the_api_key_is_asked_for_everywhere_but_by_health(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    with serving(folders["embedder"], "--api_key_file", tmp_path / "key", "--log", "none") as running:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "secret"},
            {"Authorization": "Basic secret"},
        ):
            for path in ("/embed", "/v1/embeddings", "/"):
                answer = running.client.post(path, json={"inputs": "a"}, headers=headers)
                assert answer.status_code == 401
            assert running.client.get("/metrics", headers=headers).status_code == 401
            assert running.client.get("/info", headers=headers).status_code == 401
        assert running.client.get("/health").status_code == 200
        answer = running.client.post("/embed", json={"inputs": "a"}, headers={"Authorization": "Bearer secret"})
        assert answer.status_code == 200


def test_the_log_is_one_json_line_a_request(folders: dict[str, Path]) -> None:
    with serving(folders["embedder"]) as running:
        running.client.post("/embed", json={"inputs": ["the cat", "a dog"]})
        running.client.get("/no%1b%5b31m%0aroute")
        assert running.process.stderr is not None
        first, second = (json.loads(running.process.stderr.readline()) for _ in range(2))
        assert (first["path"], first["status"], first["tokens"]) == ("/embed", 200, 8)
        assert first["ms"] >= first["inference_ms"] > 0
        assert second["status"] == 404


def test_requests_beyond_the_limit_are_refused(folders: dict[str, Path]) -> None:
    with serving(folders["embedder"], "--max_concurrent_requests", 1, "--timeout", 20, "--log", "none") as running:
        with connect(running.url) as slow:
            slow.sendall(
                b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
            )
            deadline = time.monotonic() + 20
            while (answer := running.client.post("/embed", json={"inputs": "a"})).status_code == 200:
                assert time.monotonic() < deadline
            assert answer.status_code == 429
            assert int(answer.headers["retry-after"]) >= 1
            slow.sendall(b'{"inputs": "a"}')
            assert b" 200 " in slow.recv(65536).split(b"\r\n")[0]
        assert running.client.post("/embed", json={"inputs": "a"}).status_code == 200
