"""How many threads a process should compute with, and the threads of a forked one.

torch takes every core that the operating system shows. In a container whose quota is smaller, its threads then wait
for each other most of the time. Importing bert_fast changes nothing of that: the command line does, by `use_threads`,
and a server may.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_logger = logging.getLogger("bert_fast")
VARIABLE = "BERT_FAST_THREADS"
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def sensible_threads() -> int:
    """BERT_FAST_THREADS where it is set; else torch's number, but no more than the affinity and the quotas allow.

    The quotas are those of the process's control group and of every group around it, version 2 or 1, rounded up.
    torch's own number is OMP_NUM_THREADS where that is set, else the number of cores.

    Raises:
        ValueError: BERT_FAST_THREADS is no positive integer.
    """
    import torch

    asked = os.environ.get(VARIABLE)
    if asked is not None:
        if not asked.isascii() or not asked.isdigit() or int(asked) == 0:
            raise ValueError(f"{VARIABLE} is {asked!r}; expected the number of threads, 1 or more")
        return int(asked)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([torch.get_num_threads(), affinity, *_quotas()]))


@contextmanager
def use_threads(threads: int | None = None) -> Iterator[int]:
    """Let torch compute with so many threads inside the `with`, and with as many as before behind it.

    Args:
        threads: `sensible_threads()` if None.

    Raises:
        ValueError: `threads` is less than 1.
    """
    import torch

    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; expected 1 or more")
    before, now = torch.get_num_threads(), sensible_threads() if threads is None else threads
    if now != before:
        torch.set_num_threads(now)
    try:
        yield now
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


def _quotas() -> list[int]:
    """Cores that the control groups of this process may use, of those that say."""
    found = []
    for line in _read(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        group = root / path.lstrip("/")
        # Inside a container the path may be the host's, and only the root is there.
        for folder in (group, *group.parents):
            if folder != root and root not in folder.parents:
                break
            if controllers:
                quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            else:
                quota, _, period = _read(folder / "cpu.max").partition(" ")
            if quota.strip().isdigit() and period.strip().isdigit():  # "max" and -1 are no quota
                found.append(-(-int(quota) // int(period)))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


_beside = _forked_beside_threads = False


def _remember_threads() -> None:
    """Before a fork: whether this process has threads that are none of Python's, such as those of OpenMP."""
    global _beside
    try:
        _beside = len(os.listdir(_PROC / "self" / "task")) > threading.active_count()
    except OSError:
        _beside = True


def _in_child() -> None:
    global _forked_beside_threads
    _forked_beside_threads = _beside


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_remember_threads, after_in_child=_in_child)


def settle_after_fork() -> None:
    """What every forward begins with: one thread where this process was forked from one with OpenMP threads.

    Those are not there in the child, and OpenMP would wait for them for ever.
    """
    global _forked_beside_threads
    if _forked_beside_threads:
        import torch

        _forked_beside_threads = False
        if torch.get_num_threads() > 1:
            _logger.warning(
                "this process was forked from one whose OpenMP threads had started, which would hang here: torch "
                "computes with 1 thread now; for more, fork before the first forward, or start processes by spawn"
            )
            torch.set_num_threads(1)
