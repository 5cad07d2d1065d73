"""Find the files of a checkpoint in a folder or on the hub."""

from __future__ import annotations

from pathlib import Path

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"


def find_file(name_or_path: str | Path, filename: str, *, revision: str | None = None) -> Path | None:
    """The path of a file in a folder, or in a hub repository (downloaded to the hub's cache).

    Args:
        name_or_path: a folder, or the name of a hub repository.
        revision: branch, tag or commit of the repository.

    Returns:
        The path; None if the folder or repository has no such file.

    Raises:
        FileNotFoundError: `name_or_path` is neither a folder nor a repository.
        ImportError: it may be a repository, and huggingface_hub is not installed.
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
            f"{name!r} is no local folder, and huggingface_hub, which would look it up on the hub, is not "
            "installed: pip install huggingface_hub, or give a folder"
        ) from error
    try:
        return Path(hf_hub_download(name, filename, revision=revision))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name!r} is no local folder; its {filename} is not in the hub's cache, and the hub can't be reached"
        ) from error
    except EntryNotFoundError:
        return None
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{name!r} is no local folder, and the hub has no repository of that name") from error
