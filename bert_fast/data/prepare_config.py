"""The settings of `bert-fast prepare`, one typed dataclass."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_type_hints

# Settings that do not affect the contents of the prepared files.
_NOT_ABOUT_DATA = ("output", "workers", "engine", "work", "overwrite", "progress")


@dataclass
class PrepareConfig:
    """The settings of `bert-fast prepare`.

    Attributes:
        output: the folder to write; or a URL supported by fsspec (s3://bucket/data), which requires `work`.
        sources: `builtin` (English prose of this Python installation: the language reference and docstrings), files,
            folders or patterns (`crawl/**/*.jsonl.gz`), URLs of these supported by fsspec, or `datasets:NAME` or
            `datasets:NAME:CONFIGURATION`, which is streamed. Files end in .txt, .jsonl, .csv or .parquet; the first
            three may be compressed: .gz, .bz2, .xz, .zst.
        packages: the packages whose docstrings `builtin` reads in addition to the standard library; if null, torch,
            numpy, sympy, networkx and mpmath if installed.
        text_column: the text column of .jsonl, .csv, .parquet and datasets; inferred if null.
        boundary: the end of a document in .txt: `blank_line`, `line` or `file`.
        sentences: how text is split into sentences. `lines`: each line is a sentence. `split`: each line is split by
            sentencex. `split_wrapped`: the lines of a paragraph (up to a blank line) are joined, then split. `auto`:
            `lines` for .txt with the boundary `blank_line`, else `split`. A list of sentences is not split.
        language: the language for sentencex, a code such as en, de or zh.
        words: the words of whole-word masking. `pieces`: pieces that the vocabulary joins by `##`. `spaces`: text
            between spaces, for text that is already segmented. `rjieba`: Chinese words, segmented by rjieba.
        max_documents: maximum number of documents.
        min_characters: documents with fewer characters, not counting white space, are dropped.
        errors: rows and documents that can't be read are dropped and counted (`drop`), or raise an error (`raise`).
        drop_duplicates: keep only the first of documents that are equal up to case, white space and Unicode form.
        vocab: a vocab.txt, a tokenizer.json or a folder with one, to use instead of training a vocabulary.
        vocab_size: number of tokens of the vocabulary to train.
        alphabet_size: maximum number of characters of the vocabulary to train; Chinese text has about 8000.
        vocab_characters: the vocabulary is trained on documents with about this many characters in total, sampled by
            their hash if the corpus is larger.
        lowercase: whether the vocabulary to train is lower-case, as bert-base-uncased.
        heldout_fraction: fraction of the documents held out for evaluation, sampled by their hash.
        shard_tokens: number of tokens after which a shard is complete.
        part_bytes: approximate size of the parts into which the input is cut; a compressed file is never cut.
        workers: number of processes, or of concurrent parts on a Ray cluster; 0 means one per core. The output does not
            depend on it.
        engine: `processes` of this machine, or `ray`, a Ray cluster (`RAY_ADDRESS`) whose machines share the sources
            and the folder `work`.
        work: a folder for finished parts, from which an interrupted preparation resumes; if null, a hidden folder next
            to `output`.
        overwrite: replace an existing prepared folder at `output`.
        progress: whether to show a progress bar and print the report.

    Raises:
        ValueError: a value is out of range, or `output` is a URL and `work` is null.
    """

    output: str
    sources: list[str] = field(default_factory=lambda: ["builtin"])
    packages: list[str] | None = None
    text_column: str | None = None
    boundary: Literal["blank_line", "line", "file"] = "blank_line"
    sentences: Literal["auto", "lines", "split", "split_wrapped"] = "auto"
    language: str = "en"
    words: Literal["pieces", "spaces", "rjieba"] = "pieces"
    max_documents: int | None = None
    min_characters: int = 10
    errors: Literal["drop", "raise"] = "drop"
    drop_duplicates: bool = False
    vocab: str | None = None
    vocab_size: int = 8192
    alphabet_size: int = 1000
    vocab_characters: int = 2**30
    lowercase: bool = True
    heldout_fraction: float = 0.02
    shard_tokens: int = 2**24
    part_bytes: int = 2**26
    workers: int = 1
    engine: Literal["processes", "ray"] = "processes"
    work: str | None = None
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.sources or isinstance(self.sources, str):
            raise ValueError(
                f"sources is {self.sources!r}; expected a list such as ['builtin'] or ['notes.txt', 'more/']"
            )
        for name, hint in get_type_hints(type(self)).items():
            if getattr(hint, "__origin__", None) is Literal and getattr(self, name) not in get_args(hint):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(hint))}")
        if not 0.0 <= self.heldout_fraction < 1.0:
            raise ValueError(f"heldout_fraction is {self.heldout_fraction}; expected 0 or more and less than 1")
        least = {"shard_tokens": 1, "part_bytes": 1, "vocab_characters": 1, "alphabet_size": 1, "max_documents": 1}
        for name, smallest in {**least, "workers": 0, "min_characters": 0}.items():
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise ValueError(f"{name} is {value}; expected {smallest} or more")
        if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z]+)*", self.language):
            raise ValueError(f"language is {self.language!r}; expected a code such as 'en', 'de' or 'zh'")
        if "://" in self.output and self.work is None:
            raise ValueError(
                f"output is the URL {self.output}, which requires work, a local folder for unfinished parts"
            )

    def about_data(self) -> dict[str, Any]:
        """The settings that determine the contents of the files."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_ABOUT_DATA}
