"""The two jobs of `bert-fast prepare`, each on one part: text to cleaned documents, documents to shards.

A job writes one folder atomically, named by the hash of everything it depends on. So an interrupted preparation resumes
with the finished folders, and a changed source or setting never reuses an old one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bert_fast import _io
from bert_fast._terminal import printable
from bert_fast.data.cleaning import REASONS, UNREADABLE, Document, clean, digest, splitter
from bert_fast.data.files import read_piece
from bert_fast.data.host_numpy import Array
from bert_fast.data.prepare_config import PrepareConfig
from bert_fast.data.shards import SPLITS, ShardWriter, file_entry, sha256
from bert_fast.data.sources import Piece, versions
from bert_fast.data.tokens import Encoder

_LAYOUT = 1  # version of the folders of finished parts
_COUNTS = "counts.json"
_CHARACTERS_PER_BATCH = 2**20


def job_key(*parts: Any) -> str:
    """The hash of `parts`, JSON values, in the name of the folder of a job that depends on them."""
    text = json.dumps([_LAYOUT, *parts], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` on success, unless an identical job has finished it meanwhile."""
    temporary = _io.temporary_path(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        with contextlib.suppress(FileExistsError):
            _io.commit_folder(temporary, folder, overwrite=False)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_counts(folder: Path) -> dict[str, Any]:
    """The counts of a finished job."""
    return _io.read_json(folder / _COUNTS, {"dropped": dict})


def _write_counts(folder: Path, counts: dict[str, Any]) -> None:
    (folder / _COUNTS).write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class CleanJob:
    """Clean the pieces of a part into `folder`: text.arrow, digests.npy (one uint64 per document), counts.json."""

    pieces: tuple[Piece, ...]
    config: PrepareConfig
    work: str

    @property
    def folder(self) -> Path:
        names = ("text_column", "boundary", "sentences", "language", "min_characters", "errors", "max_documents")
        settings = {name: getattr(self.config, name) for name in names}
        pieces = [asdict(piece) for piece in self.pieces]
        return Path(self.work) / f"clean-{job_key(pieces, settings, versions(['bert_fast', 'sentencex']))}"

    def __call__(self) -> None:
        if self.folder.is_dir():
            return
        counts: dict[str, Any] = {"read": 0, "dropped": {}, "first_dropped": {}, "characters": 0, "sentences": 0}
        digests: list[int] = []
        with finished_folder(self.folder) as folder:
            with TextWriter(folder / "text.arrow") as writer:
                for document in self._documents(counts):
                    digests.append(digest(document))
                    writer.add(document)
                    counts["characters"] += sum(map(len, document))
                    counts["sentences"] += len(document)
                    if len(digests) == self.config.max_documents:
                        break
            np.save(folder / "digests.npy", np.array(digests, dtype=np.uint64))
            _write_counts(folder, counts)

    def _documents(self, counts: dict[str, Any]) -> Iterator[Document]:
        dropped: Counter[str] = Counter()
        for piece in self.pieces:
            mode = self.config.sentences
            if mode == "auto":
                mode = "lines" if piece.kind == ".txt" and self.config.boundary == "blank_line" else "split"
            split = splitter(mode, self.config.language)
            for raw in read_piece(piece, self.config):
                counts["read"] += 1
                document, raw = clean(raw, split, self.config.min_characters)
                if document:
                    yield document
                    continue
                if self.config.errors == "raise" and raw.problem in UNREADABLE:
                    detail = printable(f"{raw.where}: {raw.detail}", lines=False)
                    raise ValueError(f"{detail}; errors='drop' drops such documents")
                dropped[raw.problem] += 1
                counts["first_dropped"].setdefault(raw.problem, printable(f"{raw.where}: {raw.detail}", lines=False))
                counts["dropped"] = {name: dropped[name] for name in REASONS if name in dropped}


class TextWriter:
    """Writes documents to a compressed Arrow file of one column; a context manager."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._schema = pa.schema([("sentences", pa.list_(pa.string()))])
        options = pa.ipc.IpcWriteOptions(compression=pa.Codec("zstd", compression_level=1), use_threads=False)
        self._file = pa.ipc.new_stream(path, self._schema, options=options)
        self._pending: list[Document] = []
        self._characters = 0

    def add(self, document: Document) -> None:
        self._pending.append(document)
        self._characters += sum(map(len, document))
        if self._characters >= _CHARACTERS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._pending:
            self._file.write_batch(pa.record_batch([self._pending], schema=self._schema))
        self._pending, self._characters = [], 0

    def __enter__(self) -> TextWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        self._file.close()


def read_text(folder: Path, keep: Array) -> Iterator[list[tuple[int, Document]]]:
    """The documents of a finished `CleanJob` selected by `keep`, bool (documents,), with their numbers, in batches."""
    import pyarrow as pa

    number = 0
    with pa.ipc.open_stream(pa.OSFile(str(folder / "text.arrow"))) as reader:
        for batch in reader:
            rows = range(number, number + batch.num_rows)
            number += batch.num_rows
            if selected := [row for row in rows if keep[row]]:
                documents = batch.column(0).take([row - rows[0] for row in selected]).to_pylist()
                yield list(zip(selected, documents, strict=True))


@dataclass(frozen=True)
class EncodeJob:
    """Tokenise the documents of a finished `CleanJob` into the shards of a part in `folder`.

    Attributes:
        source: the folder of the `CleanJob`.
        keep: the documents to tokenise, `numpy.packbits` of bool (documents,).
        documents: number of documents of the source.
        threshold: documents with a digest of at most this are held out; -1 for none.
        tokenizer: path of the tokenizer.json.
        words: as in `PrepareConfig`.
        shard_tokens: as in `PrepareConfig`.
    """

    source: Path
    keep: bytes
    documents: int
    threshold: int
    tokenizer: Path
    words: str
    shard_tokens: int

    @property
    def folder(self) -> Path:
        settings = [self.source.name, self.keep.hex(), self.threshold, self.words, self.shard_tokens]
        packages = versions(["bert_fast", "tokenizers", "rjieba"])
        return self.source.parent / f"tokens-{job_key(settings, sha256(self.tokenizer), packages)}"

    def __call__(self) -> None:
        if self.folder.is_dir():
            return
        keep = np.unpackbits(np.frombuffer(self.keep, dtype=np.uint8), count=self.documents).astype(bool)
        digests = np.load(self.source / "digests.npy")
        heldout = digests <= np.uint64(max(self.threshold, 0)) if self.threshold >= 0 else np.zeros(digests.size, bool)
        encoder = Encoder(self.tokenizer, self.words)
        no_tokens = 0
        with finished_folder(self.folder) as folder:
            with (
                ShardWriter(folder / "train", self.shard_tokens) as train,
                ShardWriter(folder / "heldout", self.shard_tokens) as held,
            ):
                for documents in read_text(self.source, keep):
                    encoded = encoder.encode([document for _, document in documents])
                    for (number, _), (tokens, sentence_ends) in zip(documents, encoded, strict=True):
                        if tokens.size:
                            (held if heldout[number] else train).add(tokens, sentence_ends)
                        else:
                            no_tokens += 1
            shards = sorted(folder.rglob("*.arrow"))
            files = {path.relative_to(folder).as_posix(): file_entry(path) for path in shards}
            splits = {name: writer.counts() for name, writer in zip(SPLITS, (train, held), strict=True)}
            dropped = {"no_tokens": no_tokens} if no_tokens else {}
            counts = {"splits": splits, "dropped": dropped, "unknown": encoder.unknown, "files": files}
            _write_counts(folder, counts)
