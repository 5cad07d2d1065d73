"""The CPU time of idle threads: what spins is measured, what sleeps is not, and a setting reaches its process."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from benchmarks.models import idle_threads


def test_only_work_after_the_call_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin() -> None:
        start = time.thread_time()
        while time.thread_time() - start < 0.02:
            pass

    monkeypatch.setattr(idle_threads, "SLEEP", 1.0)
    assert idle_threads.idle_seconds(spin, rounds=1) < 0.01
    assert idle_threads.idle_seconds(lambda: threading.Timer(0.1, spin).start(), rounds=1) > 0.01


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="OpenMP's threads don't spin on a processor of one core")
def test_a_setting_reaches_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # the caller's, which is not inherited
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    passive, active = (
        float(idle_threads.measure(f"torch, OMP_WAIT_POLICY={policy}").removesuffix(" ms"))
        for policy in ("PASSIVE", "ACTIVE")
    )
    assert passive < 2 < active


def test_a_runtime_that_is_absent_or_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: str | None) -> None:
        raise idle_threads.AbsentError("pip install openvino")

    outputs: list[str] = []
    monkeypatch.setitem(idle_threads.RUNTIMES, "openvino", refuse)
    monkeypatch.setattr(sys, "argv", ["idle_threads", "--setting", "OpenVINO"])
    monkeypatch.setattr("builtins.print", lambda text: outputs.append(text))
    idle_threads.main()
    assert outputs == ["not measured: pip install openvino"]
    monkeypatch.setattr(idle_threads.sys, "executable", "false")
    assert idle_threads.measure("torch") == "failed: no message"
