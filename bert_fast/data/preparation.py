"""Prepares a corpus part by part: clean the text, train the vocabulary, tokenise, write shards.

Peak memory is independent of the size of the corpus, except for one byte per document; dropping duplicates takes up to
half a gigabyte more. Finished parts, about as large as the text, stay in a work folder until the end.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bert_fast import _io
from bert_fast._lock import exclusive
from bert_fast._progress import ProgressBar
from bert_fast.data.builtin import DEFAULT_PACKAGES
from bert_fast.data.cleaning import REASONS
from bert_fast.data.engine import Job, run_jobs
from bert_fast.data.host_numpy import Array
from bert_fast.data.parts import (
    CleanJob,
    EncodeJob,
    finished_folder,
    job_key,
    read_counts,
    read_text,
)
from bert_fast.data.prepare_config import PrepareConfig
from bert_fast.data.remote import check_remote_free, upload
from bert_fast.data.selection import heldout_threshold, select
from bert_fast.data.shards import SPLITS, check_free, write_manifest
from bert_fast.data.sources import plan_parts, versions
from bert_fast.data.tokenizer import count_ids
from bert_fast.data.tokenizer_saving import copy_tokenizer, save_tokenizer
from bert_fast.data.vocab import is_lowercase, load_wordpiece, train_vocab

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPORT = "report.json"
_MAX_UNKNOWN = 0.01  # share of [UNK] above which prepare warns

_logger = logging.getLogger("bert_fast")


@dataclass(frozen=True)
class PrepareReport:
    """The counts of a preparation.

    Attributes:
        output: the prepared folder.
        read: number of documents read.
        kept: number of documents in the shards.
        dropped: number of documents dropped, by reason, see `bert_fast.data.cleaning.REASONS`.
        first_dropped: position and problem of the first document dropped for each reason.
        splits: number of documents, sentences and tokens of `train` and `heldout`.
        vocab_size: number of tokens of the vocabulary.
        unknown: number of [UNK] tokens.
        seconds: duration.
    """

    output: str
    read: int
    kept: int
    dropped: dict[str, int]
    first_dropped: dict[str, str]
    splits: dict[str, dict[str, int]]
    vocab_size: int
    unknown: int
    seconds: float

    def __str__(self) -> str:
        lines = [f"prepared {self.output} in {self.seconds:.1f} s, vocabulary of {self.vocab_size} tokens"]
        for split, counts in self.splits.items():
            numbers = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            lines.append(f"  {split:8}{numbers}")
        tokens = sum(counts["tokens"] for counts in self.splits.values())
        lines.append(f"  {self.unknown / max(tokens, 1):.3%} of the tokens are [UNK]")
        lines.append(f"  read {self.read:,} documents, kept {self.kept:,}")
        for reason, count in self.dropped.items():
            first = f" (first: {self.first_dropped[reason]})" if reason in self.first_dropped else ""
            lines.append(f"  dropped {count:,}: {REASONS[reason]}{first}")
        return "\n".join(lines)


def prepare(config: PrepareConfig) -> PrepareReport:
    """Read a corpus, train or load a vocabulary, and write tokenised shards; see `bert_fast.data.shards`.

    The output folder is written atomically. The same corpus and settings give the same files for any number of workers;
    calling `prepare` again after an interruption resumes with the finished parts.

    Args:
        config: see `PrepareConfig`.

    Returns:
        The counts, which are also in report.json in the output folder and, if `config.progress` is True, printed.

    Raises:
        ValueError: `config` is invalid, a source, the vocabulary or the output can't be used (the message names it,
            with file and line), no document is left, a worker died, or another preparation uses the same work folder.
        ImportError: a package required by a setting is not installed.
    """
    begin = time.perf_counter()
    config.__post_init__()  # again: its attributes may have changed
    remote = "://" in config.output
    output = Path(config.work or "") / "output" if remote else Path(config.output)
    _io.recover(output.parent, exclusive=False)
    if remote:
        check_remote_free(config.output, config.overwrite)
    else:
        check_free(output, config.overwrite)
    tokenizer = load_wordpiece(config.vocab) if config.vocab else None
    if config.words == "rjieba":
        importlib.import_module("rjieba")  # fails now, not after the corpus is read
    parts = plan_parts(config)
    work = Path(config.work) if config.work else output.with_name(f".{output.name}.work")
    with exclusive(work, what="bert-fast prepare"):
        work.mkdir(parents=True, exist_ok=True)
        _io.recover(work)
        _io.recover(work.parent, exclusive=False)
        cleaned = _clean([CleanJob(pieces, config, str(work)) for pieces in parts], config)
        keep, duplicates = select(cleaned, config.max_documents, drop_duplicates=config.drop_duplicates)
        threshold = heldout_threshold(cleaned, keep, config.heldout_fraction)
        vocabulary = _vocabulary(work, cleaned, keep, tokenizer, config)
        encoded = [
            EncodeJob(
                folder, np.packbits(mask).tobytes(), mask.size, threshold, vocabulary, config.words, config.shard_tokens
            )
            for folder, mask in zip(cleaned, keep, strict=True)
        ]
        _run(encoded, "tokens", config)
        if not remote:
            check_free(output, config.overwrite)
        with _io.atomic_folder(output, overwrite=True) as folder:
            counts = _assemble(folder, cleaned, [job.folder for job in encoded], vocabulary, duplicates, config)
        if remote:
            upload(output, config.output)
        finished = _io.temporary_path(work)
        work.rename(finished)  # a folder half deleted would be taken for one to resume from
        shutil.rmtree(finished)
    report = PrepareReport(**{**counts, "seconds": time.perf_counter() - begin, "output": config.output})
    tokens = sum(split["tokens"] for split in report.splits.values())
    if report.unknown > _MAX_UNKNOWN * tokens:
        _logger.warning(
            "%s: %.1f%% of the tokens are [UNK]; train a vocabulary on this text, with a larger alphabet_size, or give "
            "the vocab of its language",
            config.output,
            100 * report.unknown / tokens,
        )
    if config.progress:
        print(report)
    return report


def _run(jobs: Sequence[Job], what: str, config: PrepareConfig, enough: int | None = None) -> int:
    """Run jobs with a progress bar until the first ones have `enough` documents; the number of these jobs."""
    done = [False] * len(jobs)
    first = documents = 0  # the jobs before `first` are done and have this number of documents
    running = run_jobs(jobs, workers=config.workers, engine=config.engine)
    with ProgressBar(len(jobs), description=what, unit=" parts", shown=config.progress) as bar:
        for number in running:
            bar.update()
            done[number] = True
            while first < len(jobs) and done[first]:
                if enough is not None:
                    documents += np.load(jobs[first].folder / "digests.npy", mmap_mode="r").size  # type: ignore[attr-defined]
                first += 1
                if enough is not None and documents >= enough:
                    running.close()
                    return first
    return first


def _clean(jobs: list[CleanJob], config: PrepareConfig) -> list[Path]:
    """The finished folders of the cleaned parts.

    Raises:
        ValueError: no document is left; the message has the reasons.
    """
    used = _run(jobs, "text", config, config.max_documents)
    folders = [job.folder for job in jobs[:used]]
    counts = [read_counts(folder) for folder in folders]
    read, dropped = sum(count["read"] for count in counts), Counter[str]()
    for count in counts:
        dropped.update(count["dropped"])
    if read == dropped.total():
        first = {reason: where for count in reversed(counts) for reason, where in count["first_dropped"].items()}
        reasons = "; ".join(f"{REASONS[reason]}, first {first[reason]}" for reason in dropped) or "are the files empty?"
        raise ValueError(f"the corpus has no documents: {read} read and dropped ({reasons})")
    return folders


def _vocabulary(
    work: Path, cleaned: list[Path], keep: list[Array], tokenizer: Tokenizer | None, config: PrepareConfig
) -> Path:
    """The tokenizer.json in the work folder, of `tokenizer`, or trained if it is None."""
    if tokenizer is not None:
        key = job_key("given", tokenizer.to_str())
    else:
        documents = [
            [folder.name, hashlib.sha256(mask.tobytes()).hexdigest()]
            for folder, mask in zip(cleaned, keep, strict=True)
        ]
        settings = [config.vocab_size, config.alphabet_size, config.vocab_characters, config.lowercase]
        key = job_key("trained", documents, settings, versions(["bert_fast", "tokenizers"]))
    folder = work / f"vocabulary-{key}"
    if not folder.is_dir():
        if tokenizer is None:
            sample = _Sample(cleaned, keep, config)
            sizes = {"vocab_size": config.vocab_size, "alphabet_size": config.alphabet_size}
            shown = config.progress and sys.stderr.isatty()
            tokenizer = train_vocab(sample, **sizes, lowercase=config.lowercase, show_progress=shown)
        with finished_folder(folder) as temporary:
            if config.vocab:
                copy_tokenizer(config.vocab, temporary)
            else:
                save_tokenizer(tokenizer, temporary)
    return folder / "tokenizer.json"


class _Sample:
    """An iterable of the sentences to train the vocabulary on."""

    def __init__(self, cleaned: list[Path], keep: list[Array], config: PrepareConfig) -> None:
        self.parts = list(zip(cleaned, keep, strict=True))
        self.config = config
        characters = sum(read_counts(folder)["characters"] for folder in cleaned)
        self.share = min(1.0, config.vocab_characters / max(characters, 1))

    def __iter__(self) -> Iterator[str]:
        with ProgressBar(len(self.parts), description="vocabulary", unit=" parts", shown=self.config.progress) as bar:
            for folder, mask in self.parts:
                for documents in read_text(folder, mask & self._chosen(folder)):
                    for _, document in documents:
                        yield from document
                bar.update()

    def _chosen(self, folder: Path) -> Array:
        digests = np.load(folder / "digests.npy")
        if self.share == 1.0:
            return np.ones(digests.size, dtype=bool)
        # Multiplied by an odd number, so that the choice is independent of that of the held-out documents.
        mixed = digests * np.uint64(0x9E3779B97F4A7C15)
        return np.asarray(mixed < np.uint64(round(self.share * 2**64)))


def _assemble(
    folder: Path,
    cleaned: list[Path],
    encoded: list[Path],
    vocabulary: Path,
    duplicates: int,
    config: PrepareConfig,
) -> dict[str, Any]:
    """Assemble the prepared folder from finished parts; returns the counts of `PrepareReport`."""
    tokenizer = load_wordpiece(vocabulary)
    copy_tokenizer(vocabulary.parent, folder)
    files: dict[str, Any] = {}
    splits: dict[str, Counter[str]] = {split: Counter(documents=0, sentences=0, tokens=0) for split in SPLITS}
    dropped = Counter(duplicate=duplicates)
    first_dropped: dict[str, str] = {}
    shards, read, unknown = Counter(dict.fromkeys(SPLITS, 0)), 0, 0
    for split in SPLITS:
        (folder / split).mkdir()
    for text, tokens in zip(cleaned, encoded, strict=True):
        before, after = read_counts(text), read_counts(tokens)
        read += before["read"]
        unknown += after["unknown"]
        dropped.update(before["dropped"])
        dropped.update(after["dropped"])
        first_dropped = {**before["first_dropped"], **first_dropped}
        for split, counts in after["splits"].items():
            splits[split].update(counts)
        for name, entry in after["files"].items():
            split = name.partition("/")[0]
            target = f"{split}/{shards[split]:05d}.arrow"
            shards[split] += 1
            _io.link_or_copy(tokens / name, folder / target)
            files[target] = entry
    vocab_size = count_ids(tokenizer)
    report = {
        "read": read,
        "kept": sum(counts["documents"] for counts in splits.values()),
        "dropped": {name: dropped[name] for name in REASONS if dropped[name]},
        "first_dropped": {name: first_dropped[name] for name in REASONS if name in first_dropped},
        "splits": {split: dict(counts) for split, counts in splits.items()},
        "vocab_size": vocab_size,
        "unknown": unknown,
    }
    _io.write_json(folder / REPORT, report)
    settings = {**config.about_data(), "lowercase": is_lowercase(tokenizer)}
    contents = {
        "splits": report["splits"],
        "vocab_size": vocab_size,
        "settings": settings,
        "versions": _versions(config),
    }
    write_manifest(folder, contents, files)
    return report


def _versions(config: PrepareConfig) -> dict[str, str]:
    """The versions of the packages that determine the built-in corpus, the sentences and the tokens."""
    names = ["bert_fast", "tokenizers", "sentencex", *(["rjieba"] if config.words == "rjieba" else [])]
    if "builtin" in config.sources:
        names += DEFAULT_PACKAGES if config.packages is None else config.packages
    return versions(names)
