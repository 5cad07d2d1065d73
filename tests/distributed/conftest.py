"""Ranks in processes of their own, over gloo; torch is imported once, by the server that they are forked from."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# What a rank imports, including torch._dynamo (two seconds), which DistributedDataParallel imports.
PRELOADED = ["bert_fast.pretrain.trainer", "torch.distributed.fsdp", "torch._dynamo", "tokenizers", "pyarrow.compute"]
WORKER = Path(__file__).with_name("pretrain_worker.py")


@dataclass
class Job:
    """The processes of a run.

    Attributes:
        folder: rank R writes R.json: {"error": text or null, "messages", "result", "examples": [step, [epoch, index]]}.
        processes: by rank.
    """

    folder: Path
    processes: list[Any] = field(default_factory=list)

    def wait(self, seconds: float = 60.0) -> list[dict[str, Any]]:
        """The contents of each rank's file; {} for a rank that was killed."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        slow = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            if process.is_alive():
                process.kill()
        assert not slow, f"ranks {slow} did not end in {seconds} s"
        files = [self.folder / f"{rank}.json" for rank in range(len(self.processes))]
        return [json.loads(file.read_text()) if file.exists() else {} for file in files]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="session")
def start_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Job]]:
    """start_ranks(world_size, **settings of pretrain_worker.py) starts the processes of a run."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    jobs: list[Job] = []

    def start(world_size: int, **settings: Any) -> Job:
        job = Job(tmp_path_factory.mktemp("job"))
        port = free_port()
        for rank in range(world_size):
            text = json.dumps(
                {**settings, "rank": rank, "world_size": world_size, "port": port, "folder": str(job.folder)}
            )
            process = context.Process(target=runpy.run_path, args=(str(WORKER), {"JOB": text}, "__main__"))
            process.start()
            job.processes.append(process)
        jobs.append(job)
        return job

    yield start
    for job in jobs:
        for process in job.processes:
            if process.is_alive():
                process.kill()
            process.join()


@pytest.fixture
def settings(tmp_path: Path, prepared: Path, tiny_config: Path) -> dict[str, Any]:
    """A PretrainConfig as a mapping: six short steps of four micro-batches, with dropout."""
    return {
        "output_dir": str(tmp_path / "run"),
        "data": {"folder": str(prepared), "seq_len": 32, "token_budget": 128},
        "model": {"config": str(tiny_config)},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2},
        "steps": 6,
        "accumulation": 4,
        "log_interval": 1,
        "eval_interval": 3,
        "checkpoint_interval": 3,
        "keep_last": 0,
        "timeout": 20.0,
        "device": "cpu",
        "ceiling": False,
        "tensorboard": False,
        "progress": False,
    }
