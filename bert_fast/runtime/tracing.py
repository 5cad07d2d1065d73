"""A trace of a few steps: what runs when, on the host and on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

_BEFORE = 10  # steps that are not like the others: caches, allocators, clocks


class Tracer:
    """Records `steps` steps, after the first ten, into `path`, in Chrome's format.

    Args:
        path: the file; an old one is replaced.
        steps: how many; 0 for none, and then nothing is done.
        device: what else is recorded beside the host.
    """

    def __init__(self, path: Path, steps: int, device: torch.device) -> None:
        self._profile: Any = None
        self._left = _BEFORE + steps if steps else 0
        if steps:
            from torch.profiler import ProfilerActivity, profile, schedule

            on_device = [ProfilerActivity.CUDA] if device.type == "cuda" else []
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *on_device],
                schedule=schedule(wait=_BEFORE - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=lambda found: _export(found, path),
            )
            self._profile.start()

    def step(self) -> None:
        """A step is done."""
        if self._left:
            self._profile.step()
            self._left -= 1
            if not self._left:
                self._profile.stop()


def _export(found: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    found.export_chrome_trace(str(temporary))
    temporary.replace(path)
