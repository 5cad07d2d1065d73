"""The command line under torchrun."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def children(process: int) -> list[int]:
    """The child processes of `process`, in the order in which they were started."""
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_killed_rank_is_named_and_the_restarted_job_finishes(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**settings, "steps": 60, "eval_interval": 0}))  # JSON is YAML
    launch = ["-m", "torch.distributed.run", "--standalone", "--max-restarts", "1", "--nproc-per-node", "2"]
    process = subprocess.Popen(
        [sys.executable, *launch, "-m", "bert_fast.cli", "pretrain", "--config", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = Path(settings["output_dir"]) / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"step": 5,' in log.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run did not reach the step in time"
        time.sleep(0.02)
    killed = children(process.pid)[1]
    os.kill(killed, signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert f"failed (exitcode: -9) local_rank: 1 (pid: {killed})" in errors
    assert errors.count("resuming from") == 1
    assert output.count("held-out loss") == 1  # only rank 0 prints the results
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines() if '"train"' in line]
    assert steps == list(range(1, 61))
