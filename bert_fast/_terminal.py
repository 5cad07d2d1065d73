"""Text on a terminal: what files and people supply is shown without the characters that would control it.

A label, a path or a text may hold escape sequences (ESC, CSI, OSC), a carriage return or bidirectional overrides, which
would recolour, overwrite or reorder what the terminal shows, or write to its clipboard. The command line replaces
sys.stdout and sys.stderr by streams that write such characters as escapes (`\\u001b`); the data that a command writes
to a pipe or a file stays as it is.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# C0 controls without tab and newline, DEL, C1 controls, direction marks and overrides, line separators, surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, *, lines: bool = True) -> str:
    """`text` with control characters as escapes (`\\u001b`, as in JSON); tab and, with `lines`, newline are kept."""
    text = _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


# What writes a line above the progress bar that is shown, of the newest last.
_above_bar: list[Callable[[str], None]] = []


class SafeStream:
    """A text stream that writes `printable` text to another one; messages appear above a progress bar.

    Args:
        raw: the other stream.
        is_message: whether it is for messages, which are lost without an error if they can't be written: nobody reads
            them any more, or the disk of the log is full.
        escape: False writes text as it is.
    """

    def __init__(self, raw: TextIO, *, is_message: bool, escape: bool = True) -> None:
        self.raw, self.is_message, self.escape = raw, is_message, escape
        self._started = ""  # a line without its end, while there is a progress bar

    def write(self, text: str) -> int:
        """Write `text`; returns its number of characters."""
        shown = printable(text) if self.escape else text
        if self.is_message and self.escape:
            shown, self._started = self._started + shown, ""
            if _above_bar:
                *lines, self._started = shown.split("\n")
                for line in lines:
                    _above_bar[-1](line)
                return len(text)
        self._guarded(self.raw.write, shown)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the other stream."""
        self._guarded(self.raw.flush)

    def _guarded(self, call: Any, *arguments: str) -> None:
        try:
            try:
                call(*arguments)
            except UnicodeEncodeError as error:  # the locale's encoding lacks a character
                call(*(text.encode(error.encoding, "backslashreplace").decode(error.encoding) for text in arguments))
        except BrokenPipeError:
            if not self.is_message:
                raise
            discard(self.raw)
        except OSError as error:
            if not self.is_message:
                raise OSError(error.errno, f"stdout can't be written: {error.strerror}") from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


def bar_stream() -> SafeStream:
    """sys.stderr for a progress bar, whose control characters are written."""
    stream = sys.stderr
    return SafeStream(stream.raw if isinstance(stream, SafeStream) else stream, is_message=True, escape=False)


@contextmanager
def messages_above(write: Callable[[str], None]) -> Iterator[None]:
    """In the block, `write` gets each line of the messages: it shows them above a progress bar."""
    _above_bar.append(write)
    try:
        yield
    finally:
        _above_bar.remove(write)


def data_stream() -> SafeStream:
    """sys.stdout for data: unchanged characters, unless it is a terminal."""
    stream = sys.stdout
    raw = stream.raw if isinstance(stream, SafeStream) else stream
    return SafeStream(raw, is_message=False, escape=raw.isatty())


@contextmanager
def safe_streams() -> Iterator[None]:
    """Replace sys.stdout and sys.stderr for the block."""
    before = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # for a stream that was closed before Python started
        sys.stdout, sys.stderr = (
            SafeStream(nowhere if stream is None else stream, is_message=number == 1)
            for number, stream in enumerate(before)
        )
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def discard(stream: TextIO) -> None:
    """Send what is left in the buffer of a broken stream nowhere: Python flushes it at its end, or exits with 120."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return  # not a file, in a test
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
