"""Freed memory that stays with a training process, so that the next step need not fault it in again."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for later allocations instead of returning it to the system.

    glibc maps an allocation above 32 MB, and often smaller ones, as pages of its own and returns them when it is freed.
    A training step allocates the same sizes as the one before; every page of them is then a page fault and a page to
    fill with zeros. This holds for the whole process and can't be undone, so only programs that end after training call
    it. The peak memory stays about the same, but nothing is returned before the process ends.

    Returns:
        Whether it was set; not where the environment sets glibc's malloc already, or the C library isn't glibc.
    """
    if any(name in os.environ for name in _SETTINGS):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  other libraries have a mallopt with other options
        mallopt = library.mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
