"""Which kernels `pytest benchmarks` times: --bench-op, --bench-impl, --bench-device, --bench-match."""

from __future__ import annotations

import pytest

from bert_fast.kernels import available_impls


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bert_fast benchmarks")
    group.addoption("--bench-op", action="append", choices=list(available_impls()), help="an op; all by default")
    group.addoption("--bench-impl", action="append", help="an implementation; all that run there by default")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="cpu by default")
    group.addoption("--bench-match", default="", help="only cases whose name this regular expression finds")
