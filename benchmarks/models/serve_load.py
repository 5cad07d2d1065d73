"""A server under load: `bert-fast serve`, and the servers that people use in its place, on the loopback address.

    python -m benchmarks.models.serve_load MODEL [--clients 200] [--seconds 120] [--quick] [--record]

Every server runs in a process of its own and is loaded alone, one after the other, in --rounds turns. Each client sends
a paragraph of the built-in documentation, waits for its vector and sends the next. What is counted: answers a second,
the 50th and 99th percentile of the time of an answer, requests without an answer (none may be lost), and the smallest
cosine to sentence-transformers' vectors, over one answer in 20.

The client and the servers share the cores; the client writes prepared bytes and parses those answers alone.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks.models.encode_speed import paragraphs
from bert_fast.bench.devices import environment, reason
from bert_fast.bench.runner import arguments, exit_code, parse, write

PARSED = 20  # one answer in this number is compared

# What people write themselves: one model, a thread for each request, as FastAPI runs functions that are not async.
BARE = """
import sys, threading, uvicorn
from fastapi import FastAPI
from sentence_transformers import SentenceTransformer
model, app, lock = SentenceTransformer(sys.argv[1], device="cpu"), FastAPI(), threading.Lock()

@app.post("/embed")
def embed(body: dict):
    with lock:
        return model.encode(body["inputs"], normalize_embeddings=True).tolist()

uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
"""


@dataclass
class Row:
    """What one server did in all rounds.

    Attributes:
        texts_per_s: by round.
        p50_ms, p99_ms: over all answers.
        answers, lost: numbers of requests with an answer, and without.
        min_cosine: to sentence-transformers' vectors.
        refused: why the server wasn't measured.
    """

    server: str
    texts_per_s: list[float] = field(default_factory=list)
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    answers: int = 0
    lost: int = 0
    min_cosine: float = 1.0
    refused: str = ""


def servers(model: str) -> dict[str, tuple[list[str], str, str]]:
    """Command, path and field of the texts of each server, by its name; {port} stands for a free one."""
    ours = [sys.executable, "-m", "bert_fast.cli", "serve", f"model={model}", "--port", "{port}", "--log", "none"]
    found = {
        f"bert_fast {precision}": ([*ours, "--precision", precision], "/embed", "inputs")
        for precision in ("fp32", "bf16", "int8")
    }
    found["FastAPI + sentence-transformers"] = ([sys.executable, "-c", BARE, model, "{port}"], "/embed", "inputs")
    infinity = ["infinity_emb", "v2", "--model-id", model, "--device", "cpu", "--port", "{port}"]
    found["infinity"] = ([sys.executable, "-m", *infinity], "/embeddings", "input")
    return found


@contextmanager
def running(command: list[str], port: int, seconds: float = 120) -> Iterator[None]:
    """A server in a process of its own, once it answers."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([part.format(port=port) for part in command], stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + seconds
            while not asyncio.run(_listens(port)):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start: {log.read()[-500:]}")
                time.sleep(0.2)
            yield
        finally:
            process.kill()
            process.wait()


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


class Client:
    """Clients of one server: each sends one request after the other.

    Args:
        port, path: of the server.
        bodies: of the requests.
        check: called with the number of a body and its answer, for one answer in `PARSED`.
    """

    def __init__(self, port: int, path: str, bodies: list[bytes], check: Callable[[int, Any], None]) -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: "
        self.requests = [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]
        self.port, self.check = port, check
        self.times: list[float] = []
        self.lost, self._next = 0, 0

    async def load(self, clients: int, seconds: float) -> float:
        """Send requests for `seconds`, and wait for the last answers; returns the seconds until then."""
        start = time.perf_counter()
        await asyncio.gather(*(self._client(start + seconds) for _ in range(clients)))
        return time.perf_counter() - start

    async def _client(self, end: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=2**24)
        while (sent := time.perf_counter()) < end:
            number, self._next = self._next, self._next + 1
            row = number % len(self.requests)
            try:
                writer.write(self.requests[row])
                status, body = await asyncio.wait_for(_answer(reader), 120)
            except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError):
                self.lost += 1
                return
            if status != 200:  # an error is sent fast: its time would flatter the server
                self.lost += 1
                continue
            self.times.append(time.perf_counter() - sent)
            if number % PARSED == 0:
                self.check(row, json.loads(body))
        writer.close()


async def _answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    assert length is not None, head
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length[1]))


def measure(options: Any, save: Callable[[list[Row]], None]) -> list[Row]:
    """Load every server in turn, `options.rounds` times."""
    from sentence_transformers import SentenceTransformer

    texts = paragraphs(200 if options.quick else 2000)
    expected = np.asarray(SentenceTransformer(options.model, device="cpu").encode(texts, normalize_embeddings=True))
    rows = {name: Row(name) for name in servers(options.model)}
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(options.rounds):
        for index, (name, (command, path, field_name)) in enumerate(servers(options.model).items()):
            row = rows[name]
            if row.refused:
                continue
            if name == "infinity" and importlib.util.find_spec("infinity_emb") is None:
                row.refused = "infinity_emb is not installed"
                continue

            def check(number: int, answer: Any, row: Row = row) -> None:
                vector = np.array(answer["data"][0]["embedding"] if "data" in answer else answer[0])
                cosine = float(vector @ expected[number] / np.linalg.norm(vector))
                row.min_cosine = min(row.min_cosine, cosine)

            bodies = [json.dumps({field_name: [text]}).encode() for text in texts]
            port = 18200 + index
            try:
                with running(command, port):
                    asyncio.run(Client(port, path, bodies, check).load(8, min(2.0, options.seconds)))  # not counted
                    client = Client(port, path, bodies, check)
                    took = asyncio.run(client.load(options.clients, options.seconds))
            except (RuntimeError, OSError) as error:
                row.refused = reason(error)
                continue
            times[name] += client.times
            row.texts_per_s.append(round(len(client.times) / took, 1))
            row.answers += len(client.times)
            row.lost += client.lost
            if times[name]:
                row.p50_ms, row.p99_ms = (round(1000 * float(q), 1) for q in np.percentile(times[name], [50, 99]))
            save(list(rows.values()))
    return list(rows.values())


def table(rows: list[Row]) -> str:
    """The rows as text."""
    lines = [f"{'server':<34} texts/s   p50 ms   p99 ms  answers  lost  min. cosine"]
    for row in rows:
        if row.refused:
            lines.append(f"{row.server:<34} {row.refused}")
            continue
        lines.append(
            f"{row.server:<34} {np.median(row.texts_per_s):7.1f} {row.p50_ms:8.1f} {row.p99_ms:8.1f} {row.answers:8d} "
            f"{row.lost:5d} {row.min_cosine:12.5f}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = arguments("servers of embeddings under load")
    parser.add_argument("model", help="a folder of sentence-transformers")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0, help="of load, for each server and round")
    parser.add_argument("--rounds", type=int, default=1)
    options, machine = parse(parser)
    if options.quick:
        options.seconds, options.clients = min(options.seconds, 3.0), min(options.clients, 20)
    about = {
        "environment": environment(machine),
        "clients": options.clients,
        "seconds": options.seconds,
    }

    def save(rows: list[Row]) -> None:
        if options.record:
            write({**about, "rows": [asdict(row) for row in rows]}, "serve_load", options.results)

    rows = measure(options, save)
    save(rows)
    print(table(rows))
    return exit_code(
        [f"{row.server}: {row.lost} requests lost" for row in rows if row.lost and "bert_fast" in row.server]
    )


if __name__ == "__main__":
    sys.exit(main())
