"""What `bert-fast prepare` is told: one typed dataclass, checked once."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_type_hints

# Settings that say where and how the work is done, and change nothing in the files that come out.
_NOT_ABOUT_DATA = ("output", "workers", "engine", "work", "overwrite", "progress")


@dataclass
class PrepareConfig:
    """What `bert-fast prepare` reads and writes.

    Attributes:
        output: the folder to make; also a URL that fsspec knows (s3://bucket/data), which needs `work`.
        sources: `builtin` (English prose that Python installations have: the language reference and docstrings),
            files, folders or patterns (`crawl/**/*.jsonl.gz`), URLs of them that fsspec knows, or `datasets:NAME` or
            `datasets:NAME:CONFIGURATION`, which is streamed. Files end in .txt, .jsonl, .csv or .parquet, and all but
            the last may end in .gz, .bz2, .xz or .zst besides.
        packages: the packages whose docstrings `builtin` reads besides the standard library's; if null, torch, numpy,
            sympy, networkx and mpmath where installed.
        text_column: the column with the text in .jsonl, .csv, .parquet and datasets; guessed if null.
        boundary: what ends a document in .txt: `blank_line`, `line` or `file`.
        sentences: how a text becomes sentences. `lines`: a line is one. `split`: every line is split by sentencex.
            `split_wrapped`: likewise, after the lines of a paragraph (up to a blank line) are joined. `auto`: `lines`
            for .txt with the boundary `blank_line`, `split` for all else. A list of sentences is taken as it is.
        language: for sentencex, a code such as en, de or zh.
        words: what a whole word is, for masking. `pieces`: the pieces that the vocabulary joins by `##`. `spaces`: what
            stands between spaces, for text that is segmented already. `rjieba`: Chinese words by rjieba.
        max_documents: stop after so many documents.
        min_characters: documents of fewer characters, white space aside, are dropped.
        errors: whether rows and documents that can't be read are dropped and counted (`drop`) or end it all (`raise`).
        drop_duplicates: keep only the first of documents that are equal but for case, white space and Unicode form.
        vocab: a vocab.txt, a tokenizer.json or a folder with one, to use instead of training a vocabulary.
        vocab_size: tokens of the vocabulary to train.
        alphabet_size: the most different characters of the vocabulary to train; Chinese text has about 8000.
        vocab_characters: the vocabulary is trained on about so many characters of a larger corpus, whole documents
            that their hash chooses.
        lowercase: whether the vocabulary to train is lower-case, as bert-base-uncased.
        heldout_fraction: share of the documents that are kept out of training, for evaluation; their hash chooses.
        shard_tokens: tokens of a shard, after which the next one is begun.
        part_bytes: input is worked on in parts of about so many bytes; a compressed file is never cut.
        workers: processes, or parts at once on a Ray cluster; 0 takes one a core. The files that come out are the same
            for any number.
        engine: `processes` of this machine, or `ray`, the machines of a Ray cluster (`RAY_ADDRESS`), all of which see
            the sources and the folder `work`.
        work: a folder for finished parts, so that a preparation that was stopped goes on; beside `output` if null.
        overwrite: replace an earlier prepared folder at `output`.
        progress: whether to show a progress bar and print the report.
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
                f"output is the URL {self.output}: name a folder of this machine for unfinished parts, work"
            )

    def about_data(self) -> dict[str, Any]:
        """The settings on which the files depend."""
        return {name: value for name, value in asdict(self).items() if name not in _NOT_ABOUT_DATA}
