"""Clients that read nothing, go away, or send what costs a server most: what they take is given back."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import serving
from tests.serve.test_bad_requests import connect

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")

LARGEST = 7_900_000  # bytes; the limit is 8,000,000


def _request(body: bytes, length: int | None = None) -> bytes:
    head = "POST /embed HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    return f"{head}{len(body) if length is None else length}\r\n\r\n".encode() + body


def _memory(process: subprocess.Popen[str], field: str) -> int:
    """VmRSS or VmHWM, its maximum, in MiB."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) // 1024


@pytest.fixture
def stalled() -> Any:
    """Makes clients that ask again and again, and read no answer."""
    made = []

    def ask(url: str) -> socket.socket:
        connection = connect(url)
        made.append(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(2)
        body = json.dumps({"inputs": ["the cat"] * 2000}).encode()
        with contextlib.suppress(TimeoutError):  # neither side takes more
            connection.sendall(_request(body) * 20)
        return connection

    yield ask
    for connection in made:
        connection.close()


def test_a_client_that_reads_nothing_loses_its_place(folders: dict[str, Path], stalled: Any) -> None:
    arguments = ["--timeout", 4, "--max_concurrent_requests", 1, "--precision", "fp32", "--log", "none"]
    with serving(folders["embedder"], *arguments) as running:
        stalled(running.url)
        assert running.client.post("/embed", json={"inputs": "a"}).status_code == 429
        deadline = time.monotonic() + 40
        while running.client.post("/embed", json={"inputs": "a"}).status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_sigterm_does_not_wait_for_a_client_that_reads_nothing(folders: dict[str, Path], stalled: Any) -> None:
    with serving(folders["embedder"], "--timeout", 4, "--precision", "fp32", "--log", "none") as running:
        stalled(running.url)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(40) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)


@pytest.mark.parametrize("item", ["null", "1.5", '"a",[1,2]'])
@pytest.mark.parametrize("path", ["/embed", "/predict", "/v1/rerank"])
def test_the_errors_of_a_large_body_take_little(server: Any, path: str, item: str) -> None:
    """Those of every item took gigabytes and minutes."""
    body = ",".join([item] * (LARGEST // (len(item) + 1)))
    field = {"/embed": "inputs", "/predict": "inputs", "/v1/rerank": "documents"}[path]
    before = _memory(server.process, "VmHWM")
    content = f'{{"query": "a", "{field}": [{body}]}}'
    answer = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert len(answer.text) < 1000
    assert _memory(server.process, "VmHWM") - before < 1500  # the parsed lists are some 400 MiB


@pytest.mark.parametrize(
    ("path", "content", "status", "message"),
    [
        ("/", '{"inputs": "a", "parameters": 3}', 422, "parameters is a int; expected an object"),
        ("/", '{"inputs": "a", "parameters": [1]}', 422, "parameters is a list"),
        ("/similarity", '{"inputs": {"source_sentence": "a", "sentences": ["b"]}, "parameters": {"prompt_name": []}}',
         422, 'parameters is {"prompt_name": []}'),
        ("/decode", '{"ids": []}', 400, "there are no lists of ids"),
        ("/tokenize", '{"inputs": []}', 400, "there are no texts"),
        ("/tokenize", r'{"inputs": "\ud800"}', 422, "lone surrogate U+D800"),
    ],
)  # fmt: skip
def test_wrong_bodies_that_no_route_foresaw(server: Any, path: str, content: str, status: int, message: str) -> None:
    answer = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status, answer.text
    assert message in answer.json()["error"]


def test_a_request_id_that_ends_with_a_space_when_cut(server: Any) -> None:
    answer = server.client.post("/embed", json={"inputs": "a"}, headers={"X-Request-Id": "a" * 199 + " b"})
    assert answer.headers["x-request-id"] == "a" * 199


def test_a_body_whose_client_has_gone_is_not_computed(folders: dict[str, Path]) -> None:
    with serving(folders["embedder"]) as running:
        with connect(running.url) as connection:
            connection.sendall(_request(b'{"inputs": "a"}', length=100))
            time.sleep(0.2)
        assert running.process.stderr is not None
        entry = json.loads(running.process.stderr.readline())
        assert (entry["status"], entry["tokens"]) == (499, 0)


def test_what_waits_for_tokenization_is_given_up_as_well(folders: dict[str, Path]) -> None:
    """One thread, long texts, and clients that go: the next client doesn't wait for their texts."""
    body = json.dumps({"inputs": "the cat " * 150_000}).encode()
    arguments = ["--tokenization_workers", 1, "--max_concurrent_requests", 20, "--timeout", 30, "--log", "none"]
    with serving(folders["embedder"], *arguments) as running:
        start = time.monotonic()
        running.client.post("/embed", content=body, headers={"Content-Type": "application/json"}).raise_for_status()
        one = time.monotonic() - start
        for _ in range(12):
            with connect(running.url) as connection:
                connection.sendall(_request(body))
        start = time.monotonic()
        assert running.client.post("/embed", json={"inputs": "a"}).status_code == 200
        assert time.monotonic() - start < 6 * one


def test_many_clients_that_go_leave_no_place_taken_and_no_memory(folders: dict[str, Path]) -> None:
    def client(seed: int, requests: int, losses: list[Any], *, going: bool) -> None:
        generator = random.Random(seed)
        with httpx.Client(base_url=running.url, timeout=60) as own:
            for _ in range(requests):
                texts = ["the cat sat " * generator.randint(0, 12) for _ in range(generator.randint(1, 6))]
                try:
                    answer = own.post("/embed", json={"inputs": texts}, timeout=generator.random() / 5 if going else 60)
                except httpx.TimeoutException:
                    if not going:
                        losses.append("no answer")
                    continue
                if answer.status_code != 200 or len(answer.json()) != len(texts):
                    losses.append(answer.status_code)

    def load(clients: int, requests: int, *, going: bool) -> list[Any]:
        losses: list[Any] = []
        threads = [
            threading.Thread(target=client, args=(seed, requests, losses), kwargs={"going": going})
            for seed in range(clients)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        return losses

    arguments = ["--max_concurrent_requests", 40, "--precision", "fp32", "--log", "none"]
    with serving(folders["embedder"], *arguments) as running:
        assert load(30, 10, going=False) == []
        load(30, 10, going=True)
        before = _memory(running.process, "VmRSS")
        assert load(30, 30, going=False) == []  # of 40 places none is lost
        assert _memory(running.process, "VmRSS") - before < 60
        assert "te_queue_size 0.0" in running.client.get("/metrics").text


def test_sigkill_under_load_ends_every_client_at_once(folders: dict[str, Path]) -> None:
    with serving(folders["embedder"], "--max_batch_tokens", 16, "--log", "none") as running:
        connections = [connect(running.url) for _ in range(20)]
        for connection in connections:
            connection.sendall(_request(json.dumps({"inputs": ["the cat"] * 1000}).encode()))
        time.sleep(0.3)
        port = int(running.url.rpartition(":")[2])
        running.process.kill()
        running.process.wait()
        for connection in connections:
            connection.settimeout(10)
            try:
                while connection.recv(65536):
                    pass
            except ConnectionError:
                pass
            connection.close()
        with serving(folders["embedder"], "--log", "none", "--port", port) as again:
            assert again.client.post("/embed", json={"inputs": "a"}).status_code == 200


def test_the_page_is_shown_where_a_key_is_asked_for(folders: dict[str, Path], tmp_path: Path) -> None:
    """It has the field for the key."""
    (tmp_path / "key").write_text("secret\n")
    with serving(folders["embedder"], "--api_key_file", tmp_path / "key", "--log", "none") as running:
        assert "API key" in running.client.get("/").raise_for_status().text
        assert running.client.post("/", json={"inputs": "a"}).status_code == 401


def test_a_folder_with_an_equals_sign_has_no_name_in_it(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "run=3").symlink_to(folders["embedder"])
    for argument in (tmp_path / "run=3", f"other={folders['embedder']}"):
        with serving(argument, "--log", "none") as running:
            names = [model["id"] for model in running.client.get("/v1/models").json()["data"]]
            assert names == [str(argument).rpartition("/")[2] if isinstance(argument, Path) else "other"]
