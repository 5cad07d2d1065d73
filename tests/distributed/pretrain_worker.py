"""One rank of a pretraining run, configured by JOB, which conftest.py sets.

{"rank", "world_size", "port", "folder", "config": PretrainConfig as a mapping,
 "act": {"rank", "step", "what"}: what the rank does in the middle of that step; "poison" spoils its gradient,
 "kill_before_file_call": N: the process is killed before its N-th call that changes a file of the run; 0 counts them}
"""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bert_fast._config import from_mapping
from bert_fast.pretrain.config import PretrainConfig
from bert_fast.pretrain.micro_batches import Prefetch
from bert_fast.pretrain.trainer import Trainer, pretrain
from bert_fast.runtime import checkpoint


def to_a_full_disk(tensors: dict[str, torch.Tensor], path: str) -> None:
    """`save_file` on a full disk, with the error of the operating system."""
    Path(path).symlink_to("/dev/full")
    with Path(path).open("wb", buffering=0) as file:
        file.write(bytes(4096))


def act(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "terminate":
        os.kill(os.getpid(), signal.SIGTERM)
    elif what == "fail":
        raise ValueError("this rank has had enough")
    elif what == "full disk":
        checkpoint.save_file = to_a_full_disk
    else:
        assert what == "poison", what


def watch(job: dict[str, Any], examples: list[Any]) -> None:
    """Append the examples of every step to `examples`, and act in the step that the job names."""
    update, backward, next_step = Trainer._update, Trainer._backward, Prefetch.next
    steps: list[Any] = []

    def next_watched(self: Prefetch) -> Any:
        steps.append(next_step(self))
        return steps[-1]

    def update_watched(self: Trainer, *arguments: Any) -> Any:
        planned = job.get("act")
        if planned and planned["rank"] in (job["rank"], "all") and self.step + 1 == planned["step"]:
            act(planned["what"])
        result = update(self, *arguments)
        examples.append([self.step, [list(pair) for micro in steps[-1].micro for pair in micro.examples]])
        return result

    def backward_watched(self: Trainer, *arguments: Any) -> None:
        if job.get("act") != {"rank": job["rank"], "step": self.step + 1, "what": "poison"} or not steps:
            return backward(self, *arguments)
        parameter = next(self.model.parameters())
        weights = parameter.detach().clone()
        parameter.data.fill_(float("nan"))
        backward(self, *arguments)
        parameter.data.copy_(weights)

    Trainer._backward = backward_watched  # type: ignore[method-assign]
    Trainer._update = update_watched  # type: ignore[method-assign]
    Prefetch.next = next_watched  # type: ignore[method-assign]


def kill_before_file_call(folder: str, number: int, seen: list[str]) -> None:
    """Kill this process before its file call `number` (from 1) below `folder`: every call that changes something."""
    here, changing = os.getpid(), ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")

    def watched(event: str, arguments: tuple[Any, ...]) -> None:
        if os.getpid() != here or (event != "open" and event not in changing):
            return
        if isinstance(arguments[0], int) or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = os.fsdecode(arguments[0])
        if event in ("os.remove", "os.rmdir") and arguments[1] >= 0:  # shutil.rmtree: a name within an open folder
            path = f"{os.readlink(f'/proc/self/fd/{arguments[1]}')}/{path}"
        if path.startswith(f"{folder}/") or path == folder:
            seen.append(event)
            if len(seen) == number:
                os.kill(here, signal.SIGKILL)

    sys.addaudithook(watched)


def main() -> None:
    job = json.loads(globals()["JOB"])
    os.environ.update(RANK=str(job["rank"]), WORLD_SIZE=str(job["world_size"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    torch.set_num_threads(1)
    examples: list[Any] = []
    watch(job, examples)
    file_calls: list[str] = []
    if "kill_before_file_call" in job:
        kill_before_file_call(job["config"]["output_dir"], job["kill_before_file_call"], file_calls)
    output: dict[str, Any] = {"error": None, "messages": []}
    try:
        output["result"] = asdict(pretrain(from_mapping(PretrainConfig, job["config"]), output["messages"].append))
    except Exception as error:
        output["error"] = f"{type(error).__name__}: {error}"
    output["examples"] = examples
    output["file_calls"] = len(file_calls)
    path = Path(job["folder"]) / f"{job['rank']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(output))
    path.with_suffix(".tmp").rename(path)


main()
