"""Signals that end a run after its step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals(*, repeated: bool = False) -> Iterator[Callable[[], int | None]]:
    """Within the block the first SIGTERM or SIGINT only sets what the yielded function returns; a second acts as ever.

    So a step is never cut in half. Outside the main thread, where handlers can't be set, it always returns None.

    Args:
        repeated: a second one does nothing either: under torchrun the same signal comes from the sender to the whole
            process group and again from torchrun.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: object) -> None:
        received.append(number)
        if not repeated:
            signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
