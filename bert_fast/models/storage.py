"""The files of a checkpoint: weights in safetensors or, if allowed, pickles, and config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast._io import atomic_folder, read_json
from bert_fast.models.files import (
    CONFIG_NAME,
    INDEX_NAME,
    PICKLE_INDEX_NAME,
    PICKLE_NAME,
    WEIGHTS_NAME,
    Source,
)


def read(source: Source, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, under their names in the file.

    Args:
        allow_pickle: read pytorch_model.bin where there is no safetensors file (weights only, no code).

    Raises:
        FileNotFoundError: there are no weights, or only pickled ones and `allow_pickle` is False.
        ValueError: a file is damaged, or an index names a file that is absent or of another kind.
    """
    if path := source.find(WEIGHTS_NAME):
        return read_safetensors(path)
    if index := source.find(INDEX_NAME):
        return _read_sharded(index, source, ".safetensors")
    pickled = source.find(PICKLE_NAME)
    pickled_index = None if pickled else source.find(PICKLE_INDEX_NAME)
    if not pickled and not pickled_index:
        raise FileNotFoundError(f"{source} has no {WEIGHTS_NAME} and no {INDEX_NAME}")
    if not allow_pickle:
        raise FileNotFoundError(
            f"{source} has no {WEIGHTS_NAME}, only a pickled {(pickled or pickled_index or Path()).name}; "
            "pass allow_pickle=True to read it (weights only), or convert it to safetensors"
        )
    return read_pickle(pickled) if pickled else _read_sharded(pickled_index, source, ".bin")  # type: ignore[arg-type]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, mapped to memory: only what is used is read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except OSError as error:
        raise OSError(error.errno, f"can't be read: {error.strerror or error}", str(path)) from error
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state_dict; no code is run."""
    try:
        state_dict: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # unpickling a damaged file raises any kind
        raise ValueError(f"{path} is damaged, or not a state_dict of tensors alone: {error}") from error
    items = state_dict.items() if isinstance(state_dict, dict) else ()
    tensors = {name: x for name, x in items if isinstance(name, str) and isinstance(x, Tensor)}
    if not tensors:
        raise ValueError(f"{path} has no tensors; expected a state_dict")
    return tensors


def _read_sharded(index: Path, source: Source, suffix: str) -> dict[str, Tensor]:
    weight_map = read_json(index, {"weight_map": dict})["weight_map"]
    tensors: dict[str, Tensor] = {}
    for filename in sorted(set(map(str, weight_map.values()))):
        if not filename.endswith(suffix):
            raise ValueError(f"{index} names {filename!r}; expected names of {suffix} files")
        path = source.find(filename) if Path(filename).name == filename else None
        if path is None:
            raise ValueError(f"{index} names {filename}, which is not in the same folder")
        shard = read_safetensors(path) if suffix == ".safetensors" else read_pickle(path)
        if repeated := sorted(tensors.keys() & shard.keys()):
            raise ValueError(f"{path} has {shorten(repeated)}, which another of the files named by {index} has too")
        tensors.update(shard)
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise ValueError(f"the files named by {index} lack {shorten(missing)}")
    return tensors


def shorten(names: list[str]) -> str:
    """Three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def write(tensors: Mapping[str, Tensor], config: str, folder: Path, others: Mapping[str, bytes] | None = None) -> None:
    """Write model.safetensors, config.json and `others`, all or none; other files of `folder` stay.

    Args:
        tensors: on the CPU, contiguous, sharing no memory.
        config: the text of config.json.
        others: the contents of more files, by their path in `folder`.

    Raises:
        OSError: a file can't be written; the old ones are unchanged.
    """
    from safetensors.torch import save_file

    with atomic_folder(folder, overwrite=True, keep_others=True) as temporary:
        (temporary / CONFIG_NAME).write_text(config, encoding="utf-8")
        for name, content in (others or {}).items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)
        save_file(dict(tensors), temporary / WEIGHTS_NAME, metadata={"format": "pt"})
