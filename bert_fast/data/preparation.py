"""Corpus to prepared folder: vocabulary, tokens, shards."""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bert_fast.data.corpus import DEFAULT_PACKAGES, Corpus
from bert_fast.data.sentences import Document
from bert_fast.data.shards import ShardWriter, atomic_folder, check_free, write_manifest
from bert_fast.data.vocab import is_lowercase, load_wordpiece, save_tokenizer, train_vocab

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_DOCUMENTS_AT_ONCE = 512
_NOT_ABOUT_DATA = ("output", "overwrite", "progress")


@dataclass
class PrepareConfig:
    """What `bert-fast prepare` reads and writes.

    Attributes:
        output: the folder to make.
        sources: `builtin` (English prose that Python installations have: the language reference and docstrings),
            paths of .txt, .jsonl, .csv or .parquet files, folders of them, or `datasets:NAME`.
        packages: the packages whose docstrings `builtin` reads besides the standard library's; if null, torch, numpy,
            sympy, networkx and mpmath where installed.
        text_column: the column with the text in .jsonl, .csv, .parquet and datasets; guessed if null.
        one_document_per_line: read .txt as a document a line, instead of a sentence a line and blank lines between
            documents.
        max_documents: stop after so many documents.
        vocab: a vocab.txt, a tokenizer.json or a folder with one, to use instead of training a vocabulary.
        vocab_size: tokens of the vocabulary to train.
        lowercase: whether the vocabulary to train is lower-case, as bert-base-uncased.
        heldout_fraction: share of the documents that are kept out of training, for evaluation.
        shard_tokens: tokens of a shard, after which the next one is begun.
        overwrite: replace an earlier prepared folder at `output`.
        progress: whether to show a progress bar and print the report.
    """

    output: str
    sources: list[str] = field(default_factory=lambda: ["builtin"])
    packages: list[str] | None = None
    text_column: str | None = None
    one_document_per_line: bool = False
    max_documents: int | None = None
    vocab: str | None = None
    vocab_size: int = 8192
    lowercase: bool = True
    heldout_fraction: float = 0.02
    shard_tokens: int = 2**24
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise ValueError(f"heldout_fraction is {self.heldout_fraction}; expected 0 or more and less than 1")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens is {self.shard_tokens}; expected 1 or more")


@dataclass(frozen=True)
class PrepareReport:
    """What was prepared: `splits` counts documents, sentences and tokens of train and heldout."""

    output: str
    splits: dict[str, dict[str, int]]
    vocab_size: int
    seconds: float

    def __str__(self) -> str:
        lines = [f"prepared {self.output} in {self.seconds:.1f} s, vocabulary of {self.vocab_size} tokens"]
        for split, counts in self.splits.items():
            numbers = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            lines.append(f"  {split:8}{numbers}")
        return "\n".join(lines)


def prepare(config: PrepareConfig) -> PrepareReport:
    """Read a corpus, train or take a vocabulary, and write tokenised shards; see `bert_fast.data.shards`.

    The folder appears complete or not at all. The same corpus and settings give the same files.

    Returns:
        Counts, which are printed too where `config.progress` is set.

    Raises:
        ValueError: a source, the vocabulary or the output folder can't be used; it is named, with file and line.
    """
    begin = time.perf_counter()
    output = Path(config.output)
    check_free(output, config.overwrite)
    tokenizer = load_wordpiece(config.vocab) if config.vocab else None
    corpus = Corpus(
        config.sources,
        packages=config.packages,
        text_column=config.text_column,
        one_document_per_line=config.one_document_per_line,
        max_documents=config.max_documents,
    )
    digests = np.array([_digest(document) for document in _bar(corpus, "reading", config)], dtype=np.uint64)
    threshold = _heldout_threshold(digests, config.heldout_fraction)
    if tokenizer is None:
        sentences = _Sentences(corpus, config)
        tokenizer = train_vocab(sentences, vocab_size=config.vocab_size, lowercase=config.lowercase)
    with atomic_folder(output, overwrite=config.overwrite) as folder:
        splits = _write_splits(folder, corpus, tokenizer, digests <= threshold, config)
        save_tokenizer(tokenizer, folder)
        vocab_size = tokenizer.get_vocab_size()
        settings = {
            name: value for name, value in asdict(config).items() if name not in ("output", "overwrite", "progress")
        }
        settings["lowercase"] = is_lowercase(tokenizer)
        contents = {"splits": splits, "vocab_size": vocab_size, "settings": settings, "versions": _versions(config)}
        write_manifest(folder, contents)
    report = PrepareReport(config.output, splits, vocab_size, time.perf_counter() - begin)
    if config.progress:
        print(report)
    return report


class _Sentences:
    """All sentences of a corpus, as often as asked."""

    def __init__(self, corpus: Corpus, config: PrepareConfig) -> None:
        self.corpus = corpus
        self.config = config

    def __iter__(self) -> Iterator[str]:
        for document in _bar(self.corpus, "vocabulary", self.config):
            yield from document


def _bar(
    documents: Iterable[Document], what: str, config: PrepareConfig, total: int | None = None
) -> Iterable[Document]:
    from tqdm import tqdm

    return tqdm(documents, desc=what, unit=" documents", total=total, disable=not config.progress, mininterval=0.5)


def _digest(document: Document) -> int:
    return int.from_bytes(hashlib.blake2b("\n".join(document).encode(), digest_size=8).digest(), "little")


def _heldout_threshold(digests: np.ndarray, fraction: float) -> np.uint64:
    """The largest digest of a held-out document: by digest, so that copies of a document fall on the same side."""
    if digests.size == 0:
        raise ValueError("the corpus has no documents; are the files empty?")
    if fraction == 0.0:
        return np.uint64(0)
    if np.unique(digests).size < 4:
        raise ValueError(
            f"the corpus has {np.unique(digests).size} different documents; expected at least 4, 2 for training and 2 "
            "held out (or set heldout_fraction to 0); if a line is a document, set one_document_per_line"
        )
    unique = np.unique(digests)
    count = min(max(2, round(fraction * unique.size)), unique.size - 2)
    return np.uint64(unique[count - 1])


def _write_splits(
    folder: Path, corpus: Corpus, tokenizer: Tokenizer, heldout: np.ndarray, config: PrepareConfig
) -> dict[str, dict[str, int]]:
    tokenizer = tokenizer.from_str(tokenizer.to_str())
    tokenizer.encode_special_tokens = True  # "[SEP]" in a text is six letters and brackets, no separator
    documents = iter(_bar(corpus, "tokenising", config, total=heldout.size))
    number = 0
    with (
        ShardWriter(folder / "train", config.shard_tokens) as train,
        ShardWriter(folder / "heldout", config.shard_tokens) as held,
    ):
        while several := list(islice(documents, _DOCUMENTS_AT_ONCE)):
            if number + len(several) > heldout.size:
                raise ValueError("the corpus has grown while it was read; prepare it again")
            for tokens, sentence_ends in _encode(tokenizer, several):
                if tokens.size:
                    (held if heldout[number] else train).add(tokens, sentence_ends)
                number += 1
    if number != heldout.size:
        raise ValueError("the corpus has shrunk while it was read; prepare it again")
    return {
        split: {"documents": writer.documents, "sentences": writer.sentences, "tokens": writer.tokens}
        for split, writer in (("train", train), ("heldout", held))
    }


def _encode(tokenizer: Tokenizer, documents: list[Document]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    sentences = [sentence for document in documents for sentence in document]
    encoded = iter(tokenizer.encode_batch(sentences, add_special_tokens=False))
    for document in documents:
        # White space and control characters may leave nothing of a sentence.
        ids = [ids for ids in (encoding.ids for encoding in islice(encoded, len(document))) if ids]
        ends = np.cumsum([len(sentence) for sentence in ids], dtype=np.int32)
        yield np.array([token for sentence in ids for token in sentence], dtype=np.int32), ends


def _versions(config: PrepareConfig) -> dict[str, Any]:
    """Versions that the built-in corpus and the tokens depend on."""
    names = ["bert_fast", "tokenizers"]
    if "builtin" in config.sources:
        names += DEFAULT_PACKAGES if config.packages is None else config.packages
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
