"""The emulator that the CUDA kernels run in where there is no GPU: right kernels work, wrong ones show."""

from __future__ import annotations

import math
import os
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).resolve().parents[2]
TORCH_TARGET_VERSION = runpy.run_path(str(ROOT / "csrc" / "flags.py"))["TORCH_TARGET_VERSION"]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulator") / "cases"
    compiler = next(name for name in (os.environ.get("CXX"), "c++", "g++") if name and shutil.which(name))
    sources = [ROOT / "tests" / "kernels" / "cuda_emulator_cases.cpp", ROOT / "csrc" / "emulator" / "emulator.cpp"]
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    flags = ["-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-DBERT_FAST_EMULATOR", *includes]
    flags.append(f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}")
    subprocess.run([compiler, *flags, *map(str, sources), "-o", str(program)], check=True)
    return program


def run(cases: Path, name: str) -> tuple[int, str]:
    done = subprocess.run([cases, name], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip()


def numbers(cases: Path, name: str) -> list[float]:
    code, printed = run(cases, name)
    assert code == 0, printed
    return [float(word) for word in printed.split()]


def test_a_barrier_shows_the_other_threads_writes(cases: Path) -> None:
    assert numbers(cases, "neighbour") == [(i + 1) % 64 for i in range(64)]


def test_a_missing_barrier_reads_memory_that_nobody_wrote(cases: Path) -> None:
    assert any(math.isnan(x) for x in numbers(cases, "no_barrier"))


def test_shuffles_exchange_within_a_warp(cases: Path) -> None:
    assert numbers(cases, "warp_sum") == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_asynchronous_copies_arrive_when_waited_for(cases: Path) -> None:
    assert numbers(cases, "copied") == [i + 100 * (i + 1) for i in range(64)]


def test_asynchronous_copies_not_waited_for_are_not_there(cases: Path) -> None:
    assert all(math.isnan(x) for x in numbers(cases, "waited_for_one"))


def test_a_barrier_that_some_never_reach_is_an_error(cases: Path) -> None:
    code, printed = run(cases, "half_wait")
    assert code == 1
    assert printed.startswith("emulated kernel: no thread of the block can go on; waiting: 1 3 5")


def test_lanes_that_do_different_things_are_an_error(cases: Path) -> None:
    code, printed = run(cases, "disagree")
    assert code == 1
    assert printed.startswith("lanes of a warp disagree: ")


def test_threads_that_are_gone_are_not_waited_for(cases: Path) -> None:
    assert numbers(cases, "half_leave") == [1.0] * 32 + [0.0] * 32


def test_fragments_multiply_as_matrices_do(cases: Path) -> None:
    """Both ways to load the right operand, against three loops, to the bit."""
    assert numbers(cases, "multiply")[:2] == [1, 1]


def test_registers_of_a_fragment_are_the_rows_that_the_instruction_takes(cases: Path) -> None:
    assert numbers(cases, "second_register") == [(lane // 4 * 4 if lane % 4 == 0 else 0) for lane in range(32)] * 2
