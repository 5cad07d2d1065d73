"""The command line under torchrun, as a user starts it."""

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
    """The processes that it started, the first first."""
    return [int(number) for number in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_a_rank_that_is_killed_under_torchrun_ends_the_job_which_names_it(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({**settings, "steps": 100_000}))  # JSON is YAML
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "bert_fast.cli"]
    process = subprocess.Popen(
        [sys.executable, *launch, "pretrain", "--config", str(config)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = Path(settings["output_dir"]) / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and '"step": 3,' in log.read_text()):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run did not get to the step in time"
        time.sleep(0.05)
    os.kill(children(process.pid)[1], signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    root = said[said.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in root
    assert "(SIGKILL)" in root
