"""The benchmark of servers under load: answers are counted and compared, lost ones and absent servers reported."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("sentence_transformers")

from benchmarks.models import serve_load
from tests.serve.conftest import TEXTS, folders

__all__ = ["folders"]  # the fixture

LOSING = """
import socket, sys
with socket.create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
    while True:
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.close()
"""

REFUSING = """
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_servers_are_loaded_and_compared(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(folders["embedder"])
    found = serve_load.servers(model)
    chosen = {name: found[name] for name in ("bert_fast fp32", "FastAPI + sentence-transformers", "infinity")}
    chosen["losing"] = ([sys.executable, "-c", LOSING, "{port}"], "/embed", "inputs")
    chosen["refusing"] = ([sys.executable, "-c", REFUSING, "{port}"], "/embed", "inputs")
    chosen["absent"] = ([sys.executable, "-c", "raise SystemExit('no such server')"], "/embed", "inputs")
    monkeypatch.setattr(serve_load, "servers", lambda _: chosen)
    monkeypatch.setattr(serve_load, "paragraphs", lambda _: [text for text in TEXTS if text])
    options = argparse.Namespace(model=model, rounds=1, clients=3, seconds=1.5, quick=True)
    saved: list[Any] = []
    rows = {row.server: row for row in serve_load.measure(options, saved.append)}
    for name in ("bert_fast fp32", "FastAPI + sentence-transformers"):
        row = rows[name]
        assert not row.refused, row.refused
        assert row.answers > 10
        assert row.lost == 0
        assert row.min_cosine > 0.99999
        assert 0 < row.p50_ms <= row.p99_ms
    assert rows["losing"].lost == 3
    assert rows["refusing"].lost > 3
    assert (rows["refusing"].answers, rows["refusing"].texts_per_s) == (0, [0.0])
    assert "no such server" in rows["absent"].refused
    assert "not installed" in rows["infinity"].refused
    assert saved
    table = serve_load.table(list(rows.values()))
    assert "no such server" in table
