"""Prometheus metrics under the names of text-embeddings-inference."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TOKENS = tuple(2.0**power for power in range(15))
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        of: dict[str, Any] = {"registry": self.registry}
        # prometheus_client appends _total to the name of a Counter; TEI's counters, and dashboards of them, have none.
        self.requests = Gauge("te_request_count", "Requests received", ["method"], **of)
        self.successes = Gauge("te_request_success", "Requests answered", ["method"], **of)
        self.failures = Gauge("te_request_failure", "Requests refused or failed", ["err"], **of)
        self.duration = Histogram(
            "te_request_duration", "Seconds from the request to its answer", buckets=_SECONDS, **of
        )
        self.tokenization = Histogram(
            "te_request_tokenization_duration", "Seconds of tokenization", buckets=_SECONDS, **of
        )
        self.queue = Histogram("te_request_queue_duration", "Seconds in the queue", buckets=_SECONDS, **of)
        self.inference = Histogram("te_request_inference_duration", "Seconds of computation", buckets=_SECONDS, **of)
        self.input_length = Histogram("te_request_input_length", "Tokens of a text", buckets=_TOKENS, **of)
        self.batch_size = Histogram("te_batch_next_size", "Sequences of a batch", buckets=_TOKENS, **of)
        self.batch_tokens = Histogram("te_batch_next_tokens", "Tokens of a batch", buckets=_TOKENS, **of)
        self.queue_size = Gauge("te_queue_size", "Requests in the queue", **of)

    def on_batch(self, size: int, tokens: int) -> None:
        """Count a batch."""
        self.batch_size.observe(size)
        self.batch_tokens.observe(tokens)

    def text(self, queue_size: int) -> bytes:
        """The metrics in Prometheus's text format."""
        self.queue_size.set(queue_size)
        return generate_latest(self.registry)
