"""The lock of an output: at most one process writes a run folder, a result folder or a work folder at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Errors of file systems without flock.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)

_MAX_BYTES = 4096  # of a lock file

_held: set[str] = set()  # the lock files of this process


class OutputBusyError(ValueError):
    """Another process is writing the output; the message names its host, its process and since when."""


def lock_path(target: Path) -> Path:
    """The lock file of a file or folder `target`: hidden, beside it, so that it survives a replacement of `target`."""
    return target.with_name(f".{target.name}.lock")


@contextmanager
def exclusive(target: Path, *, what: str = "run", inside: bool = False) -> Iterator[None]:
    """Lock `target` for the block.

    The kernel releases the lock when the process ends, however it ends; a lock file that was left behind is taken over.
    On NFS the lock holds between hosts (Linux turns flock into a lock of the server). On a file system without flock
    the file itself is the lock: one of an ended process of this host is taken over, one of another host is refused.

    Args:
        target: the folder or file to be written, also by another name that links to it; missing folders are created.
        what: what is at work, for the message.
        inside: `target` is a folder that is not replaced as a whole, and the lock file is in it: its parent need not be
            writable.

    Raises:
        OutputBusyError: another process, or another thread of this one, holds the lock.
        OSError: the lock file can't be written, or is a link, a folder or another file.
    """
    real = Path(os.path.realpath(target))
    path = real / ".lock" if inside else lock_path(real)
    created = inside and not real.exists()
    if inside and os.path.lexists(real) and not real.is_dir():
        raise NotADirectoryError(f"{target} is a file; expected a folder, or a name that is free")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _acquire(path, target, what)
    _held.add(str(path))
    try:
        yield
    finally:
        _held.discard(str(path))
        path.unlink(missing_ok=True)  # before the release: whoever opened it meanwhile notices and opens the next one
        os.close(descriptor)
        if created:
            with contextlib.suppress(OSError):  # it has files
                real.rmdir()


def _acquire(path: Path, target: Path, what: str) -> int:
    while True:
        descriptor = _open(path)
        try:
            if _lock(descriptor, path) and _is_current(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(_this_process()).encode(), 0)
                return descriptor
            if _is_current(descriptor, path):
                raise OutputBusyError(
                    f"another {what} ({_holder(path)}) is at work in {target}; wait for it or stop it"
                )
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder has just deleted the file


def _open(path: Path) -> int:
    """Open or create a lock file, never what a link in a folder of others names: its content is replaced.

    Raises:
        OSError: `path` exists and is no lock file; the message names it.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        if not (path.is_symlink() or path.is_dir()):
            raise
        raise _no_lock(path) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size > _MAX_BYTES:
        os.close(descriptor)
        raise _no_lock(path)
    return descriptor


def _no_lock(path: Path) -> OSError:
    return FileExistsError(f"{path} is not a lock file that bert_fast wrote; delete it")


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return _is_stale(path)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise
        return False
    return True


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether `path` still names the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _is_stale(path: Path) -> bool:
    """Without flock: whether the file is new, or its process was one of this host and has ended."""
    holder = _read(path)
    if not holder:
        return True
    if holder.get("host") != os.uname().nodename:
        return False
    if holder.get("pid") == os.getpid():  # an earlier process had this number, as in a container
        return str(path) not in _held
    try:
        os.kill(int(str(holder.get("pid"))), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, ValueError):
        pass
    return False


def _this_process() -> dict[str, str | int]:
    since = time.strftime("%Y-%m-%d %H:%M:%S%z")
    return {"host": os.uname().nodename, "pid": os.getpid(), "since": since}


def _read(path: Path) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
    return {}


def _holder(path: Path) -> str:
    holder = _read(path)
    return ", ".join(f"{name} {holder.get(name, 'unknown')}" for name in ("host", "pid", "since"))
