"""A tiny corpus for the tests of bert_fast.data."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bert_fast.data import PrepareConfig, prepare

# GPU machines have no network, so missing packages can't be installed and their tests can't run.
_REQUIRED = {"sentencex": ["cleaning", "files", "preparation"], "rjieba": ["words", "real_chinese"], "ray": ["ray"]}
collect_ignore = [
    f"test_{name}.py"
    for package, names in _REQUIRED.items()
    for name in names
    if torch.cuda.is_available() and importlib.util.find_spec(package) is None
]
SYLLABLES = [consonant + vowel for consonant in "bdklmrst" for vowel in "aeio"]


def make_documents(count: int = 80, seed: int = 0) -> list[list[str]]:
    """Documents of 1 to 12 sentences of 1 to 40 words; some words are rare and have several pieces."""
    generator = random.Random(seed)
    common = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 3))) for _ in range(150)]

    def word() -> str:
        rare = generator.random() < 0.3
        return "".join(generator.choices(SYLLABLES, k=generator.randint(3, 6))) if rare else generator.choice(common)

    def sentence() -> str:
        return " ".join(word() for _ in range(generator.choice([1, 3, 6, 8, 10, 15, 40]))).capitalize() + "."

    return [[sentence() for _ in range(generator.choice([1, 2, 3, 5, 8, 12]))] for _ in range(count)]


@pytest.fixture(scope="session")
def documents() -> Callable[..., list[list[str]]]:
    """`make_documents`, for tests with documents other than those of `text_file`."""
    return make_documents


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join("\n".join(document) for document in make_documents()) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prepared(text_file: Path) -> Path:
    """A prepared folder with several shards and record batches; tests must not modify it."""
    folder = text_file.parent / "prepared"
    prepare(
        PrepareConfig(
            output=str(folder),
            sources=[str(text_file)],
            vocab_size=400,
            heldout_fraction=0.1,
            min_characters=1,
            part_bytes=2**14,
            shard_tokens=2000,
            progress=False,
        )
    )
    return folder
