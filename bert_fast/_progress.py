"""The progress bar of every command: tqdm on stderr, if it is installed."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from bert_fast._terminal import bar_stream, messages_above, printable

_SECONDS_TERMINAL, _SECONDS_FILE = 0.5, 30.0  # between two redraws


class ProgressBar(AbstractContextManager["ProgressBar"]):
    """A bar on stderr. Does nothing if `shown` is False or tqdm is not installed.

    Args:
        total: number of units; None if it is not known.
        shown: whether to show it.
        unit: what is counted, as tqdm prints it.
        description: printed before the bar.
        done: units done before it starts.
        required: raise if tqdm is not installed.

    Raises:
        ImportError: `shown` and `required` are True and tqdm is not installed.
    """

    def __init__(
        self, total: int | None, *, shown: bool, unit: str, description: str = "", done: int = 0, required: bool = False
    ) -> None:
        self._bar: Any = None
        self._messages = ExitStack()
        if not shown:
            return
        try:
            from tqdm import tqdm
        except ImportError as error:
            if required:
                raise ImportError("the progress bar needs tqdm, which is not installed: pip install tqdm") from error
            return
        self._stream = bar_stream()
        interval = _SECONDS_TERMINAL if sys.stderr.isatty() else _SECONDS_FILE
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=description or None,
            unit=unit,
            mininterval=interval,
            dynamic_ncols=True,
            file=self._stream,
        )
        self._messages.enter_context(messages_above(self.write))

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1) -> None:
        """Advance by `count` units."""
        if self._bar is not None:
            self._bar.update(count)

    def update_to(self, done: int) -> None:
        """Advance to `done` units in total."""
        if self._bar is not None:
            self._bar.update(done - self._bar.n)

    def show_training(self, loss: float, lr: float, tokens_per_second: float) -> None:
        """Show the values of a training run after the bar, from the next redraw on."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.2e}, {tokens_per_second:,.0f} tokens/s", refresh=False)

    def write(self, text: str) -> None:
        """Print a line above the bar; nothing if there is no bar."""
        if self._bar is not None:
            self._bar.write(printable(text), file=self._stream)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        self._messages.close()
        if self._bar is not None:
            self._bar.close()
