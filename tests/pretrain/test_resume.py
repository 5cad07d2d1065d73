"""Where a run begins: branches, retention, finished runs, damaged files, one run at a time in an output_dir."""

from __future__ import annotations

import json
import os
import random
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fast._lock import OutputBusyError, exclusive
from bert_fast.optim.config import OptimizerOptions
from bert_fast.pretrain import resume
from bert_fast.pretrain.config import PretrainConfig
from bert_fast.pretrain.trainer import Trainer, pretrain
from bert_fast.runtime import checkpoint
from bert_fast.runtime.log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(make_config: Callable[..., PretrainConfig]) -> PretrainConfig:
    return make_config(steps=8, log_interval=1, eval_interval=0, checkpoint_interval=2, keep_last=0)


def quiet(_: str) -> None:
    pass


def root(config: PretrainConfig) -> Path:
    return Path(config.output_dir) / "checkpoints"


def steps(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in checkpoint.list_checkpoints(folder)]


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Inode and bytes of every file."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_ino, path.read_bytes()) for path in paths}


def interrupt_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Interrupt the run in the middle of a step."""
    original = Trainer._update

    def update(self: Trainer, *arguments: Any) -> Any:
        if self.step + 1 == step:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "_update", update)


def test_going_on_from_an_older_checkpoint_keeps_it_and_the_newest_writes(config: PretrainConfig) -> None:
    pretrain(config, quiet)
    folder = root(config)
    assert steps(folder) == [2, 4, 6, 8]
    before = read_log(Path(config.output_dir) / "log.jsonl")
    messages: list[str] = []
    other = replace(config, resume=str(folder / "step-00000002"), optimizer=OptimizerOptions(lr=5e-3), keep_last=2)
    result = pretrain(other, messages.append)
    assert result.step == 8
    assert steps(folder) == [2, 6, 8], "the newest two, and the one resumed from"
    aside = folder / "abandoned-1"
    assert steps(aside) == [4, 6, 8]
    named = "step-00000004, step-00000006, step-00000008"
    assert f"checkpoints of another branch ({named}) and their log are now in {aside}" in " ".join(messages)
    assert read_log(aside / "log.jsonl") == before
    assert json.loads((aside / "pretrain.json").read_text())["optimizer"]["lr"] == 1e-3
    for path in (*checkpoint.list_checkpoints(folder), *checkpoint.list_checkpoints(aside)):
        checkpoint.verify_folder(path)
        assert checkpoint.load_trainer_state(path)["config"]["optimizer"]["lr"] == (5e-3 if path.name[5:] in
            ("00000006", "00000008") and path.parent == folder else 1e-3)  # fmt: skip
    assert pretrain(replace(other, steps=10, resume="auto"), quiet).step == 10
    assert steps(folder) == [8, 10]


def test_the_same_command_goes_on_and_does_not_begin_again(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretrain(config, quiet)
    start = root(config) / "step-00000002"
    other = replace(config, output_dir=str(tmp_path / "other"), resume=str(start))
    with monkeypatch.context() as patch:
        interrupt_at(patch, 7)
        with pytest.raises(KeyboardInterrupt):
            pretrain(other, quiet)
    assert steps(root(other)) == [4, 6]
    messages: list[str] = []
    pretrain(other, messages.append)
    assert (
        f"this command has gone on from {start} before; its newest checkpoint is {root(other)}/step-00000006"
        in messages
    )
    assert steps(root(other)) == [4, 6, 8]
    assert (tmp_path / "other" / "final" / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "final" / "model.safetensors"
    ).read_bytes()
    # Other settings: from the checkpoint that it names, and all of its own are another branch.
    pretrain(replace(other, steps=4), quiet)
    assert steps(root(other)) == [4]
    assert steps(root(other) / "abandoned-1") == [4, 6, 8]


def test_a_corrupt_newer_checkpoint_is_set_aside_too(config: PretrainConfig) -> None:
    pretrain(replace(config, steps=6), quiet)
    folder = root(config)
    (folder / "step-00000006" / "config.json").unlink()
    messages: list[str] = []
    pretrain(replace(config, keep_last=2), messages.append)
    assert any(
        "corrupt checkpoint skipped" in text and "step-00000006/config.json is missing" in text for text in messages
    )
    assert steps(folder) == [6, 8]
    assert steps(folder / "abandoned-1") == [6]
    checkpoint.verify_folder(folder / "step-00000006")


def test_a_best_checkpoint_that_is_no_longer_there_is_forgotten(config: PretrainConfig) -> None:
    pretrain(replace(config, steps=4, eval_interval=2), quiet)
    folder = root(config)
    assert checkpoint.load_trainer_state(folder / "step-00000004")["best"] is not None
    best = checkpoint.load_trainer_state(folder / "step-00000004")["best"]["step"]
    checkpoint.delete(folder / f"step-{best:08d}")
    trainer = Trainer(replace(config, eval_interval=2), quiet)
    assert trainer.best is None or trainer.best["step"] in steps(folder)


def test_a_finished_run_is_refused_with_other_settings_and_left_alone_with_the_same(config: PretrainConfig) -> None:
    first = pretrain(config, quiet)
    before = contents(Path(config.output_dir))
    for changes, named in (
        ({"optimizer": OptimizerOptions(lr=2e-3)}, r"optimizer\.lr 0\.001 -> 0\.002"),
        ({"steps": 6}, "steps 8 -> 6"),
        ({"log_interval": 3, "keep_last": 1}, "keep_last 0 -> 1, log_interval 1 -> 3"),
        ({"wandb": "project"}, "wandb None -> 'project'"),
    ):
        with pytest.raises(ValueError, match=rf"nothing is left to train: .*step-00000008 is at step 8 .*\({named}\)"):
            pretrain(replace(config, **changes), quiet)
    again = pretrain(replace(config, progress=True), quiet)
    assert (again.metrics, again.model_dir, again.step) == (first.metrics, first.model_dir, 8)
    assert contents(Path(config.output_dir)) == before


@pytest.mark.parametrize("damage", ["stale", "missing", "corrupt"])
def test_a_final_model_that_is_not_that_of_the_last_step_is_written_again(
    config: PretrainConfig, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    final = Path(config.output_dir) / "final"
    pretrain(replace(config, steps=6 if damage == "stale" else 8), quiet)
    if damage == "missing":
        checkpoint.delete(final)
    elif damage == "corrupt":
        (final / "vocab.txt").write_text("x")
    else:

        def killed(_: Trainer) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "save_final", killed)
            with pytest.raises(KeyboardInterrupt):
                pretrain(config, quiet)
    pretrain(config, quiet)
    checkpoint.verify_folder(final)
    weights = [folder / "model.safetensors" for folder in (final, root(config) / "step-00000008")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_whichever_bit_of_a_checkpoint_flips_the_older_one_is_taken(config: PretrainConfig) -> None:
    """A random choice; tests/runtime/test_checkpoint.py tries every bit of a manifest."""
    pretrain(replace(config, steps=4), quiet)
    folder, newest = root(config), root(config) / "step-00000004"
    chosen = random.Random(0)
    for path in sorted(newest.iterdir()):
        data = path.read_bytes()
        for bit in chosen.sample(range(8 * len(data)), 50):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            messages: list[str] = []
            found = resume.find_checkpoint(config, folder, messages.append)
            assert found == folder / "step-00000002", (path, bit)
            assert str(newest) in messages[0]
        path.write_bytes(data)
    assert resume.find_checkpoint(config, folder, quiet) == newest


def test_a_folder_that_is_no_checkpoint_is_named(config: PretrainConfig) -> None:
    pretrain(replace(config, steps=2), quiet)
    final = Path(config.output_dir) / "final"
    with pytest.raises(ValueError, match=r"final has no trainer_state\.json: it is not a checkpoint to resume from"):
        pretrain(replace(config, resume=str(final)), quiet)
    state = root(config) / "step-00000002" / "trainer_state.json"
    values = json.loads(state.read_text())
    for changed in ({"best": 3}, {"guard": {"mean": 0.0}}, {"step": "2"}, {"totals": None}):
        state.write_text(json.dumps({**values, **changed}))
        with pytest.raises(ValueError, match=r"trainer_state\.json"):
            resume.load_state(state.parent)


def test_ranks_that_torchrun_restarts_resume_whatever_the_setting(config: PretrainConfig) -> None:
    pretrain(replace(config, steps=4, resume="never"), quiet)
    again = replace(config, resume="never")
    assert resume.find_checkpoint(again, root(config), quiet, restarted=True) == root(config) / "step-00000004"
    with pytest.raises(ValueError, match="has checkpoints and resume is never"):
        resume.find_checkpoint(again, root(config), quiet)


def test_one_run_at_a_time_is_at_work_in_a_folder(config: PretrainConfig, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with exclusive(tmp_path / "run", inside=True):
        for name in ("run", "link"):
            with pytest.raises(
                OutputBusyError, match=rf"another run \(host .*, pid {os.getpid()}, since 20.*\) is at work"
            ):
                pretrain(replace(config, output_dir=str(tmp_path / name)), quiet)
    assert list((tmp_path / "run").iterdir()) == []
    pretrain(replace(config, steps=1), quiet)
    pretrain(replace(config, steps=2), quiet)
    assert not (tmp_path / "run" / ".lock").exists()


def test_the_newest_records_of_diverged_steps_are_kept(config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when older ones are of later steps, of a run that went on from an older checkpoint."""
    records = Path(config.output_dir) / "diverged"
    for step in (90, 91, 92):
        checkpoint.write_folder(checkpoint.checkpoint_path(records, step), lambda folder: (folder / "a").touch())
    config = replace(config, explosion=1.0001, on_divergence="skip", max_skips=100)
    monkeypatch.setattr("bert_fast.pretrain.divergence.Guard.check", lambda self, loss, norm: torch.ones(()))
    pretrain(replace(config, steps=2), quiet)
    assert steps(records) == [1, 2, 92]


def test_a_limit_of_the_file_size_keeps_the_last_checkpoint(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a quota or a full disk does: a sentence, and a run that resumes to the bit."""
    plain = replace(config, output_dir=str(tmp_path / "plain"))
    pretrain(plain, quiet)
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            pretrain(config, quiet)
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # Python cuts a .pyc at the limit without an error
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the weights take 100,000 bytes
    try:
        message = (
            r"step-00000006 can't be written: the file would exceed the limit of this process \(ulimit -f\) .*"
            r"; the same command then resumes from .*/step-00000004"
        )
        with pytest.raises(OSError, match=message):
            pretrain(config, quiet)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, hard))
    assert steps(root(config)) == [2, 4]
    assert [path.name for path in root(config).iterdir() if path.name.startswith(".")] == []
    pretrain(config, quiet)
    lines = [read_log(Path(each.output_dir) / "log.jsonl") for each in (config, plain)]
    assert [line["loss"] for line in lines[0]] == [line["loss"] for line in lines[1]]
    weights = [(Path(each.output_dir) / "final" / "model.safetensors").read_bytes() for each in (config, plain)]
    assert weights[0] == weights[1]
