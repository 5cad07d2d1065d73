"""Checkpoints: folders that appear complete or not at all, every byte verified before use.

    <output_dir>/checkpoints/step-00000500/
        config.json, model.safetensors, tokenizer files   what transformers' from_pretrained reads
        training_state.safetensors                        the optimizer's tensors, or, if they are sharded,
        optimizer/*.safetensors                           one file per rank, by torch.distributed.checkpoint
        trainer_state.json                                position, running sums, settings
        manifest.json                                     size and SHA-256 of every other file

A checkpoint is written under a temporary name, flushed to disk and renamed. It contains no pickle. A run that goes on
from an older checkpoint leaves a branch: its later checkpoints are moved to <output_dir>/checkpoints/abandoned-N, so
that the steps in `checkpoints` are in the order in which they were written.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from bert_fast import _io
from bert_fast.models.storage import read_safetensors
from bert_fast.optim.optimizer import is_sharded
from bert_fast.runtime.ranks import Ranks

MANIFEST = "manifest.json"
STATE = "trainer_state.json"
TENSORS = "training_state.safetensors"
SHARDS = "optimizer"
_FORMAT = 1


class CorruptCheckpointError(ValueError):
    """A file of a checkpoint is missing or differs from what was written; the message names it."""


def checkpoint_path(root: Path, step: int) -> Path:
    """The folder of the checkpoint of `step`, in the folder `root` of all checkpoints."""
    return root / f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints in `root`, oldest first."""
    if not root.is_dir():
        return []
    checkpoints = [path for path in root.iterdir() if re.fullmatch(r"step-[0-9]+", path.name)]
    return sorted(checkpoints, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def write_folder(target: Path, fill: Callable[[Path], None], ranks: Ranks | None = None) -> None:
    """Write the folder `target` with what `fill(folder)` writes and a manifest: it appears complete, or not at all.

    An existing `target` is replaced. Leftovers of killed writers are deleted.

    Args:
        target: the folder.
        fill: writes the files into the folder that it gets.
        ranks: if given, every rank must call this, and `fill` runs on each with the same folder, which must be on a
            file system shared by all ranks.

    Raises:
        RankError: another rank failed.
        OSError: the disk is full, a quota or limit is reached, or the device fails; the message names `target`.
    """
    target = Path(os.path.realpath(target))

    def begin() -> Path:
        with _io.write_errors(target):
            _io.make_folder(target.parent)
            _io.recover(target.parent)
            temporary = _io.temporary_path(target)
            temporary.mkdir()
            return temporary

    def write() -> None:
        with _io.write_errors(target):
            fill(temporary)

    def commit() -> None:
        with _io.write_errors(target):
            _write_manifest(temporary)
            _io.commit_folder(temporary, target)

    temporary = begin() if ranks is None else ranks.on_rank0(begin)
    try:
        if ranks is None:
            write()
            commit()
        else:
            ranks.on_all_ranks(write)
            ranks.on_rank0(commit)
    except BaseException:
        if ranks is None or ranks.main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write_manifest(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _fingerprint(path) for path in paths}
    _io.write_json(folder / MANIFEST, {"format": _FORMAT, "files": files})


def verify_folder(folder: Path) -> None:
    """Verify that every file in the manifest of `folder` is as it was written.

    Raises:
        CorruptCheckpointError: it is not, can't be read, or the manifest is no manifest; the message names the file.
    """
    for name, expected in read_manifest(folder).items():
        path = folder / name
        if not path.is_file():
            raise CorruptCheckpointError(f"{path} is missing; the manifest lists it")
        try:
            actual = _fingerprint(path)
        except OSError as error:
            raise CorruptCheckpointError(f"{path} can't be read: {error.strerror}") from error
        for key in ("bytes", "sha256"):
            if actual[key] != expected[key]:
                raise CorruptCheckpointError(
                    f"{path} is corrupt: {key} is {actual[key]}, the manifest says {expected[key]}"
                )


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """The files that the manifest of `folder` lists: {name: {"bytes": size, "sha256": checksum}}.

    Raises:
        CorruptCheckpointError: it is missing, can't be read or is no manifest; the message names it.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise CorruptCheckpointError(f"{path} is missing")
    try:
        manifest = _io.read_json(path, {"format": int, "files": dict})
        if manifest["format"] != _FORMAT:
            raise ValueError(f"{path} has format {manifest['format']}; expected {_FORMAT}")
        files: dict[str, dict[str, Any]] = manifest["files"]
        for name, entry in files.items():
            _io.safe_name(path.parent, name, str(path))
            _io.check_fields(entry, {"bytes": int, "sha256": str}, f"{path}: {name!r}")
    except OSError as error:
        raise CorruptCheckpointError(f"{path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CorruptCheckpointError(str(error)) from error
    return files


def newest_valid(root: Path, report: Callable[[str], None]) -> Path | None:
    """The newest checkpoint in `root` that verifies, or None if there are no checkpoints.

    Each corrupt checkpoint that is skipped is reported through `report`.

    Raises:
        CorruptCheckpointError: every checkpoint is corrupt.
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
            report(f"corrupt checkpoint skipped: {message}; resuming from the older {path}")
        return path
    if errors:
        raise CorruptCheckpointError(
            f"no valid checkpoint in {root}: {'; '.join(errors)}. Choose another output_dir to start a new run"
        )
    return None


def find_checkpoint(resume: str, root: Path, report: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from, verified; None for a new run.

    Args:
        resume: auto (the newest valid checkpoint in `root`, if there is one), never, or the folder of a checkpoint.
        root: the folder of the run's checkpoints.
        report: called with a message for each corrupt checkpoint that is skipped.

    Raises:
        ValueError: `resume` is never and there are checkpoints.
        FileNotFoundError: `resume` is not a folder.
        CorruptCheckpointError: the checkpoint that `resume` names is corrupt, or every checkpoint is.
    """
    if resume == "auto":
        return newest_valid(root, report)
    if resume == "never":
        if list_checkpoints(root):
            raise ValueError(
                f"{root} has checkpoints and resume is never; choose another output_dir, delete them, "
                "or resume with resume=auto"
            )
        return None
    if not Path(resume).is_dir():
        raise FileNotFoundError(f"resume is {resume!r}; expected auto, never or the folder of a checkpoint")
    verify_folder(Path(resume))
    return Path(resume)


def prune(root: Path, keep_last: int, keep: Collection[Path] = ()) -> None:
    """Delete all checkpoints in `root` except the newest `keep_last` (0 keeps all) and those of `keep`."""
    for path in list_checkpoints(root)[:-keep_last] if keep_last else []:
        if path not in keep:
            delete(path)


def delete(folder: Path) -> None:
    """Delete a folder, or a link to one (not what it names).

    It loses its name first, so that no half-deleted one is taken for a complete one.
    """
    temporary = _io.temporary_path(folder)
    folder.rename(temporary)
    _io.remove(temporary)


def set_aside(root: Path, after: int) -> Path | None:
    """Move the checkpoints in `root` of steps later than `after` into a new folder `root`/abandoned-N.

    Returns:
        The new folder, or None if there are no such checkpoints.
    """
    later = [path for path in list_checkpoints(root) if _step(path) > after]
    if not later:
        return None
    number = 1
    while os.path.lexists(folder := root / f"abandoned-{number}"):
        number += 1
    folder.mkdir()
    for path in reversed(later):  # at every moment the steps that remain are those of one branch
        path.rename(folder / path.name)
    _io.fsync(folder)
    _io.fsync(root)
    return folder


def save_training_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks | None = None,
) -> None:
    """Write the optimizer's state and `state` (JSON) into `folder`.

    Rank 0 writes tensors; each rank writes its shards of a DTensor. A collective if there are DTensors.
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # Parameters can share a step count, but safetensors rejects tensors that share memory.
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
        _io.write_json(folder / STATE, {**state, "optimizer_scalars": scalars})


def load_trainer_state(folder: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """The dict `state` that `save_training_state` wrote, with the optimizer's scalars.

    Args:
        folder: the checkpoint.
        fields: the keys that it must have, and the type of each value.

    Raises:
        ValueError: the file is missing (the folder holds a model, not a checkpoint), or has another schema.
    """
    path = folder / STATE
    if not path.is_file():
        raise ValueError(f"{folder} has no {STATE}: it is not a checkpoint to resume from")
    return _io.read_json(path, {**(fields or {}), "optimizer_scalars": dict})


def check_state(folder: Path, values: Any, fields: Mapping[str, type | tuple[type, ...]]) -> None:
    """ValueError, naming the file, unless `values`, a part of the state in `folder`, has `fields` of these types."""
    _io.check_fields(values, fields, str(folder / STATE))


def load_training_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the optimizer state that `save_training_state` wrote with any number of ranks, sharded or not.

    Raises:
        ValueError: the checkpoint has states of parameters that `model` does not have.
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
    state_dict = optimizer.state_dict()
    order = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state_dict["state"] = {i: states[names[p]] for i, p in enumerate(order) if names[p] in states}
    optimizer.load_state_dict(state_dict)


def _stored_tensors(folder: Path, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The optimizer's tensors of a checkpoint, each sharded as its parameter is."""
    if not (folder / SHARDS).is_dir():
        return {key: _as_parameter(key, value, parameters) for key, value in read_safetensors(folder / TENSORS).items()}
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.HuggingFaceStorageReader(str(folder / SHARDS))
    tensors: dict[str, Tensor] = {}
    for key, metadata in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(metadata, TensorStorageMetadata)
        empty = torch.empty(metadata.size, dtype=metadata.properties.dtype)
        tensors[key] = _as_parameter(key, empty, parameters)
    dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    return tensors


def _as_parameter(key: str, value: Tensor, parameters: dict[str, nn.Parameter]) -> Tensor:
    """`value`, sharded like its parameter if that is sharded and has the same shape."""
    parameter = parameters.get(key.removeprefix("optimizer/").rpartition("/")[0])
    if parameter is None or not is_sharded(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def _fingerprint(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
