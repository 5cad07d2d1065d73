"""A profiler trace of a few training steps, on the host and on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bert_fast import _io

_SKIPPED_STEPS = 10  # caches, allocators and clocks settle first


class Tracer:
    """Profiles `steps` steps after the first ten and writes them to `path` in Chrome's trace format.

    Args:
        path: the trace file; an existing one is replaced.
        steps: number of steps; 0 disables the tracer.
        device: profiled in addition to the host.
    """

    def __init__(self, path: Path, steps: int, device: torch.device) -> None:
        self._profile: Any = None
        self._remaining = _SKIPPED_STEPS + steps if steps else 0
        if steps:
            from torch.profiler import ProfilerActivity, profile, schedule

            def export(trace: Any) -> None:
                with _io.atomic_file(path) as temporary:
                    trace.export_chrome_trace(str(temporary))

            on_device = [ProfilerActivity.CUDA] if device.type == "cuda" else []
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *on_device],
                schedule=schedule(wait=_SKIPPED_STEPS - 1, warmup=1, active=steps, repeat=1),
                on_trace_ready=export,
            )
            self._profile.start()

    def step(self) -> None:
        """Mark the end of a step."""
        if self._remaining:
            self._profile.step()
            self._remaining -= 1
            if not self._remaining:
                self._profile.stop()
