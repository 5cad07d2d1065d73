"""Atomic files and folders: written next to the target, flushed to disk, renamed; a replaced target is deleted last.

A new target appears complete or not at all, also after a crash or a power failure. An old folder changes places with
the new one in one operation; where the file system can't do that, it is moved aside before the new one takes its name,
and `recover` restores one that has lost its name. At every moment one of them is complete on disk.

A write that a full disk, a quota, a limit of the process or a defective device ends raises an OSError whose message
says so and names the target.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import shutil
import stat
import time
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
_LONGEST_WRITE = 7 * 24 * 3600.0  # seconds; a leftover of another host that is older has no writer any more
_ours: set[str] = set()  # the names of temporary paths of this process: a leftover may have the same process number
# Errors of a device, for which the operating system's own text is too short.
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file would exceed the limit of this process (ulimit -f) or of the file system",
    errno.EIO: "the device reports an I/O error",
    errno.EROFS: "the file system is read-only",
}


def temporary_path(target: Path, suffix: str = _TEMPORARY) -> Path:
    """A hidden path in the folder of `target` that no other writer uses; it names host and process."""
    name = f".{target.name}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}{suffix}"
    _ours.add(name)
    return target.with_name(name)


def fsync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk, if its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Flush a folder and everything below it to disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            fsync(path)
    fsync(folder)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents if they are missing, and flush the new entries to disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        fsync(path.parent)


@contextmanager
def write_errors(target: Path, advice: str = "") -> Iterator[None]:
    """In the block, an error of the device is raised as an OSError that names `target` and says what is wrong.

    Args:
        target: what the block writes.
        advice: appended to the message, for example what of it is still there.
    """
    try:
        yield
    except Exception as error:
        number = error_number(error)
        if number is None and re.fullmatch(
            r"\d+ requested and \d+ written", str(error)
        ):  # numpy, which loses the errno
            raise OSError(
                f"{target} can't be written: the disk is full, or a quota or limit is reached{advice}"
            ) from error
        if number is None or number not in _REASONS:
            raise
        raise OSError(number, f"{target} can't be written: {_REASONS[number]}{advice}") from error


def error_number(error: BaseException) -> int | None:
    """The errno of an error of the operating system, also of one that safetensors or torch reports as its own."""
    if isinstance(error, OSError):
        return error.errno
    for inner in getattr(error, "failures", {}).values():  # torch.distributed.checkpoint: (exception, traceback)
        if (number := error_number(inner[0])) is not None:
            return number
    match = re.search(r"\(os error (\d+)\)", str(error))  # Rust's form of it
    return int(match[1]) if match and type(error).__name__ == "SafetensorError" else None


@contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """A temporary path for the block to write; it is renamed to `target` on success and removed on an exception.

    A link is followed. A device, a pipe or an open file (/dev/stdout, /dev/fd/N) gets what the block writes directly.

    Raises:
        OSError: it can't be written; the message names `target`.
    """
    if _is_stream(target):
        with write_errors(target):
            yield target
        return
    real = Path(os.path.realpath(target))
    with write_errors(target):
        make_folder(real.parent)
        recover(real.parent, exclusive=False, name=real.name)
        with _temporary(real) as temporary:
            yield temporary
            _give_default_mode(temporary)
            fsync(temporary)
            temporary.replace(real)
            fsync(real.parent)


def _is_stream(target: Path) -> bool:
    """Whether `target` can't be replaced by a file: a device, a pipe, a file descriptor of a process."""
    descriptor = re.match(r"/proc/|/dev/(fd/|std(in|out|err)$)", os.path.abspath(target)) is not None
    return descriptor or (target.exists() and not target.is_file() and not target.is_dir())


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A temporary path next to `target`; what is there at the end of the block is deleted."""
    path = temporary_path(target)
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _give_default_mode(path: Path) -> None:
    """Give a file that only its owner may read, as safetensors writes it, the mode of other new files."""
    if stat.S_IMODE(path.stat().st_mode) == 0o600:
        path.chmod(0o666 & ~_umask())


def _umask() -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):  # without changing it, which other threads would notice
        text = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(text.partition("Umask:")[2].split()[0], 8)
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_text(target: Path, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    with atomic_file(target) as path:
        path.write_text(text, encoding="utf-8")


def write_json(target: Path, values: Any, *, sort_keys: bool = False) -> None:
    """Write `values` as indented JSON, atomically; a value that JSON cannot represent is written as its text."""
    text = json.dumps(values, indent=1, ensure_ascii=False, default=str, sort_keys=sort_keys)
    write_text(target, text + "\n")


LARGEST_JSON = 2**28  # bytes; a tokenizer.json of 250,000 tokens has 2**24


def read_json(path: Path, fields: Mapping[str, type | tuple[type, ...]] | None = None) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        path: the file.
        fields: the keys that it must have, and the type of each value.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no JSON object or larger than `LARGEST_JSON` bytes, a key is missing or a value has another
            type; the message names the file.
    """
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise ValueError(f"{path} has {size} bytes; expected at most {LARGEST_JSON}")
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
def atomic_folder(target: Path, *, overwrite: bool, keep_others: bool = False) -> Iterator[Path]:
    """A temporary folder for the block to fill; it becomes `target` on success and is removed on an exception.

    Args:
        target: the folder; a link is followed.
        overwrite: replace a folder that exists.
        keep_others: keep the files of an existing folder that the block does not write. A folder that can't be
            replaced as a whole (a mount point, the working folder, one whose parent isn't writable) then gets the new
            files one by one.

    Raises:
        FileExistsError: `target` exists and `overwrite` is False, checked before and after the block.
        OSError: it can't be written; the message names `target`.
    """
    real = Path(os.path.realpath(target))
    with write_errors(target):
        recover(real.parent, exclusive=False)
        check_absent(real, overwrite=overwrite)
        inside = keep_others and real.is_dir() and not _can_be_replaced(real)
        make_folder(real if inside else real.parent)
        with _temporary(real / real.name if inside else real) as temporary:
            temporary.mkdir()
            yield temporary
            if inside:
                _move_files(temporary, real)
            else:
                commit_folder(temporary, real, overwrite=overwrite, keep_others=keep_others)


def _can_be_replaced(folder: Path) -> bool:
    is_cwd = Path.cwd().is_relative_to(folder)
    return not (is_cwd or folder.is_mount()) and os.access(folder.parent, os.W_OK | os.X_OK)


def _move_files(source: Path, target: Path) -> None:
    """Move the files below `source` to the same names below `target`, each atomically."""
    fsync_tree(source)
    for path in sorted(source.rglob("*")):
        moved = target / path.relative_to(source)
        if path.is_dir() and not path.is_symlink():
            make_folder(moved)
        else:
            _give_default_mode(path)
            path.replace(moved)
    fsync_tree(target)


def commit_folder(temporary: Path, target: Path, *, overwrite: bool = True, keep_others: bool = False) -> None:
    """Flush the folder `temporary` to disk and give it the name `target`.

    Args:
        temporary: the complete new folder, in the same folder as `target`.
        target: its name; an existing folder is deleted afterwards.
        overwrite: replace an existing `target`.
        keep_others: first take over what an existing `target` has and `temporary` has not.

    Raises:
        FileExistsError: `target` exists and `overwrite` is False.
    """
    check_absent(target, overwrite=overwrite)
    for path in temporary.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _give_default_mode(path)
    if keep_others:
        _take_over(target, temporary)
    fsync_tree(temporary)
    if overwrite and os.path.lexists(target) and _exchange(temporary, target):
        fsync(target.parent)
        if keep_others:  # what other processes have written meanwhile
            _take_over(temporary, target)
        remove(temporary)
        return
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


def _exchange(first: Path, second: Path) -> bool:
    """Let two paths change places in one operation; False where that is not possible."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def _take_over(source: Path, target: Path) -> None:
    """Link what is below the folder `source` and not below `target` into `target`."""
    if not source.is_dir():
        return
    target.chmod(stat.S_IMODE(source.stat().st_mode))
    for path in sorted(source.rglob("*")):
        taken = target / path.relative_to(source)
        if os.path.lexists(taken) or not taken.parent.is_dir():
            continue
        if path.is_symlink():
            taken.symlink_to(os.readlink(path))
        elif path.is_dir():
            taken.mkdir()
        else:
            link_or_copy(path, taken)


def link_or_copy(source: Path, target: Path) -> None:
    """Link a file; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def check_absent(target: Path, *, overwrite: bool) -> None:
    """FileExistsError if `target` exists and `overwrite` is False."""
    if not overwrite and os.path.lexists(target):
        raise FileExistsError(f"{target} exists; choose another folder, or give --overwrite true")


def recover(parent: Path, *, exclusive: bool = True, name: str | None = None) -> None:
    """Clean up in the folder `parent` after killed writers.

    Temporary files and folders are deleted. An old target that was moved aside is renamed back, unless a new one
    exists. Only leftovers of writers that have ended are touched: a process of this host that runs no longer, or has
    begun after the last change of the leftover; a process of another host if the leftover is older than a week, or
    with `exclusive` is a folder.

    Args:
        parent: the folder of the targets; it may be missing.
        exclusive: whether no process of another host writes folders in `parent` at the moment. One of this host may: a
            run into a folder in the output of another run.
        name: only leftovers of the target of this name.
    """
    for path in parent.glob(".*"):
        match = _LEFTOVER.fullmatch(path.name)
        if match is None or path.name in _ours or name not in (None, match["target"]):
            continue
        with contextlib.suppress(FileNotFoundError):  # another process cleans up at the same time
            changed = path.lstat().st_ctime
            elsewhere = exclusive and match["host"] != _HOST and path.is_dir()
            if not (elsewhere or _has_ended(match["host"], int(match["pid"]), changed)):
                continue
            target = parent / match["target"]
            if match["suffix"] == _REPLACED and not os.path.lexists(target):
                path.rename(target)
            else:
                remove(path)


def _has_ended(host: str, pid: int, changed: float) -> bool:
    """Whether the writer of a leftover has ended; `changed` is the time of its last change."""
    if host != _HOST:
        return time.time() - changed > _LONGEST_WRITE
    if pid == os.getpid():  # an earlier process had this number
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # a process of another user
        pass
    return _started(pid) > changed + 2.0  # clocks tick in hundredths; file systems may keep whole seconds


def _started(pid: int) -> float:
    """When a running process began, in seconds since the epoch; 0 where the system does not say, infinity for a zombie.

    A container without an init process keeps zombies.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        status = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        if status[0] in "ZX":
            return float("inf")
        ticks = int(status[19])
        since_boot = float(Path("/proc/uptime").read_text(encoding="ascii").split()[0])
        return time.time() - since_boot + ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def remove(path: Path) -> None:
    """Delete a file or a folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
