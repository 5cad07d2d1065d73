"""Tokenised shards on disk: written all or not at all, read through memory maps, checked against a manifest.

A prepared folder:

    manifest.json            schema version, counts, and size and sha256 of every other file
    vocab.txt  tokenizer.json  tokenizer_config.json
    train/00000.arrow ...    Arrow IPC files, one row a document:
    heldout/00000.arrow ...      tokens         list<int32>  the token ids, no special tokens added; bit 30
                                              is set where a token continues a word that
                                              the pieces don't show (`prepare --words`)
                                 sentence_ends  list<int32>  the position after each sentence; rising
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bert_fast.data.host_numpy import CONTINUES, Array

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
_ROWS_PER_BATCH = 4096
_TOKENS_PER_BATCH = 2**22


def _schema() -> Any:
    import pyarrow as pa

    fields = [pa.field(name, pa.list_(pa.field("item", pa.int32(), False)), False) for name in _COLUMNS]
    return pa.schema(fields, metadata={"bert_fast.schema_version": str(SCHEMA_VERSION)})


_COLUMNS = ("tokens", "sentence_ends")


class ShardWriter:
    """Writes documents into numbered shards of a folder; a context manager.

    Args:
        folder: where; it is made.
        shard_tokens: a shard is closed when it has at least so many tokens.

    Attributes:
        documents, sentences, tokens: counts of what was added.
    """

    def __init__(self, folder: Path, shard_tokens: int) -> None:
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.documents = self.sentences = self.tokens = 0
        self._rows: tuple[list[Array], list[Array]] = ([], [])
        self._waiting_tokens = self._written_tokens = self._shards = 0
        self._file: Any = None
        folder.mkdir(parents=True)

    def add(self, tokens: Array, sentence_ends: Array) -> None:
        """Add a document: its token ids and the position after each of its sentences, none of which is empty."""
        self._rows[0].append(tokens)
        self._rows[1].append(sentence_ends)
        self.documents += 1
        self.sentences += len(sentence_ends)
        self.tokens += len(tokens)
        self._waiting_tokens += len(tokens)
        full = self._written_tokens + self._waiting_tokens >= self.shard_tokens
        if full or self._waiting_tokens >= _TOKENS_PER_BATCH or len(self._rows[0]) >= _ROWS_PER_BATCH:
            self._flush()
        if full:
            self._close()

    def counts(self) -> dict[str, int]:
        """What the manifest says of a split."""
        return {"documents": self.documents, "sentences": self.sentences, "tokens": self.tokens}

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._rows[0]:
            return
        if self._file is None:
            self._file = pa.ipc.new_file(self.folder / f"{self._shards:05d}.arrow", _schema())
        columns = []
        for rows, field in zip(self._rows, _schema(), strict=True):
            offsets = np.zeros(len(rows) + 1, dtype=np.int32)
            np.cumsum([len(row) for row in rows], out=offsets[1:])
            values = np.concatenate(rows).astype(np.int32, copy=False)
            columns.append(pa.ListArray.from_arrays(pa.array(offsets), pa.array(values), type=field.type))
        self._file.write_batch(pa.record_batch(columns, schema=_schema()))
        self._written_tokens += self._waiting_tokens
        self._rows, self._waiting_tokens = ([], []), 0

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
            self._shards += 1
            self._written_tokens = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._close()


@contextmanager
def atomic_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder` that becomes `folder` when the block ends well, and disappears when it fails.

    Raises:
        ValueError: `folder` is there and holds something, and `overwrite` is false; or it is no prepared folder.
    """
    check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            fsync(path)
        if folder.exists():
            replaced = temporary.with_suffix(".old")
            folder.rename(replaced)
            temporary.rename(folder)
            shutil.rmtree(replaced)
        else:
            temporary.rename(folder)
        fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise ValueError unless `folder` may be written: absent, empty, or a prepared one that may be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} exists and is not a prepared data folder; choose another output")
    if not overwrite:
        raise ValueError(f"{folder} is a prepared data folder already; use it, or pass overwrite=true to replace it")


def fsync(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a file: its size and its SHA-256."""
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def sha256(path: Path) -> str:
    """The SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, contents: dict[str, Any], known: dict[str, Any]) -> None:
    """Write `manifest.json`: `contents`, the schema version, and size and checksum of every file in the folder.

    `known` has the sizes and checksums of some files already, by their names in the folder.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: known.get(name) or file_entry(folder / name) for name in names}
    manifest = {"schema_version": SCHEMA_VERSION, **contents, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ValueError: there is none, it is not JSON, or it has another schema version.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a prepared data folder (no {MANIFEST}); make one with bert-fast prepare")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version, *_ = (manifest[name] for name in ("schema_version", "files", "splits", "vocab_size"))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt ({error}); prepare the data again") from error
    if version != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema version {version}; expected {SCHEMA_VERSION}: prepare the data again")
    return dict(manifest)


def verify_files(folder: str | Path, names: list[str] | None = None, *, checksums: bool = False) -> None:
    """Check files of a prepared folder against its manifest: that they exist, their sizes, and their checksums.

    Args:
        folder: the prepared folder.
        names: file names as in the manifest; all if None.
        checksums: also read the files and compare their SHA-256.

    Raises:
        ValueError: a file is missing, truncated or corrupt; it is named.
    """
    files = read_manifest(folder)["files"]
    for name in files if names is None else names:
        path, expected = Path(folder) / name, files[name]
        if not path.is_file():
            raise ValueError(f"{path} is missing; prepare the data again")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise ValueError(f"{path} has {size} bytes; its manifest says {expected['bytes']}: prepare the data again")
        if checksums and sha256(path) != expected["sha256"]:
            raise ValueError(f"{path} is corrupt (its SHA-256 is not the manifest's); prepare the data again")


class TokenStore:
    """The documents of one split, memory-mapped, addressed as one sequence of tokens.

    Args:
        folder: a prepared folder.
        split: `train` or `heldout`.
        checksums: verify the shards' checksums, not only their sizes.

    Attributes:
        sentence_ends: int64 (sentences,), the position after each sentence among all tokens of the split.
        document_sentences: int64 (documents + 1,), the first sentence of each document, and their number.

    Raises:
        ValueError: the folder or the split doesn't exist, or a shard is missing, truncated or corrupt; it is named.
    """

    def __init__(self, folder: str | Path, split: str, *, checksums: bool = True) -> None:
        manifest = read_manifest(folder)
        if split not in manifest["splits"]:
            raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(manifest['splits'])}")
        names = sorted(name for name in manifest["files"] if name.startswith(f"{split}/"))
        verify_files(folder, names, checksums=checksums)
        self._parts: list[Array] = []
        starts = [0]
        ends, counts = [np.empty(0, dtype=np.int64)], [np.zeros(1, dtype=np.int64)]
        for name in names:
            for tokens, sentence_ends, sentence_counts in _read_shard(Path(folder) / name, manifest["vocab_size"]):
                self._parts.append(tokens)
                ends.append(sentence_ends + starts[-1])
                counts.append(sentence_counts)
                starts.append(starts[-1] + tokens.size)
        self._starts = np.array(starts, dtype=np.int64)
        self.sentence_ends = np.concatenate(ends)
        self.document_sentences = np.cumsum(np.concatenate(counts))
        found = {"documents": self.documents, "sentences": self.sentence_ends.size, "tokens": self.tokens}
        if found != manifest["splits"][split]:
            raise ValueError(f"{folder}, {split}: found {found}, its manifest says {manifest['splits'][split]}")

    @property
    def documents(self) -> int:
        return int(self.document_sentences.size - 1)

    @property
    def tokens(self) -> int:
        return int(self._starts[-1])

    def gather(self, starts: Array, lengths: Array) -> Array:
        """The token ranges [start, start + length) one after the other, int32; each must lie in one document.

        Bit 30 (`CONTINUES`) of a token marks a word's continuation; the id is the rest.
        """
        parts = np.searchsorted(self._starts, starts, side="right") - 1
        begins = starts - self._starts[parts]
        ends = begins + lengths
        ranges = zip(parts.tolist(), begins.tolist(), ends.tolist(), strict=True)
        return np.concatenate([np.empty(0, dtype=np.int32), *[self._parts[part][i:j] for part, i, j in ranges]])


def _read_shard(path: Path, vocab_size: int) -> Iterator[tuple[Array, Array, Array]]:
    """For each record batch: its tokens, the ends of its sentences among them, the number of sentences a document."""
    import pyarrow as pa

    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        if reader.schema.remove_metadata() != _schema().remove_metadata():
            raise ValueError(f"{path} has columns {reader.schema}; expected {_schema()}")
        batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        for batch in batches:
            batch.validate(full=True)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} is corrupt ({error}); prepare the data again") from error
    for batch in batches:
        tokens, ends = (column.flatten().to_numpy(zero_copy_only=True) for column in batch.columns)
        lengths, counts = (column.value_lengths().to_numpy().astype(np.int64) for column in batch.columns)
        lowest, highest = (int(tokens.min()), int((tokens & ~CONTINUES).max())) if tokens.size else (0, 0)
        if lowest < 0 or highest >= vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise ValueError(f"{path} has token id {wrong}; expected 0 to {vocab_size - 1}: prepare the data again")
        last = np.cumsum(counts) - 1
        if (counts < 1).any() or (ends[last] != lengths).any():
            raise ValueError(f"{path}: the sentences do not end where the document ends; prepare the data again")
        document_ends = np.cumsum(lengths)
        positions = ends + np.repeat(document_ends - lengths, counts)
        if (np.diff(positions, prepend=0) < 1).any():
            raise ValueError(f"{path}: sentence_ends do not rise; prepare the data again")
        yield tokens, positions, counts
