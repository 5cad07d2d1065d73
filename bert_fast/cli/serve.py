"""Serve models over HTTP: embeddings, reranking, classification, masked tokens, in the APIs of TEI and OpenAI.

Every model is a folder or a hub name, or NAME=FOLDER for another name in requests. The page at / tries them.
SIGTERM ends the server when the requests that it has are answered.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import sys
from pathlib import Path
from typing import Any, Literal

API_KEY = "BERT_FAST_API_KEY"


def add_arguments(parser: Any) -> None:
    parser.add_argument("models", nargs="+", type=str, help="folders, hub names, or NAME=FOLDER")
    parser.add_argument("--host", type=str, default="127.0.0.1", help="address to listen at; 0.0.0.0 for every network")
    parser.add_argument("--port", type=int, default=8080, help="0 for a free one, which is printed")
    parser.add_argument("--device", type=str, default="auto", help="auto selects CUDA if it is available")
    parser.add_argument(
        "--precision",
        type=Literal["auto", "fp32", "bf16", "int8"],
        default="auto",
        help="auto is bf16 where the device has units for it, else fp32",
    )
    parser.add_argument("--auto_truncate", type=bool, default=True, help="cut texts that are too long, or refuse them")
    parser.add_argument("--max_batch_tokens", type=int, default=16384, help="tokens of a batch")
    parser.add_argument("--max_batch_requests", type=int | None, default=None, help="texts of a batch; default: any")
    parser.add_argument("--max_client_batch_size", type=int, default=2048, help="texts of a request")
    parser.add_argument("--max_concurrent_requests", type=int, default=512, help="more requests get status 429")
    parser.add_argument("--max_queue_batches", type=int, default=64, help="the queue takes this number of full batches")
    parser.add_argument("--payload_limit", type=int, default=8_000_000, help="bytes of a request's body")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds until a request is given up")
    parser.add_argument("--tokenization_workers", type=int, default=2, help="threads that tokenize")
    parser.add_argument(
        "--api_key_file",
        type=str | None,
        default=None,
        help=f"file with the API key; default: ${API_KEY}",
    )
    parser.add_argument("--log", type=Literal["json", "none"], default="json", help="a JSON line a request, on stderr")


def run(args: Any) -> int:
    import uvicorn

    from bert_fast.serve.app import create_app
    from bert_fast.serve.context import Limits
    from bert_fast.serve.model import load
    from bert_fast.threads import use_threads

    limits = Limits(**{name: getattr(args, name) for name in Limits.__dataclass_fields__})
    for name in Limits.__dataclass_fields__:
        value = getattr(limits, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; expected more than 0")
    key = _api_key(args.api_key_file)
    models = []
    for argument in args.models:
        name, _, folder = ("", "", argument) if Path(argument).exists() else argument.rpartition("=")
        models.append(
            load(folder, name or None, device=args.device, precision=args.precision, auto_truncate=args.auto_truncate)
        )
    app = create_app(models, limits, key)
    _log(args.log)
    server = uvicorn.Server(uvicorn.Config(app, access_log=False, log_level="warning", server_header=False))
    # A request is read, computed and sent in at most three times the limit.
    server.config.timeout_graceful_shutdown = math.ceil(3 * limits.timeout)
    # Bound here: uvicorn prints a port that is taken in lines of its own, and exits.
    with _bound(args.host, args.port, limits.timeout) as listener, use_threads():
        host, port = listener.getsockname()[:2]
        shown = ", ".join(f"{model.name} ({model.kind}, {model.precision})" for model in models)
        where = f"[{host}]" if ":" in host else host
        print(f"serving {shown} at http://{where}:{port}", file=sys.stderr, flush=True)
        server.run(sockets=[listener])
    return 0


def _bound(host: str, port: int, timeout: float) -> socket.socket:
    """A socket that listens at an address; its connections end when a client reads nothing, or is gone, for `timeout`.

    Raises:
        OSError, ValueError: the address can't be used.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"port is {port}; expected 0 to {2**16 - 1}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; a connection has the options of what it came from
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(1000 * timeout))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, math.ceil(timeout))
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, math.ceil(timeout))
        listener.bind(address)
        listener.listen(2048)  # before the address is printed: who reads it may connect at once
    except OSError as error:
        raise OSError(f"can't listen at {host}, port {port}: {error.strerror or error}") from error
    return listener


def _api_key(path: str | None) -> str | None:
    key = os.environ.get(API_KEY) if path is None else Path(path).read_text(encoding="utf-8").strip()
    if key is not None and not (key and key.isascii() and key.isprintable()):
        raise ValueError(f"the API key of {path or f'${API_KEY}'} is empty or not printable ASCII")
    return key


def _log(kind: str) -> None:
    logger = logging.getLogger("bert_fast.serve")
    logger.propagate = False
    if kind == "json":
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
