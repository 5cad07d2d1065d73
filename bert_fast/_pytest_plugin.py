"""pytest plugin: `pytest --bert-fast-op attention --bert-fast-impl package.module:function` tests a kernel of others.

Loaded by every pytest of an environment with bert_fast, so it imports nothing until a kernel is asked for.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

_TESTS = Path(__file__).parent / "testing" / "kernel_tests.py"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bert_fast", "test a kernel against an op of bert_fast")
    group.addoption("--bert-fast-op", metavar="OP", help="the op that the kernel computes, e.g. attention")
    group.addoption(
        "--bert-fast-impl",
        metavar="MODULE:FUNCTION",
        help="the kernel, called with the arguments of bert_fast.kernels.OP as keywords, without impl",
    )
    group.addoption("--bert-fast-backward", metavar="MODULE:FUNCTION", help="its backward pass; torch's by default")
    group.addoption("--bert-fast-device", metavar="DEVICE", default="cpu", help="where to run; default: %(default)s")
    group.addoption(
        "--bert-fast-dtypes",
        metavar="DTYPE[,DTYPE]",
        default="float32,bfloat16,float16",
        help="the dtypes that the kernel takes; default: %(default)s",
    )
    group.addoption("--bert-fast-checks", metavar="CHECK[,CHECK]", help="the checks to run; all but threads by default")
    group.addoption(
        "--bert-fast-own-mask", action="store_true", help="the kernel draws dropout masks of its own definition"
    )


def pytest_configure(config: pytest.Config) -> None:
    op, impl = config.getoption("--bert-fast-op"), config.getoption("--bert-fast-impl")
    if op is None and impl is None:
        return
    if op is None or impl is None:
        missing = "--bert-fast-op OP" if op is None else "--bert-fast-impl MODULE:FUNCTION"
        raise pytest.UsageError(f"{missing} is missing; --bert-fast-op and --bert-fast-impl go together")
    arguments_given = config.args_source is pytest.Config.ArgsSource.ARGS
    config.args[:] = [*(config.args if arguments_given else ()), str(_TESTS)]


def kernel_options(config: pytest.Config) -> dict[str, Any]:
    """The kernel and the settings of its tests, as `bert_fast.testing.find_mismatches` takes them.

    Raises:
        pytest.UsageError: an option names no op, function, dtype or check.
    """
    import torch

    from bert_fast.kernels._common.dispatch import OPS
    from bert_fast.testing import CHECKS, DEFAULT_CHECKS

    op = config.getoption("--bert-fast-op")
    if op not in OPS:
        raise pytest.UsageError(f"--bert-fast-op is {op!r}; expected one of {', '.join(sorted(OPS))}")
    dtypes = []
    for name in config.getoption("--bert-fast-dtypes").split(","):
        dtype = getattr(torch, name.strip(), None)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise pytest.UsageError(f"--bert-fast-dtypes has {name!r}; expected floating-point dtypes, as float32")
        dtypes.append(dtype)
    requested = config.getoption("--bert-fast-checks")
    checks = list(DEFAULT_CHECKS) if requested is None else [name.strip() for name in requested.split(",")]
    if unknown := sorted(set(checks) - set(CHECKS)):
        raise pytest.UsageError(f"--bert-fast-checks has {', '.join(unknown)}; expected some of {', '.join(CHECKS)}")
    backward = config.getoption("--bert-fast-backward")
    return {
        "fn": _function("--bert-fast-impl", config.getoption("--bert-fast-impl")),
        "op": op,
        "backward": None if backward is None else _function("--bert-fast-backward", backward),
        "device": config.getoption("--bert-fast-device"),
        "dtypes": dtypes,
        "checks": checks,
        "own_mask": config.getoption("--bert-fast-own-mask"),
    }


def _function(option: str, name: str) -> Any:
    """The object that MODULE:NAME names; the working directory is searched for the module first."""
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise pytest.UsageError(f"{option} is {name!r}; expected MODULE:FUNCTION")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise pytest.UsageError(f"{option} is {name!r}: {error}") from None
    return value
