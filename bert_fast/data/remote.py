"""Prepared folders at a URL, through fsspec: written with the manifest last, read through a verified local copy."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path

from bert_fast import _io
from bert_fast.data.shards import MANIFEST, read_manifest, sha256, verify_files
from bert_fast.data.sources import filesystem


def check_remote_free(url: str, overwrite: bool) -> None:
    """Raise ValueError unless `url` is absent, or a prepared folder that may be overwritten."""
    files, path = filesystem(url)
    if not files.exists(path) or not files.find(path):
        return
    if not files.exists(f"{path}/{MANIFEST}"):
        raise ValueError(f"{url} exists and is not a prepared data folder; choose another output")
    if not overwrite:
        raise ValueError(f"{url} is a prepared data folder already; use it, or pass overwrite=true to replace it")


def upload(folder: Path, url: str) -> None:
    """Copy a prepared folder to `url`, the manifest last: without it an incomplete folder is not a prepared one."""
    files, path = filesystem(url)
    if files.exists(path):
        if files.exists(f"{path}/{MANIFEST}"):
            files.rm_file(f"{path}/{MANIFEST}")
        files.rm(path, recursive=True)
    for name in [*read_manifest(folder)["files"], MANIFEST]:
        files.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
        files.put_file(str(folder / name), f"{path}/{name}")


def local_folder(folder: str | Path, cache: str | Path | None = None) -> Path:
    """A local path of a prepared folder; a URL's files are downloaded into a cache, from which they are memory-mapped.

    A file:// URL is read in place. Of other URLs only files missing from the cache are downloaded, and their SHA-256 is
    verified; one process per machine downloads while the others wait.

    Args:
        folder: a path, or a URL supported by fsspec.
        cache: the folder of the copies; $XDG_CACHE_HOME/bert_fast/data if None. A copy is named after the hash of its
            manifest, so data prepared anew never mixes with an old copy.

    Returns:
        `folder` itself, the path of a file:// URL, or the copy in the cache.

    Raises:
        ValueError: there is no prepared folder, or one of its files is missing, truncated or corrupt (the message names
            it), or fsspec does not support the URL.
    """
    url = str(folder)
    if "://" not in url:
        return Path(folder)
    files, path = filesystem(url)
    if url.startswith("file://"):
        return Path(path)
    cache = (
        Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bert_fast/data"
    )
    try:
        manifest = files.cat_file(f"{path}/{MANIFEST}")
    except FileNotFoundError as error:
        raise ValueError(
            f"{url} is not a prepared data folder (no {MANIFEST}); make one with bert-fast prepare"
        ) from error
    target = cache / hashlib.sha256(manifest).hexdigest()[:32]
    target.mkdir(parents=True, exist_ok=True)
    with (target / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / MANIFEST).is_file():
            with _io.atomic_file(target / MANIFEST) as temporary:
                temporary.write_bytes(manifest)
        try:
            entries = read_manifest(target)["files"]
        except ValueError as error:
            (target / MANIFEST).unlink()
            raise ValueError(f"{url}: {str(error).replace(f'{target}/', '')}") from error
        for parent in {(target / name).parent for name in entries}:
            _io.recover(parent, exclusive=False)
        for name, entry in entries.items():
            if (target / name).is_file() and (target / name).stat().st_size == entry["bytes"]:
                continue
            with _io.atomic_file(target / name) as temporary:
                try:
                    files.get_file(f"{path}/{name}", str(temporary))
                except FileNotFoundError as error:
                    raise ValueError(f"{url}/{name} is missing; prepare the data again") from error
                if temporary.stat().st_size != entry["bytes"] or sha256(temporary) != entry["sha256"]:
                    raise ValueError(
                        f"{url}/{name} is corrupt (its size or SHA-256 differs from its manifest); prepare it again"
                    )
    verify_files(target)
    return target
