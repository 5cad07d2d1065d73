"""The end of a server: SIGTERM under load answers what was asked, SIGINT as well, and the port is free again."""

from __future__ import annotations

import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.serve.conftest import serving

pytest.importorskip("fastapi")
httpx = pytest.importorskip("httpx")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_under_load_loses_no_request(folders: dict[str, Path], number: signal.Signals) -> None:
    texts = ["the cat sat on a mat"] * 2000
    with serving(
        folders["embedder"],
        "--max_batch_tokens",
        16,
        "--max_queue_batches",
        10**5,
        "--precision",
        "fp32",
        "--log",
        "none",
    ) as running:
        answers: list[Any] = []
        started = threading.Barrier(9)

        def ask() -> None:
            with httpx.Client(base_url=running.url, timeout=120) as client:
                client.get("/health")  # the connection is there before the signal
                started.wait()
                answers.append(client.post("/embed", json={"inputs": texts}))

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        started.wait()
        before = time.monotonic()
        while _counted(running, "te_request_count") < 8:
            assert time.monotonic() - before < 60
        assert _counted(running, "te_request_success") < 8
        running.process.send_signal(number)
        for thread in threads:
            thread.join(120)
        assert running.process.wait(60) in (0, -number, 128 + number)
        assert [answer.status_code for answer in answers] == [200] * 8
        assert all(len(answer.json()) == 2000 for answer in answers)


def _counted(running: Any, name: str) -> float:
    lines = running.client.get("/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f'{name}{{method="embed"}}'))


def test_a_killed_server_leaves_its_port(folders: dict[str, Path]) -> None:
    with serving(folders["embedder"], "--log", "none") as running:
        port = int(running.url.rpartition(":")[2])
        running.process.kill()
        running.process.wait()
        with serving(folders["embedder"], "--log", "none", "--port", port) as again:
            assert again.url == running.url
            assert again.client.post("/embed", json={"inputs": "a"}).status_code == 200


def test_a_port_in_use_is_one_sentence(folders: dict[str, Path]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(AssertionError, match=f"bert-fast serve: error: .*{port}"),
            serving(folders["embedder"], "--log", "none", "--port", port),
        ):
            pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--timeout", "0"], "timeout is 0"),
        (["--max_batch_tokens", "-1"], "max_batch_tokens is -1"),
        (["--api_key_file", "/dev/null"], "the API key of /dev/null is empty"),
        (["--port", "70000"], "port"),
    ],
)
def test_wrong_settings_are_one_sentence(folders: dict[str, Path], arguments: list[str], message: str) -> None:
    with (
        pytest.raises(AssertionError, match="bert-fast serve: error: ") as caught,
        serving(folders["embedder"], *arguments),
    ):
        pass
    assert message in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_two_models_of_one_name_are_refused(folders: dict[str, Path]) -> None:
    with (
        pytest.raises(AssertionError, match="expected one or more, of different names"),
        serving(f"a={folders['embedder']}", f"a={folders['filler']}"),
    ):
        pass
