"""The progress bar of a run; without tqdm there is none, and everything else goes on."""

from __future__ import annotations

import sys
from typing import Any

_INTERVAL = (0.5, 30.0)  # seconds between two redraws: on a terminal, in a file


class Progress:
    """Steps done, time left, loss, learning rate and real tokens per second, on stderr.

    Args:
        total: steps of the run.
        done: steps done before.
        shown: False shows nothing.
    """

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            interval = _INTERVAL[0] if sys.stderr.isatty() else _INTERVAL[1]
            self._bar = tqdm(total=total, initial=done, unit="step", mininterval=interval, dynamic_ncols=True)

    def advance(self, step: int) -> None:
        """`step` steps are done."""
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def show(self, loss: float, lr: float, tokens_per_second: float) -> None:
        """The values beside the bar."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s", refresh=False)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
