"""One rank of a pretraining run; JOB, given by conftest.py, says which and what happens to it.

{"rank", "world", "port", "folder", "config": PretrainConfig as a mapping, "record": whether to note the examples,
 "act": {"rank", "step", "what"}: in the middle of that step the rank does "what"; "poison" spoils its gradient}
"""

from __future__ import annotations

import json
import os
import signal
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
    """What save_file does where every write finds the disk full: the kernel's own error."""
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
    """Note the examples of every step that is done, and act where the job says so."""
    update, backward, following = Trainer._update, Trainer._backward, Prefetch.next
    taken: list[Any] = []

    def following_noted(self: Prefetch) -> Any:
        taken.append(following(self))
        return taken[-1]

    def update_watched(self: Trainer, *arguments: Any) -> Any:
        wanted = job.get("act")
        if wanted and wanted["rank"] in (job["rank"], "all") and self.step + 1 == wanted["step"]:
            act(wanted["what"])
        done = update(self, *arguments)
        examples.append([self.step, [list(pair) for micro in taken[-1].micro for pair in micro.examples]])
        return done

    def backward_watched(self: Trainer, *arguments: Any) -> None:
        if job.get("act") != {"rank": job["rank"], "step": self.step + 1, "what": "poison"} or not taken:
            return backward(self, *arguments)
        parameter = next(self.model.parameters())
        kept = parameter.detach().clone()
        parameter.data.fill_(float("nan"))
        backward(self, *arguments)
        parameter.data.copy_(kept)

    Trainer._backward = backward_watched  # type: ignore[method-assign]
    Trainer._update = update_watched  # type: ignore[method-assign]
    Prefetch.next = following_noted  # type: ignore[method-assign]


def main() -> None:
    job = json.loads(globals()["JOB"])
    os.environ.update(RANK=str(job["rank"]), WORLD_SIZE=str(job["world"]))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(job["port"]))
    torch.set_num_threads(1)
    examples: list[Any] = []
    watch(job, examples)
    left: dict[str, Any] = {"error": None, "said": []}
    try:
        left["result"] = asdict(pretrain(from_mapping(PretrainConfig, job["config"]), left["said"].append))
    except Exception as error:
        left["error"] = f"{type(error).__name__}: {error}"
    left["examples"] = examples
    path = Path(job["folder"]) / f"{job['rank']}.json"
    path.with_suffix(".tmp").write_text(json.dumps(left))
    path.with_suffix(".tmp").rename(path)


main()
