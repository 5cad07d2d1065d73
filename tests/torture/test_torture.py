"""The fixed part of the torture suite, and that its attacks notice faults; `make torture` runs all of it."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.torture.attack import Attack, Broken, Case, run_attack
from tests.torture.process import Running
from tests.torture.tensors import guarded, wrong

ROOT = Path(__file__).resolve().parents[2]


def test_the_program_holds() -> None:
    command = [sys.executable, "-m", "tests.torture", "--quick", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " held" in done.stdout


def end(case: Case, parameter: Any) -> None:
    """A case that ends as its parameter says."""
    case.note(f"to be {parameter}")
    if parameter == "broken":
        raise Broken("the promise of case 7")
    if parameter == "raised":
        raise KeyError("x")
    if parameter == "crashed":
        torch.empty(1).data_ptr()
        os.kill(os.getpid(), signal.SIGSEGV)
    if parameter == "hung":
        time.sleep(60)


def test_every_way_to_fail_is_counted_and_the_cases_after_it_run(tmp_path: Path) -> None:
    ways = ["held", "broken", "raised", "crashed", "hung", "held", "crashed"]
    attack = Attack("area", "name", end, lambda material: ways, timeout=5.0)
    tally = run_attack(attack, tmp_path, tmp_path, seed=3, seconds=60, limit=None, only=None)
    assert (tally.tried, tally.held) == (7, 2)
    failures = sorted(text.partition(": ")[2].partition(" (test_torture.py")[0] for text in tally.failures.values())
    assert failures == [
        "to be broken: the promise of case 7",
        "to be crashed: ended by SIGSEGV",
        "to be hung: hang",
        "to be raised: KeyError: 'x'",
    ]
    again = run_attack(attack, tmp_path, tmp_path, seed=3, seconds=60, limit=None, only=1)
    assert (again.tried, again.held) == (1, 0)


def test_a_process_is_killed_before_the_call_asked_for_and_watched(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()

    def write() -> None:
        for index in range(5):
            (inside / str(index)).write_text("x")
        (outside / "y").write_text("y")

    ended = Running(write, inside, tmp_path / "prints").wait()
    assert (ended.code, ended.calls, ended.outside) == (0, 5, (str(outside / "y"),))
    (outside / "y").unlink()
    for path in inside.iterdir():
        path.unlink()
    ended = Running(write, inside, tmp_path / "prints", kill_before=3).wait()
    assert ended.code == -signal.SIGKILL
    assert sorted(path.name for path in inside.iterdir()) == ["0", "1", "2"]
    assert not (outside / "y").exists()


def test_reading_past_a_guarded_tensor_is_a_crash(tmp_path: Path) -> None:
    x = guarded(torch.arange(10.0))
    assert torch.equal(x, torch.arange(10.0))
    ended = Running(lambda: len(ctypes.string_at(x.data_ptr(), x.nbytes)) - 40, tmp_path, tmp_path / "prints").wait()
    assert ended.code == 0
    ended = Running(lambda: len(ctypes.string_at(x.data_ptr(), x.nbytes + 1)), tmp_path, tmp_path / "prints").wait()
    assert ended.code == -signal.SIGSEGV


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_value_is_noticed_and_rounding_is_not(dtype: torch.dtype) -> None:
    truth = torch.linspace(-3, 3, 50, dtype=torch.float64)
    eager = truth.to(dtype)
    assert not wrong(eager, eager, truth)
    assert not wrong(eager * (1 + torch.finfo(dtype).eps), eager, truth)
    for position, value in ((7, 0.0), (0, 30.0), (49, float("nan")), (3, float("inf"))):
        changed = eager.clone()
        changed[position] += value + (eager[position] if not value else 0)
        assert wrong(changed, eager, truth), (position, value)
    missing = truth.clone()
    missing[5] = float("nan")
    assert wrong(eager, missing.to(dtype), missing), "a number where the reference has none"
    assert wrong(eager[:-1], eager, truth)
