"""The folder of a model: one on disk, or the copy of a hub repository in the hub's cache."""

from __future__ import annotations

from pathlib import Path

# Configuration, weights and tokenizer; never pickles or code.
_PATTERNS = ["*.json", "*.safetensors", "vocab.txt", "merges.txt", "*.model"]


def local_folder(name_or_path: str | Path, expected: str = "a folder with config.json and model.safetensors") -> Path:
    """The folder `name_or_path`; if there is none, that of the hub repository of this name, downloaded once.

    Args:
        name_or_path: a folder, or the name of a hub repository.
        expected: for the message.

    Raises:
        FileNotFoundError: there is neither a folder nor a repository of this name, or the hub can't be reached.
    """
    folder, name = Path(name_or_path).expanduser(), str(name_or_path)
    if name and folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or not name or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"{name or 'an empty name'} is not a folder; expected {expected}, or a hub name")
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    except ImportError as error:
        raise FileNotFoundError(
            f"{name} is not a folder; expected {expected}, or a hub name, for which huggingface_hub is not installed: "
            "pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, allow_patterns=_PATTERNS))
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is not a folder; expected {expected}, or a hub name: it is not in the hub's cache, and the hub "
            "can't be reached"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name} is not a folder; expected {expected}, or a hub name: the hub has no repository of that name"
        ) from error
