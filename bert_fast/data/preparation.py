"""Corpus to prepared folder, as a stream: cleaned text, vocabulary, tokens, shards; a part at a time.

The memory that is needed does not grow with the corpus, but for a byte a document; to drop duplicates takes half a
gigabyte more at most. Finished parts stay in a work folder until all is done, about as large as the text.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

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
    link_or_copy,
    read_counts,
    read_text,
    remove_unfinished,
)
from bert_fast.data.prepare_config import PrepareConfig
from bert_fast.data.remote import check_remote_free, upload
from bert_fast.data.selection import heldout_threshold, select
from bert_fast.data.shards import SPLITS, atomic_folder, check_free, write_manifest
from bert_fast.data.sources import plan_parts, versions
from bert_fast.data.vocab import is_lowercase, load_wordpiece, save_tokenizer, train_vocab

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPORT = "report.json"


@dataclass(frozen=True)
class PrepareReport:
    """What was prepared.

    Attributes:
        output: the folder.
        read, kept: documents that were read, and those that are in the shards.
        dropped: how many documents were left out, by reason, see `bert_fast.data.cleaning.REASONS`.
        first_dropped: of each reason the first one: where it is, and what is wrong.
        splits: documents, sentences and tokens of train and heldout.
        vocab_size: tokens of the vocabulary.
        unknown: tokens that are [UNK].
        seconds: how long it took.
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
    """Read a corpus, train or take a vocabulary, and write tokenised shards; see `bert_fast.data.shards`.

    The folder appears complete or not at all. The same corpus and settings give the same files, whatever the number of
    workers, and whether or not the preparation was stopped in between: the same call goes on where it was.

    Returns:
        Counts, which are printed too where `config.progress` is set; report.json in the folder has them as well.

    Raises:
        ValueError: a source, the vocabulary or the output folder can't be used; it is named, with file and line.
        ImportError: a package that a setting needs is not installed.
    """
    begin = time.perf_counter()
    config.__post_init__()  # again: a dataclass can be changed after it was made
    remote = "://" in config.output
    output = Path(config.work or "") / "output" if remote else Path(config.output)
    if remote:
        check_remote_free(config.output, config.overwrite)
    else:
        check_free(output, config.overwrite)
    tokenizer = load_wordpiece(config.vocab) if config.vocab else None
    if config.words == "rjieba":
        importlib.import_module("rjieba")  # its absence is told now, not after the corpus was read
    parts = plan_parts(config)
    work = Path(config.work) if config.work else output.with_name(f".{output.name}.work")
    with _working(work, output):
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
        if remote:
            shutil.rmtree(output, ignore_errors=True)
        with atomic_folder(output, overwrite=config.overwrite) as folder:
            found = _assemble(folder, cleaned, [job.folder for job in encoded], vocabulary, duplicates, config)
        if remote:
            upload(output, config.output)
    shutil.rmtree(work)
    report = PrepareReport(**{**found, "seconds": time.perf_counter() - begin, "output": config.output})
    if config.progress:
        print(report)
    return report


@contextmanager
def _working(work: Path, output: Path) -> Iterator[None]:
    """The work folder, locked: two preparations must not meet in it. What a killed one left half done is removed."""
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another bert-fast prepare is at work in {work}; wait for it, or end it") from error
        remove_unfinished(work, "*.tmp")
        remove_unfinished(output.parent, f".{output.name}.*.tmp")
        yield


def _run(jobs: Sequence[Job], what: str, config: PrepareConfig, enough: int | None = None) -> int:
    """Run jobs with a progress bar, and stop after so many documents of the first ones; how many jobs to go on with."""
    done = [False] * len(jobs)
    first = documents = 0  # all jobs before `first` are done, and have so many documents
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
        ValueError: no document is left; why is in the message.
    """
    used = _run(jobs, "text", config, config.max_documents)
    folders = [job.folder for job in jobs[:used]]
    counts = [read_counts(folder) for folder in folders]
    read, dropped = sum(count["read"] for count in counts), Counter[str]()
    for count in counts:
        dropped.update(count["dropped"])
    if read == dropped.total():
        first = {reason: where for count in reversed(counts) for reason, where in count["first_dropped"].items()}
        why = "; ".join(f"{REASONS[reason]}, first {first[reason]}" for reason in dropped)
        raise ValueError(f"the corpus has no documents of the {read} that were read ({why or 'are the files empty?'})")
    return folders


def _vocabulary(
    work: Path, cleaned: list[Path], keep: list[Array], tokenizer: Tokenizer | None, config: PrepareConfig
) -> Path:
    """The tokenizer.json: of the tokenizer that was given, or trained and kept in the work folder."""
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
            tokenizer = train_vocab(sample, **sizes, lowercase=config.lowercase)
        with finished_folder(folder) as temporary:
            save_tokenizer(tokenizer, temporary)
    return folder / "tokenizer.json"


class _Sample:
    """The sentences that the vocabulary is trained on, as often as asked."""

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
        # Other bits than those that choose the held-out documents: the digest times an odd number.
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
    """Put the prepared folder together from finished parts; what `PrepareReport` says."""
    tokenizer = load_wordpiece(vocabulary)
    save_tokenizer(tokenizer, folder)
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
            link_or_copy(tokens / name, folder / target)
            files[target] = entry
    vocab_size = tokenizer.get_vocab_size()
    report = {
        "read": read,
        "kept": sum(counts["documents"] for counts in splits.values()),
        "dropped": {name: dropped[name] for name in REASONS if dropped[name]},
        "first_dropped": {name: first_dropped[name] for name in REASONS if name in first_dropped},
        "splits": {split: dict(counts) for split, counts in splits.items()},
        "vocab_size": vocab_size,
        "unknown": unknown,
    }
    (folder / REPORT).write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
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
    """Versions that the built-in corpus, the sentences and the tokens depend on."""
    names = ["bert_fast", "tokenizers", "sentencex", *(["rjieba"] if config.words == "rjieba" else [])]
    if "builtin" in config.sources:
        names += DEFAULT_PACKAGES if config.packages is None else config.packages
    return versions(names)
