"""SIGKILL before every file operation of a run that replaces a result: the old or the new result is complete, and the
same call finishes the run with the bits of an undisturbed one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from bert_fast.models import BertConfig, BertModel

# argv: the folder with the model and the rows; the number of this part of the kills, and of all parts. Each run is a
# fork of a process that has imported everything. It takes two steps, with a checkpoint after the first, and replaces
# the result of another seed.
SCRIPT = """
import builtins, hashlib, io, json, os, shutil, signal, sys, traceback
from dataclasses import replace
from pathlib import Path

import safetensors.torch
import torch

torch.set_num_threads(1)
from bert_fast._config import from_mapping
from bert_fast.finetune import FinetuneConfig, finetune
from bert_fast.finetune import unfinished
from bert_fast.models import checkpoint as model_files
from bert_fast.runtime import checkpoint

CALLS = ("mkdir", "fsync", "rename", "replace", "unlink", "rmdir", "link", "open", "chmod", "ftruncate")
base, part, parts = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = from_mapping(FinetuneConfig, {
    "task": "classification", "model": base, "output_dir": base / f"part-{part}" / "run",
    "data": {"train": base / "rows.csv", "dev": base / "rows.csv"}, "text": {"max_length": 8}, "steps": 2,
    "eval_steps": 2, "log_interval": 1, "checkpoint_interval": 1, "keep_last": 1, "progress": False, "report": False,
    "overwrite": True, "device": "cpu",
})

def in_fork(settings, kill_at=-1, count_to=None):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0
    def counted(call):
        def run(*args, **kwargs):
            nonlocal count
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return call(*args, **kwargs)
        return run
    try:
        plain_open = builtins.open
        if kill_at >= 0 or count_to:
            for name in CALLS:
                setattr(os, name, counted(getattr(os, name)))
            builtins.open = io.open = counted(io.open)
            for module in (unfinished, checkpoint, model_files):
                if hasattr(module, "save_file"):
                    module.save_file = counted(module.save_file)
        finetune(settings, report=lambda _: None)
        if count_to:
            with plain_open(count_to, "w") as file:
                file.write(str(count))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)

def content(folder):
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ("metrics.json", "log.jsonl")}

target = Path(config.output_dir)
finetune(replace(config, seed=1), report=lambda _: None)  # in this process: imports what the forks need
old = content(target)
shutil.copytree(target, base / f"part-{part}-old")
assert in_fork(config, count_to=str(base / f"count-{part}")) == 0
new = content(target)
assert old != new and "model.safetensors" in new
count = int((base / f"count-{part}").read_text())
for kill_at in range(part, count, parts):
    shutil.rmtree(target.parent)
    shutil.copytree(base / f"part-{part}-old", target)
    assert in_fork(config, kill_at) == -signal.SIGKILL, kill_at
    found = [content(folder) for folder in target.parent.iterdir() if folder.is_dir()]
    assert old in found or new in found, f"no complete result after a kill before call {kill_at}"
    assert not target.exists() or content(target) in (old, new), kill_at
    assert in_fork(config) == 0, kill_at
    assert content(target) == new, f"another result after a kill before call {kill_at}"
    assert [path.name for path in target.parent.iterdir()] == ["run"], list(target.parent.iterdir())
print(json.dumps({"calls": count}))
"""
PARTS = 2


def test_a_kill_before_any_file_operation_loses_nothing(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "so"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=8, **sizes)).save_pretrained(tmp_path)
    (tmp_path / "rows.csv").write_text("text,label\n" + "so yes,1\nno so,0\n" * 3)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(tmp_path), str(part), str(PARTS)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for part in range(PARTS)
    ]  # fmt: skip
    for process in processes:
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-4000:]
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        assert result["calls"] > 60
