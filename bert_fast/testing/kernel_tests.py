"""What `pytest --bert-fast-op OP --bert-fast-impl MODULE:FUNCTION` collects: a test for each check and dtype."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bert_fast._pytest_plugin import kernel_options
from bert_fast.kernels._common.third_party import registered
from bert_fast.testing.checks import Target, run_check
from bert_fast.testing.oracle import OracleError


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.config.getoption("--bert-fast-op") is None:
        pytest.skip("run with --bert-fast-op OP --bert-fast-impl MODULE:FUNCTION", allow_module_level=True)
    options = kernel_options(metafunc.config)
    pairs = [(check, dtype) for check in options["checks"] for dtype in options["dtypes"]]
    ids = [f"{check}-{str(dtype).removeprefix('torch.')}" for check, dtype in pairs]
    metafunc.parametrize(("check", "dtype"), pairs, ids=ids)


@pytest.fixture(scope="session")
def target(request: pytest.FixtureRequest) -> Iterator[Target]:
    options = kernel_options(request.config)
    op, device, dtypes = options["op"], torch.device(options["device"]).type, tuple(options["dtypes"])
    with registered(op, options["fn"], dtypes=dtypes, backward=options["backward"]) as impl:
        yield Target(op, impl, device, options["own_mask"], dtypes)


def test_kernel(target: Target, check: str, dtype: torch.dtype) -> None:
    if findings := run_check(check, target, dtype):
        pytest.fail(str(OracleError(target.op, findings)), pytrace=False)
