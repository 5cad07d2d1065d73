"""Both sides of an example on a tiny model: equal rows, equal metrics."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bert_fast.data import save_tokenizer, train_vocab
from bert_fast.models import BertConfig, BertForMaskedLM
from examples.trainer_comparison import Experiment, compared, ours, theirs, thinned

WORDS = ("anna", "bonn", "sees", "likes", "rain")


@pytest.fixture(scope="module")
def tags(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Names of people and places, which each word determines."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_vocab([" ".join(WORDS)] * 20, vocab_size=60)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=tokenizer.get_vocab_size(), **size)).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    kinds = {"anna": "B-PER", "bonn": "B-LOC"}
    rows = [
        {"tokens": [first, verb, last], "tags": [kinds.get(first, "O"), "O", kinds.get(last, "O")]}
        for first in WORDS
        for verb in ("sees", "likes")
        for last in WORDS
    ]
    splits = {"train": rows, "dev": rows[:10], "test": rows}
    names = ("f1", "precision", "recall")
    return Experiment("token-classification", folder, splits, names, epochs=12, lr=1e-2, batch=8, max_length=16)


def test_both_sides_learn_tags(tags: Experiment, tmp_path: Path) -> None:
    for side in (ours, theirs):
        metrics = side(tags, tmp_path, 0)
        assert [metrics[name] for name in tags.metrics] == [1.0, 1.0, 1.0], side


def test_both_sides_learn_classes_and_are_in_the_table(tags: Experiment) -> None:
    def classes(split: str) -> list[dict[str, str]]:
        rows = tags.splits[split]
        return [{"text": " ".join(row["tokens"]), "label": str("anna" in row["tokens"])} for row in rows]

    splits = {split: classes(split) for split in tags.splits}
    experiment = replace(tags, task="classification", splits=splits, metrics=("accuracy", "macro_f1"))
    lines = compared(experiment, 1, ["bert_fast", "transformers"])
    assert lines[0] == "| fine-tuned by | test accuracy | test macro f1 | seconds | CPU seconds |"
    assert [line.split(" | ")[:3] for line in lines[2:4]] == [
        ["| bert_fast", "1.0000", "1.0000"], ["| transformers", "1.0000", "1.0000"],
    ]  # fmt: skip
    assert lines[-1].startswith("Rows: 50 train, 10 dev, 50 test. 12 epochs")


def test_thinned_rows_are_evenly_spaced() -> None:
    rows = [{"text": str(number)} for number in range(10)]
    assert [row["text"] for row in thinned({"train": rows}, 3)["train"]] == ["0", "3", "6", "9"]
    assert thinned({"train": rows}, 0)["train"] == rows
