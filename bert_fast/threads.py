"""The number of threads that torch computes with, and OpenMP threads in forked processes.

torch starts a thread for every core of the machine. In a container with a smaller CPU quota these threads spend most of
their time waiting for each other. Importing bert_fast does not change the number; the command line does, with
`use_threads`, and a server can.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_logger = logging.getLogger("bert_fast")
VARIABLE = "BERT_FAST_THREADS"
_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def sensible_threads() -> int:
    """BERT_FAST_THREADS if set, else the minimum of torch's number, the CPU affinity and the cgroup quotas.

    The quotas are those of the process's cgroup and all its ancestors, version 2 or 1, rounded up. torch's number is
    OMP_NUM_THREADS if set, else the number of cores.

    Raises:
        ValueError: BERT_FAST_THREADS is not a positive integer.
    """
    import torch

    requested = os.environ.get(VARIABLE)
    if requested is not None:
        if not requested.isascii() or not requested.isdigit() or int(requested) == 0:
            raise ValueError(f"{VARIABLE} is {requested!r}; expected the number of threads, 1 or more")
        return int(requested)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([torch.get_num_threads(), affinity, *_quotas()]))


@contextmanager
def use_threads(threads: int | None = None) -> Iterator[int]:
    """Context in which torch computes with `threads` threads; the previous number is restored afterwards.

    Args:
        threads: `sensible_threads()` if None.

    Yields:
        The number of threads.

    Raises:
        ValueError: `threads` is less than 1.
    """
    import torch

    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; expected 1 or more")
    previous, current = torch.get_num_threads(), sensible_threads() if threads is None else threads
    if current != previous:
        torch.set_num_threads(current)
    try:
        yield current
    finally:
        if torch.get_num_threads() != previous:
            torch.set_num_threads(previous)


def _quotas() -> list[int]:
    """The CPU quotas, in cores rounded up, of the cgroups of this process that have one."""
    quotas = []
    for line in _read(_PROC / "self" / "cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        group = root / path.lstrip("/")
        # Inside a container the path may be the host's, of which only the root exists.
        for folder in (group, *group.parents):
            if folder != root and root not in folder.parents:
                break
            if controllers:
                quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            else:
                quota, _, period = _read(folder / "cpu.max").partition(" ")
            if quota.strip().isdigit() and period.strip().isdigit():  # "max" and -1 are no quota
                quotas.append(-(-int(quota) // int(period)))
    return quotas


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


_native_threads = _forked_with_native_threads = False


def _before_fork() -> None:
    """Note whether this process has threads that are not Python's, such as OpenMP's."""
    global _native_threads
    try:
        _native_threads = len(os.listdir(_PROC / "self" / "task")) > threading.active_count()
    except OSError:
        _native_threads = True


def _after_fork_in_child() -> None:
    """One thread for torch and the kernels: OpenMP would wait forever for those that the child does not have."""
    global _forked_with_native_threads
    torch = sys.modules.get("torch")
    if _native_threads and torch is not None and torch.get_num_threads() > 1:
        torch.set_num_threads(1)
        _forked_with_native_threads = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_after_fork_in_child)


def settle_after_fork() -> None:
    """Warn once in a process that was forked from one with OpenMP threads; called by every forward."""
    global _forked_with_native_threads
    if _forked_with_native_threads:
        _forked_with_native_threads = False
        _logger.warning(
            "this process was forked from one with running OpenMP threads, with which torch would hang: torch now "
            "computes with 1 thread; for more, fork before the first forward, or start processes with spawn"
        )
