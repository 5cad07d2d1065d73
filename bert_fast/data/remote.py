"""Prepared folders behind a URL, through fsspec: written with the manifest last, read through a checked local copy."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from bert_fast.data.shards import MANIFEST, read_manifest, sha256, verify_files
from bert_fast.data.sources import filesystem


def check_remote_free(url: str, overwrite: bool) -> None:
    """Raise ValueError unless a prepared folder may be written to `url`: nothing is there, or one to overwrite."""
    files, path = filesystem(url)
    if not files.exists(path) or not files.find(path):
        return
    if not files.exists(f"{path}/{MANIFEST}"):
        raise ValueError(f"{url} exists and is not a prepared data folder; choose another output")
    if not overwrite:
        raise ValueError(f"{url} is a prepared data folder already; use it, or pass overwrite=true to replace it")


def upload(folder: Path, url: str) -> None:
    """Copy a prepared folder to `url`; the manifest comes last, so that a half-written folder is none."""
    files, path = filesystem(url)
    if files.exists(path):
        if files.exists(f"{path}/{MANIFEST}"):
            files.rm_file(f"{path}/{MANIFEST}")
        files.rm(path, recursive=True)
    for name in [*read_manifest(folder)["files"], MANIFEST]:
        files.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
        files.put_file(str(folder / name), f"{path}/{name}")


def local_folder(folder: str | Path, cache: str | Path | None = None) -> Path:
    """A prepared folder on this machine: the folder itself, or the copy of a URL's in the cache.

    A file:// URL is no copy. Of other URLs, files that the cache lacks are fetched, each whole and with its SHA-256
    checked, and memory-mapped from there; one process of a machine fetches, the others wait.

    Args:
        folder: a path, or a URL that fsspec knows.
        cache: where copies are kept; $XDG_CACHE_HOME/bert_fast/data if None. The copy of a folder is named by the hash
            of its manifest, so another content never meets an old copy.

    Raises:
        ValueError: there is no prepared folder, or a file of it is missing, truncated or corrupt; it is named.
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
    cache.mkdir(parents=True, exist_ok=True)
    try:
        manifest = files.cat_file(f"{path}/{MANIFEST}")
    except FileNotFoundError as error:
        raise ValueError(
            f"{url} is not a prepared data folder (no {MANIFEST}); make one with bert-fast prepare"
        ) from error
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        (Path(temporary) / MANIFEST).write_bytes(manifest)
        target = cache / sha256(Path(temporary) / MANIFEST)[:32]
    target.mkdir(exist_ok=True)
    with (target / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / MANIFEST).is_file():
            _write(target / MANIFEST, manifest)
        for name, entry in read_manifest(target)["files"].items():
            if not (target / name).is_file() or (target / name).stat().st_size != entry["bytes"]:
                (target / name).parent.mkdir(exist_ok=True)
                part = target / f"{name}.part"
                try:
                    files.get_file(f"{path}/{name}", str(part))
                except FileNotFoundError as error:
                    raise ValueError(f"{url}/{name} is missing; prepare the data again") from error
                if part.stat().st_size != entry["bytes"] or sha256(part) != entry["sha256"]:
                    part.unlink()
                    raise ValueError(
                        f"{url}/{name} is corrupt (its size or SHA-256 is not the manifest's); prepare it again"
                    )
                part.rename(target / name)
    verify_files(target)
    return target


def _write(path: Path, content: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content)
    part.rename(path)
