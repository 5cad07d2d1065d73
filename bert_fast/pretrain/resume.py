"""Where a run begins: the checkpoint that it resumes from, and what becomes of the checkpoints of another branch."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bert_fast import _io
from bert_fast._config import differences
from bert_fast.pretrain.config import RECORDS, SETTINGS, PretrainConfig
from bert_fast.runtime import checkpoint
from bert_fast.runtime.checkpoint import CorruptCheckpointError
from bert_fast.runtime.log import LOG

_NUMBER = (int, float)
_FIELDS: dict[str, Any] = {
    "step": int, "epoch": int, "batch": int, "tokens": int, "totals": list, "guard": dict, "best": (dict, type(None)),
    "total_steps": int, "ranks": int, "data_fingerprint": str, "config": dict,
}  # fmt: skip


def find_checkpoint(
    config: PretrainConfig, root: Path, report: Callable[[str], None], *, restarted: bool = False
) -> Path | None:
    """The verified checkpoint to resume from, as `config.resume` says; None for a new run.

    Leftovers of killed runs are deleted first: no other run is at work in the folder.

    Args:
        config: the run.
        root: the folder of its checkpoints.
        report: called with messages for the user.
        restarted: whether torchrun has started the ranks again: the run then resumes from its own checkpoints.

    Raises:
        FileNotFoundError: `config.resume` names no folder.
        ValueError: it is never and there are checkpoints, or it names a folder that is no checkpoint.
        CorruptCheckpointError: the checkpoint, or every checkpoint, is corrupt.
    """
    for folder in (root.parent, root, root.parent / RECORDS):
        _io.recover(folder)
    wanted = "auto" if config.resume == "never" and restarted else config.resume
    if wanted not in ("auto", "never") and (own := _continuation(config, root)) is not None:
        report(f"this command has gone on from {wanted} before; its newest checkpoint is {own}")
        return own
    return checkpoint.find_checkpoint(wanted, root, report)


def _continuation(config: PretrainConfig, root: Path) -> Path | None:
    """The newest valid checkpoint in `root`, if a run of exactly these settings wrote it."""
    with contextlib.suppress(CorruptCheckpointError):
        newest = checkpoint.newest_valid(root, lambda _: None)
        if newest is not None:
            changed = differences(load_state(newest)["config"], asdict(config))
            if changed.keys() <= {"output_dir", "data.folder", "progress"}:
                return newest
    return None


def load_state(folder: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint.

    Raises:
        ValueError: the folder is no checkpoint of a pretraining run; the message names the file.
    """
    state = checkpoint.load_trainer_state(folder, _FIELDS)
    checkpoint.check_state(folder, state["guard"], {"mean": _NUMBER, "skipped": int, "in_a_row": int})
    if state["best"] is not None:
        checkpoint.check_state(folder, state["best"], {"step": int, "loss": _NUMBER})
    return state


def leave_branch(start: Path, step: int, root: Path, report: Callable[[str], None]) -> None:
    """Move the checkpoints in `root` of other branches than that of `start` aside, with a copy of their log.

    Those are the ones later than `step`, the step of `start`, and all if `start` is not in `root`.
    """
    inside = start.resolve().parent == root.resolve()
    folder = checkpoint.set_aside(root, step if inside else -1)
    if folder is None:
        return
    for name in (LOG, SETTINGS):
        if (root.parent / name).is_file():
            shutil.copy2(root.parent / name, folder / name)
    names = ", ".join(path.name for path in checkpoint.list_checkpoints(folder))
    report(f"the run goes on from {start}; checkpoints of another branch ({names}) and their log are now in {folder}")


def kept(config: PretrainConfig, root: Path, best_step: int | None) -> list[Path]:
    """The checkpoints in `root` that are not pruned: the best one, and the one that `config.resume` names."""
    paths = [] if best_step is None else [checkpoint.checkpoint_path(root, best_step)]
    named = Path(config.resume)
    if named.resolve().parent == root.resolve():
        paths.append(root / named.resolve().name)
    return paths


def is_current(model: Path, start: Path) -> bool:
    """Whether the folder `model` is complete and has the weights of the checkpoint `start`."""
    try:
        checkpoint.verify_folder(model)
        weights = [checkpoint.read_manifest(folder).get("model.safetensors") for folder in (model, start)]
    except CorruptCheckpointError:
        return False
    return weights[0] is not None and weights[0] == weights[1]
