"""Checkpoint folders: complete or absent, verified, and exact for the optimizer."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from bert_fast import _io
from bert_fast.optim.config import OptimizerOptions
from bert_fast.optim.optimizer import clipped_step, make_optimizer
from bert_fast.runtime import checkpoint
from bert_fast.runtime.checkpoint import CorruptCheckpointError


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("one")
    (folder / "b.bin").write_bytes(bytes(range(256)))


def test_a_written_folder_verifies(tmp_path: Path) -> None:
    checkpoint.write_folder(tmp_path / "c", fill)
    checkpoint.verify_folder(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["files"]["a.txt"]["bytes"] == 3


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        checkpoint.write_folder(tmp_path / "step-00000001", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_write_cleans_up_after_killed_ones(tmp_path: Path) -> None:
    """One killed while it wrote, one between moving the old folder aside and renaming the new one."""
    for leftover in (".step-00000001.00000000-77-0123abcd.tmp", ".step-00000002.00000000-78-0123abcd.old"):
        (tmp_path / leftover).mkdir()
        fill(tmp_path / leftover)
    (tmp_path / ".hidden").mkdir()  # not a leftover
    checkpoint.write_folder(tmp_path / "step-00000003", fill)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".hidden", "step-00000002", "step-00000003"]


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_folder(tmp_path / "c", fill)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.suffix == ".tmp":
            raise OSError("gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(_io, "_exchange", lambda *_: False)
    with pytest.raises(OSError, match="gone"):
        checkpoint.write_folder(tmp_path / "c", lambda folder: (folder / "new").write_text("x") and None)
    checkpoint.verify_folder(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]
    assert (tmp_path / "c" / "a.txt").read_text() == "one"


def test_replacing_a_folder_keeps_only_the_new_content(tmp_path: Path) -> None:
    checkpoint.write_folder(tmp_path / "c", fill)
    checkpoint.write_folder(tmp_path / "c", lambda folder: (folder / "new").write_text("x") and None)
    checkpoint.verify_folder(tmp_path / "c")
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["manifest.json", "new"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "a.txt").write_text("two"), r"a\.txt is corrupt: sha256 is"),
        (lambda c: (c / "a.txt").write_text("longer"), r"a\.txt is corrupt: bytes is 6, the manifest says 3"),
        (lambda c: (c / "b.bin").unlink(), r"b\.bin is missing"),
        (lambda c: (c / "manifest.json").unlink(), r"manifest\.json is missing"),
        (lambda c: (c / "manifest.json").write_text("{"), r"manifest\.json is not valid JSON"),
    ],
    ids=["content", "size", "missing", "no manifest", "bad manifest"],
)
def test_a_corrupt_file_is_named(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    checkpoint.write_folder(tmp_path / "c", fill)
    damage(tmp_path / "c")
    with pytest.raises(CorruptCheckpointError, match=message):
        checkpoint.verify_folder(tmp_path / "c")


BAD_MANIFESTS = {
    "no object": ("[]", r"manifest\.json is \[\]; expected an object"),
    "no files": ('{"format": 1}', r"manifest\.json has no 'files'"),
    "files": ('{"format": 1, "files": []}', r"manifest\.json: 'files' is \[\]; expected an object"),
    "format": ('{"format": 2, "files": {}}', r"manifest\.json has format 2; expected 1"),
    "entry": ('{"format": 1, "files": {"a.txt": 3}}', r"manifest\.json: 'a\.txt' is 3; expected an object"),
    "entry's key": ('{"format": 1, "files": {"a.txt": {"bytes": 3}}}', r"manifest\.json: 'a\.txt' has no 'sha256'"),
    "outside": ('{"format": 1, "files": {"../x": {"bytes": 0, "sha256": ""}}}', r"names the file \"\.\./x\""),
    "encoding": ("\udcff", r"manifest\.json is not valid JSON"),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_a_manifest_of_another_schema_is_named(tmp_path: Path, case: str) -> None:
    text, message = BAD_MANIFESTS[case]
    checkpoint.write_folder(tmp_path / "c", fill)
    (tmp_path / "c" / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CorruptCheckpointError, match=message):
        checkpoint.verify_folder(tmp_path / "c")


def test_whichever_bit_of_a_file_flips_the_older_checkpoint_is_taken(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.write_folder(checkpoint.checkpoint_path(tmp_path, step), fill)
    newest = tmp_path / "step-00000002"
    for name in ("manifest.json", "a.txt"):
        path = newest / name
        data = path.read_bytes()
        for bit in range(8 * len(data)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            messages: list[str] = []
            assert checkpoint.newest_valid(tmp_path, messages.append) == tmp_path / "step-00000001", (name, bit)
            assert len(messages) == 1
            assert str(newest) in messages[0]
        path.write_bytes(data)
    assert checkpoint.newest_valid(tmp_path, messages.append) == newest


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.write_folder(tmp_path / "c", fill)

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "_fingerprint", fail)
    with pytest.raises(CorruptCheckpointError, match=r"a\.txt can't be read: Input/output error"):
        checkpoint.verify_folder(tmp_path / "c")


def test_the_newest_valid_checkpoint_is_chosen_and_corrupt_ones_are_reported(tmp_path: Path) -> None:
    messages: list[str] = []
    assert checkpoint.newest_valid(tmp_path, messages.append) is None
    for step in (5, 10, 100):
        checkpoint.write_folder(checkpoint.checkpoint_path(tmp_path, step), fill)
    assert checkpoint.newest_valid(tmp_path, messages.append) == tmp_path / "step-00000100"
    assert messages == []
    (tmp_path / "step-00000100" / "b.bin").write_bytes(b"")
    assert checkpoint.newest_valid(tmp_path, messages.append) == tmp_path / "step-00000010"
    assert len(messages) == 1
    assert "step-00000100/b.bin is corrupt" in messages[0]
    for step in (5, 10):
        (checkpoint.checkpoint_path(tmp_path, step) / "a.txt").unlink()
    with pytest.raises(CorruptCheckpointError, match=r"no valid.*step-00000100/b\.bin.*step-00000005/a\.txt"):
        checkpoint.newest_valid(tmp_path, messages.append)


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.write_folder(checkpoint.checkpoint_path(tmp_path, step), fill)
    checkpoint.prune(tmp_path, 0)
    assert len(checkpoint.list_checkpoints(tmp_path)) == 3
    checkpoint.prune(tmp_path, 2)
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]


def test_pruning_keeps_what_it_is_told_to_keep(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint.write_folder(checkpoint.checkpoint_path(tmp_path, step), fill)
    checkpoint.prune(tmp_path, 1, [checkpoint.checkpoint_path(tmp_path, step) for step in (2, 9)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]


def test_a_killed_deletion_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint.checkpoint_path(tmp_path, 1)
    checkpoint.write_folder(path, fill)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.delete(path)
    assert checkpoint.list_checkpoints(tmp_path) == []
    assert [left.name.startswith(".step-00000001.") for left in tmp_path.iterdir()] == [True]


def test_later_checkpoints_are_set_aside_under_new_names(tmp_path: Path) -> None:
    for number in (1, 2):
        for step in (1, 2, 3):
            checkpoint.write_folder(checkpoint.checkpoint_path(tmp_path, step), fill)
        assert checkpoint.set_aside(tmp_path, 1) == tmp_path / f"abandoned-{number}"
    for number in (1, 2):
        aside = checkpoint.list_checkpoints(tmp_path / f"abandoned-{number}")
        assert [path.name for path in aside] == ["step-00000002", "step-00000003"]
        checkpoint.verify_folder(aside[-1])
    assert [path.name for path in checkpoint.list_checkpoints(tmp_path)] == ["step-00000001"]
    assert checkpoint.set_aside(tmp_path, 1) is None


def test_a_state_of_another_schema_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no trainer_state\.json: it is not a checkpoint to resume from"):
        checkpoint.load_trainer_state(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"optimizer_scalars": {}, "step": "1"}')
    with pytest.raises(ValueError, match=r"trainer_state\.json: 'step' is \"1\"; expected an integer"):
        checkpoint.load_trainer_state(tmp_path, {"step": int})


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENOSPC, "the disk is full"), (errno.EDQUOT, "the disk quota is used up")]
)
def test_a_full_disk_leaves_the_older_checkpoint_and_is_named(tmp_path: Path, number: int, reason: str) -> None:
    checkpoint.write_folder(tmp_path / "step-00000001", fill)

    def fail(folder: Path) -> None:
        fill(folder)
        raise SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})")

    with pytest.raises(OSError, match=f"step-00000002 can't be written: {reason}") as caught:
        checkpoint.write_folder(tmp_path / "step-00000002", fail)
    assert caught.value.errno == number
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def small() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 2))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    torch.manual_seed(steps)
    for _ in range(steps):
        loss = model(torch.randn(16, 4)).square().mean()
        loss.backward()
        clipped_step(optimizer, 0.1)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_the_optimizer_resumes_to_the_bit(tmp_path: Path, name: str) -> None:
    options = OptimizerOptions(name=name, lr=0.01)  # type: ignore[arg-type]
    model = small()
    optimizer = make_optimizer(model, options)
    train(model, optimizer, 3)
    checkpoint.save_training_state(tmp_path, model, optimizer, {"step": 3})
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    expected = train(model, optimizer, 4)

    torch.manual_seed(99)
    fresh = small()
    fresh.load_state_dict(weights)
    restored = make_optimizer(fresh, options)
    checkpoint.load_training_state(tmp_path, fresh, restored)
    assert checkpoint.load_trainer_state(tmp_path)["step"] == 3
    assert train(fresh, restored, 4) == expected
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model.parameters(), strict=True))


def test_states_of_another_model_are_refused(tmp_path: Path) -> None:
    model = small()
    optimizer = make_optimizer(model, OptimizerOptions())
    train(model, optimizer, 1)
    checkpoint.save_training_state(tmp_path, model, optimizer, {})
    other = nn.Sequential(nn.Linear(4, 8))
    with pytest.raises(ValueError, match=r"optimizer states of 1\.bias, 1\.weight, 3\.bias, 3\.weight"):
        checkpoint.load_training_state(tmp_path, other, make_optimizer(other, OptimizerOptions()))


def test_there_is_no_pickle(tmp_path: Path) -> None:
    model = small()
    optimizer = make_optimizer(model, OptimizerOptions())
    train(model, optimizer, 1)
    checkpoint.write_folder(tmp_path / "c", lambda f: checkpoint.save_training_state(f, model, optimizer, {}))
    suffixes = {path.suffix for path in (tmp_path / "c").iterdir()}
    assert suffixes == {".json", ".safetensors"}


def test_prune_deletes_links_and_files_of_a_checkpoint_s_name(tmp_path: Path) -> None:
    """A checkpoint that was moved to another disk and linked: the link goes, the checkpoint there stays."""
    root, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for folder in (elsewhere, root / "step-00000003"):
        folder.mkdir(parents=True)
        (folder / "model").write_text("x")
    (root / "step-00000001").symlink_to(elsewhere)
    (root / "step-00000002").write_text("")
    checkpoint.prune(root, 1)
    assert [path.name for path in root.iterdir()] == ["step-00000003"]
    assert (elsewhere / "model").read_text() == "x"
