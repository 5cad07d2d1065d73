"""Lines of text: the one reader of files and streams that hold UTF-8 lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

BOM = b"\xef\xbb\xbf"


def read_lines(
    source: str | Path | Iterable[bytes] | Iterable[str], name: str | None = None
) -> Iterator[tuple[int, str]]:
    r"""The lines of a UTF-8 text, numbered from 1, without line ends.

    A line ends at "\n" or "\r\n" and nowhere else: U+2028, U+2029, U+0085, a vertical tab, a form feed and a lone "\r"
    are characters of the line. A byte order mark at the beginning is dropped.

    Args:
        source: a file, decompressed if its name ends in .gz; or an open stream. Of a text stream with a `buffer`, such
            as `sys.stdin`, the bytes are read; the lines of one without are taken as they are.
        name: what the messages call a stream, such as "stdin"; the name of the stream or file if None.

    Raises:
        OSError: the file can't be opened.
        ValueError: the text is not UTF-8, or the file is not valid gzip; the message has the name and the line.
    """
    with ExitStack() as stack:
        if isinstance(source, (str, Path)):
            path = Path(source)
            name = str(path) if name is None else name
            source = stack.enter_context(path.open("rb"))
            if path.suffix.lower() == ".gz":
                source = stack.enter_context(gzip.open(source))
        name = str(getattr(source, "name", "stream")) if name is None else name
        try:
            for number, line in enumerate(getattr(source, "buffer", source), start=1):
                yield number, decode_line(line, f"{name}, line {number}", first=number == 1)
        except (gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise ValueError(f"{name}: not a valid gzip file ({error})") from error


def split_lines(text: str) -> list[str]:
    r"""The lines of `text`, which end at "\n" or "\r\n" alone, without line ends."""
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def decode_line(line: bytes | str, where: str, *, first: bool = False) -> str:
    """`line` as text, without its line end and, if it is the `first`, without a byte order mark.

    Raises:
        ValueError: it is not UTF-8; the message begins with `where`.
    """
    if isinstance(line, str):
        return line.removesuffix("\n").removesuffix("\r").removeprefix("\ufeff" if first else "")
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    try:
        return (line.removeprefix(BOM) if first else line).decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
