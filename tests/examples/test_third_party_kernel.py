"""The kernels of examples/third_party_kernel keep the contract of their ops, and are verified and timed beside ours."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fast.kernels import unregister
from bert_fast.kernels._common.dispatch import IMPLS, OPS
from bert_fast.testing import CHECKS, assert_matches_oracle
from tests.conftest import COMPILER

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "third_party_kernel"
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    yield
    for op, implementations in OPS.items():
        for name in [name for name in implementations.impls if name not in IMPLS]:
            unregister(op, name)


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@needs_compiler
def test_the_cpp_kernel_matches_the_oracle_on_any_number_of_threads() -> None:
    kernel = example("cpp_add_layer_norm")
    options = {"backward": kernel.backward, "dtypes": [torch.float32], "checks": list(CHECKS)}
    assert_matches_oracle(kernel.forward, "add_layer_norm", **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_triton_kernel_matches_the_oracle(dtype: torch.dtype) -> None:
    """On a GPU every check; in Triton's interpreter those of a few launches."""
    kernel = example("triton_bias_gelu")
    on_gpu = torch.cuda.is_available()
    checks = None if on_gpu else ["accuracy", "edges"]
    options = {"device": "cuda" if on_gpu else "cpu", "backward": kernel.backward, "dtypes": [dtype], "checks": checks}
    assert_matches_oracle(kernel.forward, "bias_gelu", **options)


@needs_compiler
def test_verify_takes_the_file() -> None:
    command = ["verify", "--kernels", str(FOLDER / "cpp_add_layer_norm.py"), "--impls", "mine_cpp"]
    done = subprocess.run(
        [sys.executable, "-m", "bert_fast.cli", *command], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "add_layer_norm        mine_cpp   cpu    float32   dropout 0.1" in done.stdout
    assert "3 of 3 cases ok" in done.stdout


@needs_compiler
def test_the_benchmark_runs_it_beside_ours() -> None:
    """`--warm` compares every case with float64 and times nothing; a wrong kernel is the exit code."""
    from bert_fast.bench.kernels import implementations
    from bert_fast.kernels._common.third_party import load_file

    load_file(FOLDER / "cpp_add_layer_norm.py")
    assert implementations("add_layer_norm", torch.device("cpu"), torch.float32)[-1] == "mine_cpp"
    assert "mine_cpp" not in implementations("add_layer_norm", torch.device("cpu"), torch.bfloat16)
