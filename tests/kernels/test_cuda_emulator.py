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
    sources = [
        *(ROOT / "tests" / "emulator" / name for name in ("cases.cpp", "hopper_cases.cpp")),
        *(ROOT / "tests" / "emulator" / name for name in ("emulator.cpp", "hopper.cpp")),
    ]
    includes = [f"-I{path}" for path in (ROOT / "csrc", ROOT / "tests", *include_paths())]
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


@pytest.mark.parametrize("name", ["hopper", "hopper_registers"])
def test_a_warpgroup_multiplies_swizzled_tiles_as_matrices(cases: Path, name: str) -> None:
    """Of bulk copies, with rows of either operand along what is summed over or across, against three loops."""
    assert numbers(cases, name)[0] == 64 * 64


def test_a_bulk_copy_leaves_zeros_outside_of_the_tensor(cases: Path) -> None:
    assert numbers(cases, "hopper_outside") == [(64 * (8 + i) + 8) * 7 % 23 - 11 if i < 8 else 0 for i in range(64)]


@pytest.mark.parametrize("mistake", ["no_product_wait", "no_copy_wait"])
def test_products_and_copies_not_waited_for_are_not_there(cases: Path, mistake: str) -> None:
    code, printed = run(cases, f"hopper_{mistake}")
    assert code == 1 or float(printed.split()[0]) < 64 * 64, printed


def test_what_a_thread_wrote_without_a_proxy_fence_is_not_multiplied(cases: Path) -> None:
    assert numbers(cases, "hopper_no_proxy_fence")[0] == 63 * 64  # all rows but the one that was written


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_product_fence", "a product began without wgmma.fence"),
        ("early_write", "an operand of a product changed before the product was waited for"),
        ("not_initialised", "a barrier in shared memory was not initialised"),
        ("fewer_bytes", "a bulk copy brought bytes that its barrier does not expect"),
    ],
)
def test_mistakes_with_products_and_barriers_are_errors(cases: Path, name: str, message: str) -> None:
    code, printed = run(cases, f"hopper_{name}")
    assert code == 1
    assert message in printed
