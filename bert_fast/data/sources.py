"""The sources of text: files, folders, patterns, URLs and datasets, cut into parts that are processed independently.

The parts depend on the sources and on `part_bytes` only, so a corpus gives the same shards for any number of workers.
"""

from __future__ import annotations

import bz2
import contextlib
import fnmatch
import glob
import gzip
import importlib.metadata
import io
import logging
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from bert_fast.data.builtin import DEFAULT_PACKAGES
from bert_fast.data.prepare_config import PrepareConfig

FORMATS = (".txt", ".jsonl", ".csv", ".parquet")
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_MAX_RATIO = (
    250  # of decompressed to compressed bytes; text has 2 to 20, an archive made to exhaust a disk 1000 and more
)
_ALWAYS_ALLOWED = 2**28  # decompressed bytes, since a small file of one repeated line is harmless

_logger = logging.getLogger("bert_fast")


class DamagedFileError(ValueError):
    """A file can't be read to its end: its bytes are corrupt, or decompress to far more than text does."""


@dataclass(frozen=True)
class Piece:
    """A file, or a range of a file; one or more pieces form a part.

    Attributes:
        kind: `builtin`, `datasets`, or the suffix of the file without that of its compression.
        name: the path, the URL, or the name of the dataset.
        start, end: the range: bytes of .txt and .jsonl, row groups of .parquet, shards of a dataset; end is -1 if the
            piece is the entire file.
        state: changes with the source: size and modification time of a file, versions of packages.
    """

    kind: str
    name: str
    start: int = 0
    end: int = -1
    state: str = ""


def endings(name: str) -> tuple[str, str]:
    """The suffixes of format and compression of a file name, "" if absent: (".txt", ".gz") for "notes.txt.gz"."""
    path = Path(name.lower())
    if path.suffix in COMPRESSIONS:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ""


def is_known(name: str) -> bool:
    """Whether the format of a file of this name is supported."""
    form, compression = endings(name)
    return form in FORMATS and not (form == ".parquet" and compression)


def find_files(source: str) -> list[str]:
    """The files of `source`, sorted: a file, those below a folder with a supported format, or the matches of a pattern.

    Symbolic links are followed. A file that several paths lead to is read once, which is logged.

    Raises:
        ValueError: `source` doesn't exist, has no file with a supported format, or matches a file with another format.
    """
    known = f"{', '.join(FORMATS)}, or one of these and {', '.join(COMPRESSIONS)}"
    if "://" in source:
        names, is_folder = _find_remote(source)
    elif (path := Path(source)).is_dir():
        names, is_folder = _once(source, _walk(source)), True
    elif path.is_file():
        names, is_folder = [source], False
    elif glob.has_magic(source):
        names, is_folder = _once(source, _matches(source)), False
    else:
        raise ValueError(
            f"source {source!r} is no file or folder; expected a path, a pattern, a URL, 'builtin' or 'datasets:NAME'"
        )
    if not names:
        raise ValueError(f"the source {source} has no file")
    supported = sorted(name for name in names if is_known(name))
    if is_folder and not supported:
        raise ValueError(f"the folder {source} has no file that ends in {known}")
    if not is_folder and (others := sorted(set(names) - set(supported))):
        suffix = "".join(endings(others[0])) or "nothing"
        raise ValueError(f"{others[0]} ends in {suffix!r}; expected one of {known}")
    return supported


def _walk(folder: str, above: tuple[str, ...] = ()) -> Iterator[str]:
    """The files below a folder; a link to a folder that it is in is not followed, which is logged."""
    above = (*above, os.path.realpath(folder))
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            yield path
        elif os.path.isdir(path):
            if os.path.realpath(path) in above:
                _logger.warning("%s is a link to a folder that it is in; it is not followed", path)
            else:
                yield from _walk(path, above)


def _matches(pattern: str) -> Iterator[str]:
    """The files that match a pattern, in which `**` is any number of folders; hidden names match only explicitly."""
    parts = pattern.split("/")
    if "**" not in parts:
        return (name for name in glob.glob(pattern) if os.path.isfile(name))
    # glob.glob follows links without end.
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    base = "/".join(parts[:first]) or ("/" if pattern.startswith("/") else "")
    found = ((name, os.path.relpath(name, base or ".")) for name in _walk(base or "."))
    return (name if base else inner for name, inner in found if _fits(inner.split("/"), parts[first:]))


def _fits(names: list[str], parts: list[str]) -> bool:
    """Whether a path matches a pattern, both cut at the slashes."""
    if not parts or not names:
        return not names and parts in ([], ["**"])
    visible = not names[0].startswith(".") or parts[0].startswith(".")
    if parts[0] == "**":
        return _fits(names, parts[1:]) or (visible and _fits(names[1:], parts))
    return visible and fnmatch.fnmatchcase(names[0], parts[0]) and _fits(names[1:], parts[1:])


def _once(source: str, names: Iterable[str]) -> list[str]:
    """The first of the names of each file."""
    found: dict[str, str] = {}
    count = 0
    for name in sorted(names):
        found.setdefault(os.path.realpath(name), name)
        count += 1
    if count > len(found):
        _logger.warning("%s: %d paths lead to files that are read already (symbolic links)", source, count - len(found))
    return list(found.values())


def _find_remote(source: str) -> tuple[list[str], bool]:
    """The files at a URL, and whether it is a folder."""
    files, path = filesystem(source)
    if files.isdir(path):
        return [files.unstrip_protocol(name) for name in files.find(path)], True
    return [files.unstrip_protocol(name) for name in files.glob(path) if not files.isdir(name)], False


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path in it.

    Raises:
        ValueError: fsspec, or the package for this protocol, is not installed.
    """
    try:
        import fsspec

        files, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url} can't be opened: {error} (pip install 'bert_fast[data]', and s3fs, gcsfs, ...)"
        ) from error
    return files, path


@contextlib.contextmanager
def open_file(name: str) -> Iterator[Any]:
    """The bytes of a local file or a URL, decompressed according to its suffix.

    Raises:
        DamagedFileError: in the block, if the compressed bytes are corrupt, truncated, or decompress to more than
            `_MAX_RATIO` times their size; the message names the file.
        ValueError: in the block, if the file can't be read for another reason.
    """
    with contextlib.ExitStack() as stack:
        if "://" in name:
            files, path = filesystem(name)
            raw = stack.enter_context(files.open(path, "rb"))
            size = int(files.info(path)["size"])
        else:
            raw = stack.enter_context(open(name, "rb"))
            size = os.fstat(raw.fileno()).st_size
        compression = endings(name)[1]
        try:
            stream = stack.enter_context(_decompressed(raw, compression))
            yield _Bounded(stream, name, max(_MAX_RATIO * size, _ALWAYS_ALLOWED)) if compression else stream
        except DamagedFileError:
            raise
        except Exception as error:
            if not _is_damage(error) and not isinstance(error, OSError):
                raise
            kind = DamagedFileError if _is_damage(error) else ValueError
            raise kind(f"{name}: can't be read to its end ({error})") from error


def _is_damage(error: Exception) -> bool:
    """Whether an error of a decompressor comes from the bytes, not from the disk."""
    if isinstance(error, OSError):
        return error.errno is None or type(error).__module__.startswith("pyarrow")
    # pyarrow is imported for .zst alone.
    return isinstance(error, (EOFError, lzma.LZMAError, zlib.error)) or type(error).__module__.startswith("pyarrow")


class _Bounded:
    """A decompressed stream of bounded length."""

    def __init__(self, stream: IO[bytes], name: str, limit: int) -> None:
        self._stream, self._name, self._limit, self._position = stream, name, limit, 0

    def readline(self, size: int = -1) -> bytes:
        return self._counted(self._stream.readline(size))

    def read(self, size: int = -1) -> bytes:
        return self._counted(self._stream.read(size))

    def tell(self) -> int:
        return self._position

    def _counted(self, data: bytes) -> bytes:
        self._position += len(data)
        if self._position > self._limit:
            raise DamagedFileError(f"{self._name}: decompresses to more than {self._limit} bytes; expected text")
        return data


def _decompressed(raw: IO[bytes], compression: str) -> Any:
    if compression == ".gz":
        return gzip.open(raw)
    if compression == ".bz2":
        return bz2.open(raw)
    if compression == ".xz":
        return lzma.open(raw)
    if compression == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"), 2**16)
    return raw


def plan_parts(config: PrepareConfig) -> list[tuple[Piece, ...]]:
    """The parts of all sources, in order: small files are grouped, large ones cut if their format allows it.

    Raises:
        ValueError: a source doesn't exist, or its format is not supported.
    """
    parts: list[tuple[Piece, ...]] = []
    pending: list[Piece] = []
    size = 0

    def close() -> None:
        nonlocal pending, size
        if pending:
            parts.append(tuple(pending))
        pending, size = [], 0

    for source in config.sources:
        if source == "builtin" or source.startswith("datasets:"):
            close()
            parts += [(piece,) for piece in (_builtin(config) if source == "builtin" else _dataset(source))]
            continue
        for name in find_files(source):
            for piece, piece_bytes in _pieces(name, config):
                if size and size + piece_bytes > config.part_bytes:
                    close()
                pending.append(piece)
                size += piece_bytes
    close()
    return parts


def _builtin(config: PrepareConfig) -> list[Piece]:
    names = DEFAULT_PACKAGES if config.packages is None else config.packages
    return [Piece("builtin", "builtin", state=f"{versions(names)} {config.packages}")]


def versions(names: tuple[str, ...] | list[str]) -> dict[str, str]:
    """The versions of the packages that are installed."""
    installed = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def open_dataset(source: str) -> Any:
    """The train split of `datasets:NAME` or `datasets:NAME:CONFIGURATION`, streamed.

    Raises:
        ValueError: the package `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(f"source {source!r} needs the package datasets: pip install 'bert_fast[datasets]'") from error
    name, _, configuration = source.removeprefix("datasets:").partition(":")
    return datasets.load_dataset(name, configuration or None, split="train", streaming=True)


def _dataset(source: str) -> list[Piece]:
    count = open_dataset(source).num_shards
    return [Piece("datasets", source, shard, shard + 1, f"{count} shards") for shard in range(count)]


def _pieces(name: str, config: PrepareConfig) -> Iterator[tuple[Piece, int]]:
    """The pieces of one file, and their sizes in bytes."""
    form, compression = endings(name)
    if "://" in name:
        files, path = filesystem(name)
        info = files.info(path)
        size, state = int(info["size"]), str({key: info[key] for key in ("size", "ETag", "mtime") if key in info})
    else:
        stat = Path(name).stat()
        size, state = stat.st_size, f"{stat.st_size} bytes of {stat.st_mtime_ns}"
    if form == ".parquet":
        for start, end, group_bytes in _row_groups(name, config.part_bytes, size):
            yield Piece(form, name, start, end, state), group_bytes
        return
    indivisible = compression or form == ".csv" or (form == ".txt" and config.boundary == "file")
    step = size if indivisible else config.part_bytes
    if size <= step:
        yield Piece(form, name, state=state), size
        return
    for start in range(0, size, step):
        end = min(start + step, size)
        yield Piece(form, name, start, end, state), end - start


def _row_groups(name: str, part_bytes: int, file_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Ranges of row groups and their sizes; the entire file if it is damaged, so that reading it says so."""
    try:
        with open_parquet(name) as file:
            metadata = file.metadata
    except DamagedFileError:
        yield 0, -1, file_bytes
    else:
        start = size = 0
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= part_bytes or group == metadata.num_row_groups - 1:
                yield start, group + 1, size
                start, size = group + 1, 0


@contextlib.contextmanager
def open_parquet(name: str, read_dictionary: list[str] | None = None) -> Iterator[Any]:
    """The Parquet file of a path or URL.

    Args:
        name: the path or URL.
        read_dictionary: columns that are read as indices of their different values, if they hold strings.

    Raises:
        DamagedFileError: in the block, if it is not a Parquet file, or corrupt; the message names it.
        ValueError: in the block, if it can't be read for another reason.
    """
    import pyarrow
    import pyarrow.parquet

    with contextlib.ExitStack() as stack:
        try:
            if "://" in name:
                files, path = filesystem(name)
                source = stack.enter_context(files.open(path, "rb"))
            else:
                source = name
            yield stack.enter_context(
                pyarrow.parquet.ParquetFile(source, memory_map="://" not in name, read_dictionary=read_dictionary)
            )
        except (pyarrow.ArrowException, OSError) as error:
            from_disk = isinstance(error, OSError) and error.errno is not None
            kind = ValueError if from_disk else DamagedFileError
            raise kind(f"{name}: not a Parquet file that can be read ({error})") from error
