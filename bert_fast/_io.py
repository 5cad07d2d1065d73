"""Atomic files and folders: written next to the target, flushed to disk, renamed; a replaced target is deleted last.

A new target appears complete or not at all, also after a crash or a power failure. An old target is moved aside before
the new one takes its name and deleted afterwards: at every moment one of them is complete on disk, and `recover`
restores an old one that has lost its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY, _REPLACED = ".tmp", ".old"
_HOST = f"{zlib.crc32(os.uname().nodename.encode()):08x}"
_LEFTOVER = re.compile(
    r"\.(?P<target>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}(?P<suffix>\.tmp|\.old)", re.DOTALL
)


def temporary_path(target: Path, suffix: str = _TEMPORARY) -> Path:
    """A hidden path in the folder of `target` that no other writer uses; it names host and process."""
    return target.with_name(f".{target.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}{suffix}")


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            fsync(path)
    fsync(folder)


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path for the block to write; it is renamed to `target` on success and removed on an exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(target)
        fsync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(target) as path:
        path.write_text(text, encoding="utf-8")


def write_json(target: Path, values: Any, *, sort_keys: bool = False) -> None:
    """Write `values` as indented JSON, atomically; a value that JSON cannot represent is written as its text."""
    text = json.dumps(values, indent=1, ensure_ascii=False, default=str, sort_keys=sort_keys)
    write_text(target, text + "\n")


def read_json(path: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        fields: the keys that it must have, and the type of each value.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no JSON object, a key is missing or a value has another type; the message names the file.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    return check_fields(values, fields or {}, str(path))


def check_fields(values: Any, fields: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Any]:
    """`values`, if it is a mapping that has `fields` with values of their types (a bool is no int).

    Raises:
        ValueError: it is not; the message begins with `where`.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {_kind(values)}; expected an object")
    for name, kind in fields.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if name not in values:
            raise ValueError(f"{where} has no {name!r}")
        value = values[name]
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(_NAMES.get(k, k.__name__) for k in kinds)
            raise ValueError(f"{where}: {name!r} is {_kind(value)}; expected {expected}")
    return values


def safe_name(folder: Path, name: Any, where: str) -> Path:
    """The path `folder / name` of a file that a manifest or an index names.

    Args:
        folder: the folder of the manifest.
        name: the name that it gives, with "/" between folders.
        where: the manifest, for the message.

    Raises:
        ValueError: `name` is no relative path inside `folder`: not a string, empty, absolute, with a backslash, a
            colon, a character that is not printable, or a part that is empty, "." or "..".
    """
    if (
        not isinstance(name, str)
        or any(part in ("", ".", "..") for part in name.split("/"))
        or any(character in "\\:" for character in name)
        or not name.isprintable()
    ):
        raise ValueError(f"{where} names the file {_kind(name)}; expected a path inside its folder")
    return folder / name


_NAMES = {dict: "an object", list: "a list", str: "a string", int: "an integer", float: "a number", type(None): "null"}


def _kind(value: Any) -> str:
    """A short description of a JSON value for an error message."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else _NAMES.get(type(value), type(value).__name__)


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder for the block to fill; it becomes `target` on success and is removed on an exception.

    Raises:
        FileExistsError: `target` exists and `overwrite` is False, checked before and after the block.
    """
    recover(target.parent, exclusive=False)
    check_absent(target, overwrite=overwrite)
    temporary = temporary_path(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        commit_folder(temporary, target, overwrite=overwrite)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def commit_folder(temporary: Path, target: Path, *, overwrite: bool = True) -> None:
    """Flush the folder `temporary` to disk and rename it to `target`.

    Raises:
        FileExistsError: `target` exists and `overwrite` is False.
    """
    check_absent(target, overwrite=overwrite)
    fsync_tree(temporary)
    replaced = temporary_path(target, _REPLACED)
    try:
        if overwrite and os.path.lexists(target):
            target.rename(replaced)
        temporary.rename(target)
    except BaseException:
        if os.path.lexists(replaced) and not os.path.lexists(target):
            replaced.rename(target)
        check_absent(target, overwrite=overwrite)  # another writer was faster
        raise
    fsync(target.parent)
    remove(replaced)


def check_absent(target: Path, *, overwrite: bool) -> None:
    """FileExistsError if `target` exists and `overwrite` is False."""
    if not overwrite and os.path.lexists(target):
        raise FileExistsError(f"{target} exists; choose another folder, or give --overwrite true")


def recover(parent: Path, *, exclusive: bool = True) -> None:
    """Clean up in the folder `parent` after killed writers.

    Temporary files and folders are deleted. An old target that was moved aside is renamed back, unless a new one
    exists. Only leftovers of ended processes of this host are touched, and with `exclusive` those of every folder.

    Args:
        parent: the folder of the targets; it may be missing.
        exclusive: whether no other process writes folders in `parent` at the moment.
    """
    for path in parent.glob(".*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or not ((exclusive and path.is_dir()) or _has_ended(match["host"], int(match["pid"]))):
            continue
        target = parent / match["target"]
        with contextlib.suppress(FileNotFoundError):  # another process cleans up at the same time
            if match["suffix"] == _REPLACED and not os.path.lexists(target):
                path.rename(target)
            else:
                remove(path)


def _has_ended(host: str, pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return host == _HOST
    except PermissionError:  # a process of another user
        pass
    return False


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
