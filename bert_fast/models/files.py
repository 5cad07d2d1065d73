"""Find the files of a checkpoint, in a folder or on the hub, and write them so that none is ever half there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"


def find_file(name_or_path: str | Path, filename: str, *, revision: str | None = None) -> Path | None:
    """The path of `filename` in a folder or in a repository of the hub (downloaded to its cache); None if it is absent.

    Raises:
        FileNotFoundError: `name_or_path` is no folder and can't be the name of a repository, or there is no such one.
        ImportError: it may be the name of a repository, and huggingface_hub is not installed.
    """
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        path = folder / filename
        return path if path.is_file() else None
    name = str(name_or_path)
    if folder.exists() or name.startswith((".", "/", "~")) or not name or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"{name_or_path} is not a folder; expected a folder with {filename}, or a hub name")
    return _download(name, filename, revision)


def _download(name: str, filename: str, revision: str | None) -> Path | None:
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"{name!r} is no folder here, and huggingface_hub, which would look for it on the hub, is not installed: "
            "pip install huggingface_hub, or give a folder"
        ) from error
    try:
        return Path(hf_hub_download(name, filename, revision=revision))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is no folder here; its {filename} is not in the hub's cache, and the hub can't be reached"
        ) from error
    except EntryNotFoundError:
        return None
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{name!r} is no folder here, and the hub has no repository of that name") from error


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, bring it to disk and rename it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as `write_file` does."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write)
