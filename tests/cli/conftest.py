"""A tiny model with rows, and a model fine-tuned on them, for the tests of the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from bert_fast.cli.main import main
from bert_fast.models import BertConfig, BertModel

WORDS = ["yes", "no", "maybe", "one", "two", "three", "four"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test computes with one thread."""


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer in `model`, and rows whose label is a word of the text in `rows.csv`."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "model").mkdir()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "model" / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=16, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder / "model")
    rows = [(f"{WORDS[3 + n % 4]} {WORDS[n % 3]} {WORDS[3 + n // 4 % 4]}", WORDS[n % 3]) for n in range(120)]
    (folder / "rows.csv").write_text("sentence,kind\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return folder


@pytest.fixture(scope="session")
def finetuned(base: Path) -> Path:
    """The folder of a model fine-tuned on the command line."""
    settings = {
        "data": {"train": str(base / "rows.csv"), "columns": {"label": "kind"}, "dev_fraction": 0.2},
        "text": {"max_length": 8},
        "optimizer": {"lr": 5e-3},
        "dropout": 0.0,
        "progress": False,
    }
    (base / "run.yaml").write_text(yaml.safe_dump(settings))
    target = base / "run"
    where = ["--model", str(base / "model"), "--output_dir", str(target)]
    assert main(["finetune", "classification", "--config", str(base / "run.yaml"), *where, "--epochs", "8"]) == 0
    return target
