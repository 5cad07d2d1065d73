"""Checkpoints: folders that appear whole or not at all, and whose every byte is verified before it is used.

    <output_dir>/checkpoints/step-00000500/
        config.json, model.safetensors, tokenizer files   what transformers' from_pretrained reads
        training_state.safetensors                        the optimizer's tensors, or, of sharded ones,
        optimizer/*.safetensors                           a file a rank, by torch.distributed.checkpoint
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
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bert_fast.optim.params import is_sharded
from bert_fast.runtime.ranks import Ranks

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
TENSORS = "training_state.safetensors"
SHARDS = "optimizer"
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


def write_folder(target: Path, fill: Callable[[Path], None], ranks: Ranks | None = None) -> None:
    """Make the folder `target` from what `fill(folder)` writes: it appears under its name complete, or not at all.

    An existing `target` is replaced. Leftovers of writes that failed or were cut off are removed.

    Args:
        ranks: all of them call this, and `fill` runs on each, with the same folder: a file system that all see.

    Raises:
        RankError: it failed on another rank.
    """
    main = ranks is None or ranks.main
    temporary = target.parent / f"{_TEMPORARY}{target.name}"

    def begin() -> None:
        if main:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target.parent)
            temporary.mkdir()

    try:
        for part in (begin, lambda: fill(temporary), lambda: _finish(temporary, target) if main else None):
            part() if ranks is None else ranks.together(part)
    except BaseException:
        if main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def _finish(temporary: Path, target: Path) -> None:
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    files = {path.relative_to(temporary).as_posix(): _describe(path) for path in paths}
    (temporary / MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n")
    for path in temporary.rglob("*"):
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


def prune(root: Path, keep: int, spared: int | None = None) -> None:
    """Remove all checkpoints but the newest `keep` (0 keeps all) and that of step `spared`."""
    for path in list_checkpoints(root)[: -keep or None] if keep else []:
        if spared is None or path != checkpoint_path(root, spared):
            shutil.rmtree(path)


def save_training_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks | None = None,
) -> None:
    """Write the optimizer's state and `state` (JSON) into `folder`.

    Whole tensors are written by rank 0; sharded ones (DTensor) by the ranks that have them, which all call this.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # A count can be one tensor for many parameters, which a file can't keep.
                tensors[f"optimizer/{name}/{key}"] = value.detach() if value.dim() else value.detach().clone()
            else:
                scalars.setdefault(name, {})[key] = value
    if any(is_sharded(value) for value in tensors.values()):
        import torch.distributed.checkpoint as dcp

        (folder / SHARDS).mkdir(exist_ok=True)
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True))
    elif ranks is None or ranks.main:
        save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, str(folder / TENSORS))
    if ranks is None or ranks.main:
        (folder / STATE).write_text(json.dumps({**state, "optimizer_scalars": scalars}, indent=1) + "\n")


def load_trainer_state(folder: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint's training state."""
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def load_training_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer the state that `save_training_state` wrote, with any number of ranks, sharded or whole.

    Raises:
        ValueError: the checkpoint's tensors belong to parameters that `model` does not have.
    """
    parameters = dict(model.named_parameters())
    states: dict[str, dict[str, Any]] = {
        name: dict(values) for name, values in load_trainer_state(folder)["optimizer_scalars"].items()
    }
    for key, value in _stored_tensors(folder, parameters).items():
        name, _, entry = key.removeprefix("optimizer/").rpartition("/")
        states.setdefault(name, {})[entry] = value
    unknown = sorted(set(states) - set(parameters))
    if unknown:
        raise ValueError(f"{folder} has optimizer states of {', '.join(unknown)}, which the model does not have")
    names = {parameter: name for name, parameter in parameters.items()}
    described = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    described["state"] = {i: states[names[p]] for i, p in enumerate(order) if names[p] in states}
    optimizer.load_state_dict(described)


def _stored_tensors(folder: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's tensors of a checkpoint, each whole or in shards as its parameter is."""
    if not (folder / SHARDS).is_dir():
        return {key: _as_parameter(key, value, parameters) for key, value in load_file(folder / TENSORS).items()}
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.HuggingFaceStorageReader(str(folder / SHARDS))
    found: dict[str, Tensor] = {}
    for key, described in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(described, TensorStorageMetadata)
        empty = torch.empty(described.size, dtype=described.properties.dtype)
        found[key] = _as_parameter(key, empty, parameters)
    dcp.load(found, storage_reader=reader, no_dist=not dist.is_initialized())
    return found


def _as_parameter(key: str, value: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    """`value`, in shards where its parameter is and has its shape."""
    parameter = parameters.get(key.removeprefix("optimizer/").rpartition("/")[0])
    if parameter is None or not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


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
