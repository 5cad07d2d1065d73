"""An embeddings server, by a stand-in on the loopback interface that speaks OpenAI's and TEI's dialect."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from bert_fast.cli.main import main
from bert_fast.invariants import Endpoint, EndpointError, Reference, check_encoder
from bert_fast.invariants.checks import RefusedError
from tests.invariants.conftest import Planted


@contextmanager
def serve(embed: Any, dialect: str, *, refuses_empty: bool = False, answer: Any = None) -> Iterator[str]:
    """The URL of a server of `embed`, which normalizes as TEI does; `answer` is what it says instead."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def reply(self, status: int, body: Any) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.reply(200 if dialect == "tei" and self.path == "/info" else 404, {"model_id": "stand-in"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != {"tei": "/embed", "openai": "/v1/embeddings"}[dialect]:
                self.reply(404, {"error": "no such route"})
                return
            texts = body["inputs" if dialect == "tei" else "input"]
            if refuses_empty and not all(texts):
                self.reply(413 if dialect == "tei" else 400, {"error": "`inputs` cannot be empty"})
                return
            if answer is not None:
                self.reply(*answer)
                return
            vectors = torch.nn.functional.normalize(embed(texts), dim=-1).tolist()
            rows = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
            self.reply(200, vectors if dialect == "tei" else {"object": "list", "data": rows[::-1]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def reference(model_folder: Any) -> Reference:
    return Reference(model_folder("bert"))


@pytest.mark.parametrize("dialect", ["tei", "openai"])
def test_a_right_server_keeps_every_invariant(reference: Reference, dialect: str) -> None:
    with serve(Planted(reference).embed, dialect) as url:
        endpoint = Endpoint(url)
        assert endpoint.dialect == dialect
        rows = list(check_encoder(endpoint, reference, unit=True))
    assert [row for row in rows if not row.ok] == []
    assert [row.texts for row in rows] == [7, 2, 1, 15, 14, 8, 7]


@pytest.mark.parametrize("dialect", ["tei", "openai"])
@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("flattened", "positions run on over the texts of the batch"),
        ("padding", "padding is pooled"),
        ("tanh", "tanh and erf GeLU are exchanged"),
        ("types", "the token types are dropped"),
        ("cls", "cls pooling in place of mean pooling"),
        ("length", "the maximum length is 32, not 128"),
        ("sorted", ""),
    ],
)
def test_each_planted_fault_is_caught_over_the_network(
    reference: Reference, dialect: str, fault: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve(Planted(reference, fault).embed, dialect) as url:
        status = main(["verify", "--endpoint", url, "--against", str(reference.folder)])
    out, err = capsys.readouterr()
    assert status == 1, err
    assert "invariants do not hold" in err
    assert "FAILED\n    worst text: '" in out
    assert f"looks like: {name}\n" in out if name else True


def test_a_server_may_refuse_empty_texts(reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    with serve(Planted(reference).embed, "tei", refuses_empty=True) as url:
        rows = {row.invariant: row for row in check_encoder(Endpoint(url), reference, unit=True)}
        assert rows["empty text"].ok
        assert rows["empty text"].texts == 1  # of spaces
        assert "refused: HTTP 413" in rows["empty text"].note
        with pytest.raises(RefusedError, match="cannot be empty"):
            Endpoint(url).embed([""])
        assert main(["verify", "--endpoint", url, "--against", str(reference.folder)]) == 0
    assert "7 of 7 invariants hold" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("dialect", "answer", "message"),
    [
        ("tei", (500, {"error": "out of memory"}), "answered with HTTP 500: .*out of memory"),
        ("tei", (200, b"<html>"), "answered with no JSON"),
        ("tei", (200, {"vectors": []}), "answered with no vectors of one size"),
        ("tei", (200, [[1.0, 2.0]]), r"answered with shape \(1, 2\); expected 2 vectors"),
        ("tei", (200, [[1.0, 2.0], [1.0]]), "answered with no vectors of one size"),
        ("openai", (200, [[1.0]]), "answered without data"),
        (
            "openai",
            (200, {"data": [{"index": 0, "embedding": [1.0]}] * 2}),
            r"with the indices \[0, 0\]; expected 0 to 1",
        ),
    ],
)
def test_answers_that_are_no_vectors_are_named(dialect: str, answer: Any, message: str) -> None:
    with serve(None, dialect, answer=answer) as url, pytest.raises(EndpointError, match=message):
        Endpoint(url, dialect=dialect).embed(["a", "b"])


def test_wrong_urls_are_named(reference: Reference, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="endpoint is 'localhost:80'; expected a URL"):
        Endpoint("localhost:80")
    with pytest.raises(ValueError, match="dialect is 'grpc'; expected one of auto, openai, tei"):
        Endpoint("http://localhost", dialect="grpc")
    with serve(None, "tei") as url:
        pass
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1.*refused"):
        Endpoint(url)
    assert main(["verify", "--endpoint", url, "--against", str(reference.folder)]) == 2
    assert "Connection refused" in capsys.readouterr().err
    assert main(["verify", "--endpoint", url]) == 2
    assert "--endpoint needs --against, the folder of the weights" in capsys.readouterr().err
