"""Text on a terminal: what files and people supply is shown without the characters that would control it.

A label, a path or a text may hold escape sequences (ESC, CSI, OSC), a carriage return or bidirectional overrides, which
would recolour, overwrite or reorder what the terminal shows, or write to its clipboard. The command line replaces
sys.stdout and sys.stderr by streams that write such characters as `\\uXXXX`; the data that a command writes to a pipe
or a file stays as it is.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

# C0 controls without tab and newline, DEL, C1 controls, direction marks and overrides, line separators, surrogates.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


def printable(text: str, *, lines: bool = True) -> str:
    """`text` with control characters as `\\uXXXX`, which JSON reads back; tab and, with `lines`, newline are kept."""
    text = _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
    return text if lines else text.replace("\n", "\\n").replace("\t", "\\t")


class SafeStream:
    """A text stream that writes `printable` text to another one.

    Args:
        raw: the other stream.
        is_message: whether it is for messages: they are lost, without an error, once nobody reads them.
    """

    def __init__(self, raw: TextIO, *, is_message: bool) -> None:
        self.raw, self.is_message = raw, is_message

    def write(self, text: str) -> int:
        """Write `printable(text)`; returns the number of characters of `text`."""
        self._guarded(self.raw.write, printable(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
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

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


class _Messages(SafeStream):
    """The stream of messages that a progress bar writes its control characters to."""

    def write(self, text: str) -> int:
        self._guarded(self.raw.write, text)
        return len(text)


def bar_stream() -> Any:
    """sys.stderr for a progress bar: control characters are written, and nobody has to read them."""
    stream = sys.stderr
    return _Messages(stream.raw if isinstance(stream, SafeStream) else stream, is_message=True)


def data_stream() -> Any:
    """sys.stdout for data: unchanged characters, unless it is a terminal."""
    stream = sys.stdout
    return stream.raw if isinstance(stream, SafeStream) and not stream.raw.isatty() else stream


@contextmanager
def safe_streams() -> Iterator[None]:
    """Replace sys.stdout and sys.stderr for the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (  # type: ignore[assignment]
        SafeStream(stream, is_message=number == 1) for number, stream in enumerate(before)
    )
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def discard_stdout() -> None:
    """Send what is left in the buffer of the broken stdout nowhere: Python flushes it when it ends."""
    try:
        descriptor = sys.stdout.fileno()
    except (OSError, ValueError):
        return  # not a file, in a test
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)
