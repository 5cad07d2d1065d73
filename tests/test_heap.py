"""Memory that a training command keeps: fewer page faults; settings of the environment are left alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bert_fast import _heap
from bert_fast.cli import main as cli

# A block of 64 MB is allocated, written and freed 10 times.
SCRIPT = """
import ctypes, resource, sys
from bert_fast._heap import keep_freed_memory

print(keep_freed_memory() if sys.argv[1] == "keep" else None)
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]

def use():
    block = library.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    library.free(block)

use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = (64 << 20) // os.sysconf("SC_PAGE_SIZE")


def faults(mode: str, **variables: str) -> tuple[str, int]:
    """What `keep_freed_memory` returned, and the page faults of the 10 blocks."""
    environment = {name: value for name, value in os.environ.items() if name not in _heap._SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode], env=environment | variables, capture_output=True, text=True, check=True
    )
    returned, count = done.stdout.split()
    return returned, int(count)


def test_freed_memory_is_used_again_without_page_faults() -> None:
    returned, kept = faults("keep")
    assert returned == "True"
    assert kept < PAGES / 100
    assert faults("default")[1] >= 10 * PAGES  # what the setting saves


def test_settings_of_the_environment_are_left_alone() -> None:
    returned, count = faults("keep", MALLOC_MMAP_THRESHOLD_="65536")
    assert returned == "False"
    assert count >= 10 * PAGES


@pytest.mark.parametrize(
    ("command", "ends", "expected"),
    [("pretrain", True, 1), ("finetune", True, 1), ("pretrain", False, 0), ("info", True, 0)],
)
def test_only_a_training_command_that_ends_the_process_keeps_memory(
    command: str, ends: bool, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[None] = []
    monkeypatch.setattr(_heap, "keep_freed_memory", lambda: calls.append(None))
    monkeypatch.setattr(cli, "_run", lambda *_: 0)
    assert cli._main([command], ends) == 0
    assert len(calls) == expected
