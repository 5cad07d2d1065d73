"""Find the files of a checkpoint in a folder or on the hub."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
# The arguments of `Source`, besides name_or_path.
HUB_OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")


@dataclass(frozen=True)
class Source:
    """A folder or a hub repository, and how the hub is asked; the options mean what they mean in transformers.

    Attributes:
        name_or_path: a folder, or the name of a hub repository.
        subfolder: of the folder or repository.
        revision: branch, tag or commit of the repository.
        token: for a private repository; True for the one that `hf auth login` stored. It is not pickled.
        cache_dir: where the hub's files are kept; None for the hub's cache.
        local_files_only: whether to read the hub's cache only.
        force_download: whether to download files that are in the cache.

    Raises:
        TypeError: an argument has another type.
    """

    name_or_path: str | os.PathLike[str]
    subfolder: str = ""
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False
    force_download: bool = False

    def __post_init__(self) -> None:
        types: dict[str, tuple[type, ...]] = {
            "name_or_path": (str, os.PathLike),
            "subfolder": (str,),
            "revision": (str, type(None)),
            "token": (str, bool, type(None)),
            "cache_dir": (str, os.PathLike, type(None)),
            "local_files_only": (bool,),
            "force_download": (bool,),
        }
        for name, accepted in types.items():
            value = getattr(self, name)
            if not isinstance(value, accepted):
                expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in accepted)
                raise TypeError(f"{name} is of type {type(value).__name__}; expected {expected}")

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "token": None}

    def __str__(self) -> str:
        return f"{self.name_or_path}/{self.subfolder}" if self.subfolder else str(self.name_or_path)

    def at(self, name_or_path: str | os.PathLike[str]) -> Source:
        """Another folder or repository, asked for in the same way."""
        return replace(self, name_or_path=name_or_path, subfolder="", revision=None)

    def within(self, folder: str) -> Source:
        """The folder `folder` in this one; "" for itself."""
        if not folder:
            return self
        return replace(self, subfolder=f"{self.subfolder}/{folder}" if self.subfolder else folder)

    def find(self, filename: str) -> Path | None:
        """The path of a file, which is downloaded to the hub's cache if necessary.

        Symbolic links are followed: the hub's cache consists of them.

        Returns:
            The path; None if the folder or repository has no such file.

        Raises:
            FileNotFoundError: there is no such folder and no such repository, or it is not in the cache and
                `local_files_only` is True.
            ImportError: it may be a repository, and huggingface_hub is not installed.
        """
        folder = Path(self.name_or_path).expanduser()
        if folder.is_dir():
            path = folder / self.subfolder / filename
            return path if path.is_file() else None
        name = str(self.name_or_path)
        if folder.exists() or name.startswith((".", "/", "~")) or not name or name.count("/") > 1 or "\\" in name:
            raise FileNotFoundError(f"{name} is not a folder; expected a folder with {filename}, or a hub name")
        return self._download(name, filename)

    def _download(self, name: str, filename: str) -> Path | None:
        try:
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import (
                EntryNotFoundError,
                GatedRepoError,
                LocalEntryNotFoundError,
                RepositoryNotFoundError,
                RevisionNotFoundError,
            )
        except ImportError as error:
            raise ImportError(
                f"{name!r} is no local folder, and huggingface_hub, which would look it up on the hub, is not "
                "installed: pip install huggingface_hub, or give a folder"
            ) from error
        options: Any = {
            option: value for option in HUB_OPTIONS if (value := getattr(self, option)) not in (None, "", False)
        }
        if self.token is False:  # send none, though one is stored
            options["token"] = False
        try:
            return Path(hf_hub_download(name, filename, **options))
        except LocalEntryNotFoundError as error:
            if self._is_known_absent(name, filename):
                return None
            why = "local_files_only is True" if self.local_files_only else "the hub can't be reached"
            raise FileNotFoundError(
                f"{name!r} is no local folder; its {filename} is not in the hub's cache, and {why}"
            ) from error
        except EntryNotFoundError:
            return None
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"the hub's repository {name!r} has no revision {self.revision!r}") from error
        except GatedRepoError as error:
            raise FileNotFoundError(
                f"the hub's repository {name!r} is gated: request access, and pass token"
            ) from error
        except RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{name!r} is no local folder, and the hub has no repository of that name"
            ) from error

    def _is_known_absent(self, name: str, filename: str) -> bool:
        """Whether the hub said, when it was asked last, that the repository has no such file."""
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

        path = f"{self.subfolder}/{filename}" if self.subfolder else filename
        folder = None if self.cache_dir is None else Path(self.cache_dir)
        found = try_to_load_from_cache(name, path, cache_dir=folder, revision=self.revision)
        return found is _CACHED_NO_EXIST
