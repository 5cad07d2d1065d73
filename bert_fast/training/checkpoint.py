"""Checkpoints: folders that appear whole or not at all, and whose every byte is verified before it is used.

    <output_dir>/checkpoints/step-00000500/
        config.json, model.safetensors, tokenizer files   what transformers' from_pretrained reads
        training_state.safetensors                        the optimizer's tensors and the generators' states
        trainer_state.json                                position, running sums, settings
        manifest.json                                     size and SHA-256 of every other file

A checkpoint is written under a temporary name, flushed to the disk and renamed. There is no pickle in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
TENSORS = "training_state.safetensors"
_TEMPORARY = ".writing-"
_FORMAT = 1


class CorruptCheckpointError(ValueError):
    """A checkpoint's file is missing or is not what was written; the message names it."""


def checkpoint_path(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies under the folder `root` of all checkpoints."""
    return root / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """The finished checkpoints under `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if path.name.startswith("step-") and path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` from what `fill(folder)` writes: it appears under its name complete, or not at all.

    An existing `target` is replaced. Leftovers of writes that were cut off are removed.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)
    temporary = target.parent / f"{_TEMPORARY}{target.name}"
    temporary.mkdir()
    fill(temporary)
    files = {path.name: _describe(path) for path in sorted(temporary.iterdir())}
    (temporary / MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n")
    for path in temporary.iterdir():
        _flush(path)
    _flush(temporary)
    replaced = target.parent / f"{_TEMPORARY}replaced-{target.name}"
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    _flush(target.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def verify_folder(folder: Path) -> None:
    """CorruptCheckpointError, naming the file, unless `folder` holds exactly what its manifest says."""
    path = folder / MANIFEST
    if not path.is_file():
        raise CorruptCheckpointError(f"{path} is missing")
    try:
        files = json.loads(path.read_text())["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptCheckpointError(f"{path} is corrupt: {type(error).__name__}: {error}") from error
    for name, expected in files.items():
        if not (folder / name).is_file():
            raise CorruptCheckpointError(f"{folder / name} is missing; the manifest lists it")
        found = _describe(folder / name)
        if found != expected:
            what = "bytes" if found["bytes"] != expected["bytes"] else "sha256"
            raise CorruptCheckpointError(
                f"{folder / name} is corrupt: {what} is {found[what]}, the manifest says {expected[what]}"
            )


def newest_good(root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint under `root` that verifies, or None where there is none at all.

    Each corrupt one that is passed over is named through `report`.

    Raises:
        CorruptCheckpointError: there are checkpoints and every one is corrupt.
    """
    checkpoints = list_checkpoints(root)
    errors = []
    for path in reversed(checkpoints):
        try:
            verify_folder(path)
        except CorruptCheckpointError as error:
            errors.append(str(error))
            continue
        for message in errors:
            report(f"corrupt checkpoint passed over: {message}; going on from the older {path}")
        return path
    if errors:
        raise CorruptCheckpointError(
            f"no good checkpoint under {root}: {'; '.join(errors)}. Choose another output_dir to start again"
        )
    return None


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; 0 keeps all."""
    for path in list_checkpoints(root)[: -keep or None] if keep else []:
        shutil.rmtree(path)


def save_training_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Write the optimizer's state, the generators' states and `state` (JSON) into `folder`."""
    tensors = {f"rng/{name}": value for name, value in rng_states().items()}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{name}/{key}"] = value.detach().cpu().contiguous()
            else:
                scalars.setdefault(name, {})[key] = value
    save_file(tensors, str(folder / TENSORS))
    (folder / STATE).write_text(json.dumps({**state, "optimizer_scalars": scalars}, indent=1) + "\n")


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint's training state."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def load_training_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer and the generators the states that `save_training_state` wrote.

    Raises:
        ValueError: the checkpoint's tensors belong to parameters that `model` does not have.
    """
    scalars = load_trainer_state(folder)["optimizer_scalars"]
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in scalars.items()}
    rng: dict[str, Tensor] = {}
    with safe_open(str(folder / TENSORS), "pt") as file:
        for key in file.keys():  # noqa: SIM118 (not a mapping)
            kind, _, rest = key.partition("/")
            if kind == "rng":
                rng[rest] = file.get_tensor(key)
            else:
                name, _, entry = rest.rpartition("/")
                states.setdefault(name, {})[entry] = file.get_tensor(key)
    names = {parameter: name for name, parameter in model.named_parameters()}
    unknown = sorted(set(states) - set(names.values()))
    if unknown:
        raise ValueError(
            f"{folder / TENSORS} has optimizer states of {', '.join(unknown)}, which the model does not have"
        )
    described = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    described["state"] = {i: states[names[p]] for i, p in enumerate(order) if names[p] in states}
    optimizer.load_state_dict(described)
    set_rng_states(rng)


def rng_states() -> dict[str, Tensor]:
    """The states of torch's generators: "cpu" and, where CUDA is in use, "cuda"."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_rng_states(states: dict[str, Tensor]) -> None:
    """Set torch's generators to `states`, as `rng_states` gave them."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _describe(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
