"""The number of threads: cgroup quotas, the environment variable, the option; and the previous number restored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bert_fast import threads
from bert_fast.cli.main import main
from bert_fast.threads import sensible_threads, use_threads


@pytest.fixture(autouse=True)
def _four_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    monkeypatch.setattr(threads, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.delenv(threads.VARIABLE, raising=False)


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 4),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "max 100000\n"}, 4),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "150000 100000\n"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "cgroup/a/cpu.max": "300000 100000\n", "cgroup/cpu.max": "x"}, 3),
        ({"proc/self/cgroup": "0::/gone/here\n", "cgroup/cpu.max": "50000 100000\n"}, 1),
        (
            {
                "proc/self/cgroup": "3:memory:/a\n4:cpu,cpuacct:/a\n0::/a\n",
                "cgroup/cpu/a/cpu.cfs_quota_us": "200000\n",
                "cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
                "cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/\n", "cgroup/cpu.max": "9900000 100000\n"}, 4),
    ],
    ids=["no cgroup", "no quota", "rounded up", "parent cgroup", "path of the host", "version 1", "large quota"],
)
def test_cgroup_quotas_are_respected(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    write(tmp_path, files)
    assert sensible_threads() == expected


def test_affinity_and_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {5})
    assert sensible_threads() == 1
    monkeypatch.setenv(threads.VARIABLE, "3")
    assert sensible_threads() == 3
    for wrong in ("0", "-1", "all", ""):
        monkeypatch.setenv(threads.VARIABLE, wrong)
        with pytest.raises(ValueError, match=f"BERT_FAST_THREADS is '{wrong}'; expected the number of threads"):
            sensible_threads()


def test_use_threads_restores_the_previous_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    before = torch.get_num_threads()
    with use_threads(before + 1) as now:
        assert (now, torch.get_num_threads()) == (before + 1, before + 1)
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="threads is 0; expected 1 or more"), use_threads(0):
        pass


def test_a_command_runs_with_the_requested_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    before = torch.get_num_threads()
    assert main(["info", "--threads", "3", "--json"]) == 0
    assert '"threads": 3' in capsys.readouterr().out
    monkeypatch.setenv(threads.VARIABLE, "2")
    assert main(["info", "--json"]) == 0
    assert '"threads": 2' in capsys.readouterr().out
    assert torch.get_num_threads() == before
    assert main(["info", "--threads", "many"]) == 2
    assert "--threads is 'many'; expected the number of threads" in capsys.readouterr().err
