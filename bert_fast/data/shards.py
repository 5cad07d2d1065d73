"""Tokenised shards on disk: memory-mapped and verified against a manifest.

A prepared folder:

    manifest.json            schema version, counts, and size and SHA-256 of every other file
    vocab.txt  tokenizer.json  tokenizer_config.json
    train/00000.arrow ...    Arrow IPC files, one row per document:
    heldout/00000.arrow ...      tokens         list<int32>  token ids without special tokens; bit 30 is set in a
                                                             token that continues a word without being a `##`
                                                             piece (`prepare --words`)
                                 sentence_ends  list<int32>  the position after each sentence, increasing
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from bert_fast._io import check_fields, read_json, safe_name
from bert_fast.data.host_numpy import CONTINUES, Array

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SPLITS = ("train", "heldout")
TOKENIZER = ("vocab.txt", "tokenizer.json", "tokenizer_config.json")
_WRITTEN = re.compile(rf"(?:{'|'.join(SPLITS)})/\d{{5,9}}\.arrow|report\.json|{'|'.join(map(re.escape, TOKENIZER))}")
_COLUMNS = ("tokens", "sentence_ends")
_ROWS_PER_BATCH = 4096
_TOKENS_PER_BATCH = 2**22


def _schema() -> Any:
    import pyarrow as pa

    fields = [pa.field(name, pa.list_(pa.field("item", pa.int32(), False)), False) for name in _COLUMNS]
    return pa.schema(fields, metadata={"bert_fast.schema_version": str(SCHEMA_VERSION)})


class ShardWriter:
    """Writes documents to numbered shards in a folder; a context manager.

    Args:
        folder: the folder to create.
        shard_tokens: number of tokens after which a shard is complete.

    Attributes:
        documents, sentences, tokens: number of documents, sentences and tokens added.
    """

    def __init__(self, folder: Path, shard_tokens: int) -> None:
        self.folder = folder
        self.shard_tokens = shard_tokens
        self.documents = self.sentences = self.tokens = 0
        self._rows: tuple[list[Array], list[Array]] = ([], [])
        self._pending_tokens = self._written_tokens = self._shards = 0
        self._file: Any = None
        folder.mkdir(parents=True)

    def add(self, tokens: Array, sentence_ends: Array) -> None:
        """Add a document: its token ids, and the position after each of its sentences, which are not empty."""
        self._rows[0].append(tokens)
        self._rows[1].append(sentence_ends)
        self.documents += 1
        self.sentences += len(sentence_ends)
        self.tokens += len(tokens)
        self._pending_tokens += len(tokens)
        full = self._written_tokens + self._pending_tokens >= self.shard_tokens
        if full or self._pending_tokens >= _TOKENS_PER_BATCH or len(self._rows[0]) >= _ROWS_PER_BATCH:
            self._flush()
        if full:
            self._close()

    def counts(self) -> dict[str, int]:
        """The entry of a split in the manifest."""
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
        self._written_tokens += self._pending_tokens
        self._rows, self._pending_tokens = ([], []), 0

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


def check_free(folder: Path, overwrite: bool) -> None:
    """Raise ValueError unless `folder` is absent, empty, or a prepared folder that may be overwritten."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} exists and is not a prepared data folder; choose another output")
    if not overwrite:
        raise ValueError(f"{folder} is a prepared data folder already; use it, or pass overwrite=true to replace it")


def file_entry(path: Path) -> dict[str, Any]:
    """The entry of a file in the manifest: its size and SHA-256."""
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

    Args:
        folder: the folder.
        contents: further entries of the manifest.
        known: file entries that need not be computed, by name.
    """
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: known.get(name) or file_entry(folder / name) for name in names}
    manifest = {"schema_version": SCHEMA_VERSION, **contents, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        ValueError: there is no manifest, it is corrupt, its schema version is not supported, or it names a file that
            `prepare` doesn't write.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"{folder} is not a prepared data folder (no {MANIFEST}); make one with bert-fast prepare")
    try:
        manifest = read_json(path, {"schema_version": int})
        if (version := manifest["schema_version"]) != SCHEMA_VERSION:
            raise ValueError(f"{path} has schema version {version}; expected {SCHEMA_VERSION}")
        check_fields(manifest, {"files": dict, "splits": dict, "vocab_size": int}, str(path))
        for split, counts in manifest["splits"].items():
            check_fields(counts, dict.fromkeys(("documents", "sentences", "tokens"), int), f"{path}, {split}")
        for name, entry in manifest["files"].items():
            safe_name(path.parent, name, str(path))
            if not _WRITTEN.fullmatch(name):
                raise ValueError(f"{path} names the file {name!r}, which bert-fast prepare doesn't write")
            check_fields(entry, {"bytes": int, "sha256": str}, f"{path}, {name}")
        if missing := [name for name in TOKENIZER if name not in manifest["files"]]:
            raise ValueError(f"{path} has no {missing[0]!r}")
    except ValueError as error:
        raise ValueError(f"{error}: prepare the data again") from error
    return manifest


def verify_files(folder: str | Path, names: Sequence[str] | None = None, *, checksums: bool = False) -> None:
    """Check that the files of a prepared folder exist and have the sizes in its manifest.

    Args:
        folder: the prepared folder.
        names: file names as in the manifest; all if None.
        checksums: also read the files and compare their SHA-256.

    Raises:
        ValueError: a file is missing, truncated or corrupt; the message names it.
    """
    files = read_manifest(folder)["files"]
    for name in files if names is None else names:
        path, expected = Path(folder) / name, files[name]
        if not path.is_file():
            raise ValueError(f"{path} is missing; prepare the data again")
        if (size := path.stat().st_size) != expected["bytes"]:
            raise ValueError(
                f"{path} has {size} bytes; expected {expected['bytes']}, as in its manifest: prepare the data again"
            )
        if checksums and sha256(path) != expected["sha256"]:
            raise ValueError(f"{path} is corrupt (its SHA-256 differs from its manifest); prepare the data again")


class TokenStore:
    """The documents of one split, memory-mapped and addressed as one sequence of tokens.

    Args:
        folder: a prepared folder.
        split: `train` or `heldout`.
        checksums: verify the checksums of the shards in addition to their sizes.

    Attributes:
        sentence_ends: int64 (sentences,), the position after each sentence in the sequence.
        document_sentences: int64 (documents + 1,), the first sentence of each document, then the number of sentences.

    Raises:
        ValueError: the folder or the split doesn't exist, or a shard is missing, truncated or corrupt; the message
            names it.
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
        totals = {"documents": self.documents, "sentences": self.sentence_ends.size, "tokens": self.tokens}
        if totals != (expected := manifest["splits"][split]):
            raise ValueError(f"{folder}, {split} has {totals}; expected {expected}, as in its manifest")

    @property
    def parts(self) -> list[Array]:
        """The consecutive parts of the sequence, int32 each."""
        return self._parts

    @property
    def documents(self) -> int:
        return int(self.document_sentences.size - 1)

    @property
    def tokens(self) -> int:
        return int(self._starts[-1])

    def gather(self, starts: Array, lengths: Array) -> Array:
        """The concatenated token ranges [start, start + length), int32; each must lie in one document.

        Bit 30 (`CONTINUES`) marks a token that continues a word; the other bits are the id.
        """
        parts = np.searchsorted(self._starts, starts, side="right") - 1
        begins = starts - self._starts[parts]
        ends = begins + lengths
        ranges = zip(parts.tolist(), begins.tolist(), ends.tolist(), strict=True)
        return np.concatenate([np.empty(0, dtype=np.int32), *[self._parts[part][i:j] for part, i, j in ranges]])


def _read_shard(path: Path, vocab_size: int) -> Iterator[tuple[Array, Array, Array]]:
    """For each record batch: its tokens, the ends of its sentences, and the number of sentences of each document."""
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
            invalid = lowest if lowest < 0 else highest
            raise ValueError(f"{path} has token id {invalid}; expected 0 to {vocab_size - 1}: prepare the data again")
        last = np.cumsum(counts) - 1
        if (counts < 1).any() or (ends[last] != lengths).any():
            raise ValueError(f"{path}: the sentences do not end where the document ends; prepare the data again")
        document_ends = np.cumsum(lengths)
        positions = ends + np.repeat(document_ends - lengths, counts)
        if (np.diff(positions, prepend=0) < 1).any():
            raise ValueError(f"{path}: sentence_ends do not increase; prepare the data again")
        yield tokens, positions, counts
