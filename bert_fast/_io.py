"""Atomic files and folders: written beside the target, flushed to disk, renamed; a replaced result is deleted last.

A target is complete or absent at every moment, also after a crash or a power cut. An old target is moved aside before
the new one takes its name and deleted only afterwards, so a crash in between loses neither.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_TEMPORARY, _REPLACED = ".tmp", ".old"
_LEFTOVER = re.compile(r"\.(?P<target>.+)\.\d+-[0-9a-f]{8}(?P<suffix>\.tmp|\.old)")


def temporary_path(target: Path, suffix: str = _TEMPORARY) -> Path:
    """A hidden path beside `target` that no other writer uses."""
    return target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}{suffix}")


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


def commit_folder(temporary: Path, target: Path) -> None:
    """Flush the folder `temporary` to disk and rename it to `target`, replacing what is there."""
    fsync_tree(temporary)
    replaced = temporary_path(target, _REPLACED)
    moved = os.path.lexists(target)
    if moved:
        target.rename(replaced)
    try:
        temporary.rename(target)
    except BaseException:
        if moved:
            replaced.rename(target)
        raise
    fsync(target.parent)
    remove(replaced)


@contextmanager
def atomic_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder for the block to fill; it becomes `target` on success and is removed on an exception.

    Raises:
        FileExistsError: `target` exists and `overwrite` is False, checked before and after the block.
    """
    check_absent(target, overwrite=overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(target)
    temporary.mkdir()
    try:
        yield temporary
        check_absent(target, overwrite=overwrite)
        commit_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def check_absent(target: Path, *, overwrite: bool) -> None:
    """FileExistsError if `target` exists and `overwrite` is False."""
    if not overwrite and os.path.lexists(target):
        raise FileExistsError(f"{target} exists; choose another folder, or give --overwrite true")


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def recover(parent: Path) -> None:
    """Clean up after killed writers of folders in `parent`; none may be at work.

    Temporary folders are deleted. A folder that was moved aside gets its name back if no new one has it.
    """
    for path in parent.glob(".*"):
        if path.is_dir() and (match := _LEFTOVER.fullmatch(path.name)):
            target = parent / match["target"]
            if match["suffix"] == _REPLACED and not os.path.lexists(target):
                path.rename(target)
            else:
                shutil.rmtree(path)
