"""SIGKILL in the middle of a run, then the same command: the losses of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STEPS = 40


def command(output: Path, prepared: Path, tiny_config: Path) -> list[str]:
    settings = {
        "output_dir": output,
        "data.folder": prepared,
        "data.seq_len": 32,
        "data.token_budget": 128,
        "model.config": tiny_config,
        "optimizer.lr": 1e-3,
        "steps": STEPS,
        "log_interval": 1,
        "eval_interval": 15,
        "checkpoint_interval": 4,
        "tensorboard": "false",
        "progress": "false",
    }
    arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "bert_fast.cli.main", "pretrain", *arguments]


def losses(output: Path) -> list[tuple[Any, ...]]:
    names = ("kind", "step", "loss", "mlm_loss", "nsp_loss", "grad_norm")
    lines = (output / "log.jsonl").read_text().splitlines()
    return [tuple(json.loads(line).get(name) for name in names) for line in lines]


def kill_at(step: int, arguments: list[str], output: Path, environment: dict[str, str]) -> None:
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    log = output / "log.jsonl"
    while not (log.exists() and f'"step": {step},' in log.read_text()):
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline, "the run did not reach the step in time"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    process.communicate()


def test_a_run_killed_twice_equals_an_uninterrupted_one(tmp_path: Path, prepared: Path, tiny_config: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    expected, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    arguments = command(expected, prepared, tiny_config)
    done = subprocess.run(arguments, env=environment, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    arguments = command(killed, prepared, tiny_config)
    kill_at(9, arguments, killed, environment)
    kill_at(23, arguments, killed, environment)
    done = subprocess.run(arguments, env=environment, check=True, capture_output=True, text=True, timeout=300)
    assert "resuming from" in done.stderr
    assert losses(killed) == losses(expected)
    assert len(losses(expected)) == STEPS + 3
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (killed, expected)]
    assert weights[0] == weights[1]
