"""Fixtures of the whole suite."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads it when a kernel is defined: the Triton kernels run on CPU tensors, in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

WORDS = [
    "the",
    "a",
    "small",
    "old",
    "red",
    "green",
    "bird",
    "cat",
    "river",
    "house",
    "sings",
    "runs",
    "sleeps",
    "near",
    "under",
    "over",
    "and",
    "then",
    "quietly",
    "again",
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def compile_backend() -> str:
    """inductor where it finds the C++ compiler it needs, else the tracing alone."""
    compilers = (os.environ.get("CXX"), "g++", "clang++", "c++")
    return "inductor" if any(name and shutil.which(name) for name in compilers) else "aot_eager"


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill every uninitialised tensor with NaN, so that an output which a kernel forgot to write can't pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 documents of random sentences, a sentence a line, blank lines between documents."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    documents = [
        "\n".join(
            " ".join(generator.choices(WORDS, k=generator.randint(4, 9))) + "." for _ in range(generator.randint(4, 9))
        )
        for _ in range(80)
    ]
    path.write_text("\n\n".join(documents) + "\n")
    return path


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """`text_file`, prepared with a vocabulary of 120 tokens."""
    from bert_fast.data import PrepareConfig, prepare

    folder = tmp_path_factory.mktemp("prepared") / "data"
    prepare(PrepareConfig(str(folder), [str(text_file)], vocab_size=120, heldout_fraction=0.2, progress=False))
    return folder


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config.json of a BERT that takes a step in milliseconds."""
    path = tmp_path_factory.mktemp("model") / "config.json"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    path.write_text(json.dumps({"model_type": "bert", "max_position_embeddings": 64, **sizes}))
    return path
