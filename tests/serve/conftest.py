"""Tiny models of every kind that the server serves, and a server of them in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from bert_fast import models
from bert_fast.data.vocab import SPECIAL_TOKENS

WORDS = ["the", "cat", "dog", "sat", "on", "a", "mat", "law", "court", "paris", "ada", "in", "##s", ".", ","]
TEXTS = ["the cat sat on a mat", "a dog", "", "the law , the court .", "paris", "ada sat in the court in paris"]
PAIRS = [
    ("the cat", "a mat"),
    ("the cat", "the law of the court"),
    ("the cat", ""),
    ("the cat", "a dog sat on the cat"),
]
KINDS = {
    "embedder": ("BertModel", {}),
    "reranker": ("BertForSequenceClassification", {"num_labels": 1}),
    "classifier": ("BertForSequenceClassification", {"id2label": {0: "bad", 1: "fair", 2: "good"}}),
    "tagger": ("BertForTokenClassification", {"id2label": {0: "O", 1: "PER", 2: "LOC"}}),
    "filler": ("BertForMaskedLM", {}),
}


class Running(NamedTuple):
    """A server: its process, its address, and a client of it."""

    process: subprocess.Popen[str]
    url: str
    client: Any  # httpx.Client


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each of `KINDS`."""
    made = {}
    for seed, (name, (kind, settings)) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("served") / name
        vocabulary = [*SPECIAL_TOKENS, *WORDS]
        config = models.BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=40,
            initializer_range=0.3,
            **settings,
        )
        getattr(models, kind)(config).eval().save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
        made[name] = folder
    return made


@contextmanager
def serving(*arguments: Any, environment: dict[str, str] | None = None) -> Iterator[Running]:
    """A server at a free port, until the block ends."""
    import httpx  # of the extra "test"

    process = subprocess.Popen(
        [sys.executable, "-m", "bert_fast.cli", "serve", "--port", "0", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        lines = []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if found := re.match(r"serving .* at (http://\S+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        with httpx.Client(base_url=found[1], timeout=60) as client:
            yield Running(process, found[1], client)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def server(folders: dict[str, Path]) -> Iterator[Running]:
    """A server of all `KINDS` in fp32, whose log nobody reads."""
    arguments = [f"{name}={folder}" for name, folder in folders.items()]
    with serving(*arguments, "--precision", "fp32", "--log", "none", "--max_client_batch_size", 64) as running:
        yield running
