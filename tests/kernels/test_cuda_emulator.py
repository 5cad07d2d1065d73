"""The emulator of the CUDA kernels: correct kernels run, and mistakes are errors or change the result."""

from __future__ import annotations

import math
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = runpy.run_path(str(ROOT / "tests" / "emulator" / "build.py"))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("emulator") / "cases"
    sources = ("tests/emulator/cases.cpp", "tests/emulator/hopper_cases.cpp", *BUILD["EMULATOR"])
    BUILD["build_program"]("_CUDA", sources, program)
    return program


def run(cases: Path, name: str) -> tuple[int, str]:
    done = subprocess.run([cases, name], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout.strip()


def numbers(cases: Path, name: str) -> list[float]:
    code, printed = run(cases, name)
    assert code == 0, printed
    return [float(word) for word in printed.split()]


def test_a_barrier_makes_the_writes_of_other_threads_visible(cases: Path) -> None:
    assert numbers(cases, "neighbour") == [(i + 1) % 64 for i in range(64)]


def test_without_a_barrier_a_read_returns_uninitialized_memory(cases: Path) -> None:
    assert any(math.isnan(x) for x in numbers(cases, "no_barrier"))


def test_shuffles_exchange_within_a_warp(cases: Path) -> None:
    assert numbers(cases, "warp_sum") == [sum(range(32))] * 32 + [sum(range(32, 64))] * 32


def test_asynchronous_copies_arrive_at_the_wait(cases: Path) -> None:
    assert numbers(cases, "copied") == [i + 100 * (i + 1) for i in range(64)]


def test_asynchronous_copies_have_not_arrived_without_a_wait(cases: Path) -> None:
    assert all(math.isnan(x) for x in numbers(cases, "waited_for_one"))


def test_a_barrier_that_some_threads_never_reach_is_an_error(cases: Path) -> None:
    code, printed = run(cases, "half_wait")
    assert code == 1
    assert printed.startswith("emulated kernel: no thread of the block can continue; waiting: 1 3 5")


def test_an_arrival_at_a_named_barrier_releases_those_that_wait(cases: Path) -> None:
    assert numbers(cases, "arrive") == [0.0] * 32 + list(range(32))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("arrive_twice", "a thread arrived twice at an incomplete barrier"),
        ("nobody_waits", "the block ended with an incomplete barrier"),
        ("counts_disagree", "threads disagree on a barrier's count"),
    ],
)
def test_mistakes_with_named_barriers_are_errors(cases: Path, name: str, message: str) -> None:
    assert run(cases, name) == (1, message)


def test_lanes_in_different_collectives_are_an_error(cases: Path) -> None:
    code, printed = run(cases, "disagree")
    assert code == 1
    assert printed.startswith("lanes of a warp disagree: ")


def test_a_barrier_does_not_wait_for_threads_that_returned(cases: Path) -> None:
    assert numbers(cases, "half_leave") == [1.0] * 32 + [0.0] * 32


def test_the_product_of_fragments_is_the_matrix_product(cases: Path) -> None:
    """For both ways to load the right operand, equal to three loops bit for bit."""
    assert numbers(cases, "multiply")[:2] == [1, 1]


def test_registers_of_a_fragment_hold_the_rows_that_the_instruction_defines(cases: Path) -> None:
    assert numbers(cases, "second_register") == [(lane // 4 * 4 if lane % 4 == 0 else 0) for lane in range(32)] * 2


@pytest.mark.parametrize("name", ["hopper", "hopper_registers"])
def test_wgmma_of_swizzled_tiles_is_the_matrix_product(cases: Path, name: str) -> None:
    """Of tiles that TMA loaded, with the left operand in shared memory or in registers, equal to three loops."""
    assert numbers(cases, name)[0] == 64 * 64


def test_a_tma_load_writes_zeros_outside_of_the_tensor(cases: Path) -> None:
    assert numbers(cases, "hopper_outside") == [(64 * (8 + i) + 8) * 7 % 23 - 11 if i < 8 else 0 for i in range(64)]


@pytest.mark.parametrize("mistake", ["no_product_wait", "no_copy_wait"])
def test_products_and_copies_are_incomplete_without_a_wait(cases: Path, mistake: str) -> None:
    code, printed = run(cases, f"hopper_{mistake}")
    assert code == 1 or float(printed.split()[0]) < 64 * 64, printed


def test_wgmma_does_not_see_writes_without_a_proxy_fence(cases: Path) -> None:
    assert numbers(cases, "hopper_no_proxy_fence")[0] == 63 * 64  # all rows but the one that a thread wrote


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_product_fence", "a wgmma started without a wgmma.fence"),
        ("early_write", "an operand of a wgmma changed before its wait"),
        ("not_initialised", "an mbarrier was not initialized"),
        ("fewer_bytes", "a bulk copy delivered more bytes than its mbarrier expects"),
    ],
)
def test_mistakes_with_wgmma_and_mbarriers_are_errors(cases: Path, name: str, message: str) -> None:
    code, printed = run(cases, f"hopper_{name}")
    assert code == 1
    assert message in printed
