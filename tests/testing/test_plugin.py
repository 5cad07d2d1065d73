"""`pytest --bert-fast-op OP --bert-fast-impl MODULE:FUNCTION`, in processes of its own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

KERNELS = """
from torch.nn import functional as F
def right(x, bias, *, approximate="none"):
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)
def wrong(x, bias, *, approximate="none"):
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")
"""
OPTIONS = ["--bert-fast-dtypes", "float32", "--bert-fast-checks", "accuracy,inputs", "-p", "no:cacheprovider"]


def run_pytest(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "my_kernels.py").write_text(KERNELS)
    return subprocess.run(
        [sys.executable, "-m", "pytest", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )


def test_the_plugin_is_an_entry_point_of_the_installed_package() -> None:
    entries = {entry.value for entry in importlib.metadata.entry_points(group="pytest11")}
    assert "bert_fast._pytest_plugin" in entries, "install bert_fast again: its entry points changed"


def test_a_right_and_a_wrong_kernel(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own(): pass\n")
    done = run_pytest(tmp_path, "--bert-fast-op", "bias_gelu", "--bert-fast-impl", "my_kernels:right", "-v", *OPTIONS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_kernel[accuracy-float32] PASSED" in done.stdout
    assert "2 passed" in done.stdout  # not test_own.py, which was not asked for
    done = run_pytest(
        tmp_path, "test_own.py", "--bert-fast-op", "bias_gelu", "--bert-fast-impl", "my_kernels:wrong", *OPTIONS
    )
    assert done.returncode == 1
    assert "1 failed, 2 passed" in done.stdout
    assert "looks like: tanh GeLU in place of erf GeLU" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bert-fast-op", "bias_gelu"), "--bert-fast-impl MODULE:FUNCTION is missing"),
        (("--bert-fast-impl", "my_kernels:right"), "--bert-fast-op OP is missing"),
        (
            ("--bert-fast-op", "gelu", "--bert-fast-impl", "my_kernels:right"),
            "--bert-fast-op is 'gelu'; expected one of",
        ),
        (("--bert-fast-op", "bias_gelu", "--bert-fast-impl", "my_kernels"), "expected MODULE:FUNCTION"),
        (
            ("--bert-fast-op", "bias_gelu", "--bert-fast-impl", "my_kernels:no"),
            "'my_kernels:no': module 'my_kernels' has",
        ),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    done = run_pytest(tmp_path, *arguments, *OPTIONS)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_without_the_options_nothing_is_imported_and_nothing_collected(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("import sys\ndef test_own(): assert 'torch' not in sys.modules\n")
    done = run_pytest(tmp_path, "-p", "no:cacheprovider", "-p", "no:hypothesispytest")
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
