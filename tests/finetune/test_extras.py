"""Long documents, other poolings, new heads and augmentation."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bert_fast._config import from_mapping
from bert_fast.cli.rows import load_task
from bert_fast.finetune import FinetuneConfig, finetune
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.task_run import TaskRun
from bert_fast.models import BertConfig, BertModel
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.prediction import predict

SIGNS, FILLER = {"good": "fine", "bad": "poor"}, ["the", "a", "film", "was", "it", "very", "and", "we", "saw"]


def quiet(_: str) -> None:
    pass


def text_of(label: str, number: int, length: int) -> str:
    """Fillers, and one word that determines the label, at a position that depends on `number`."""
    words = [FILLER[(number * 7 + position * 5) % len(FILLER)] for position in range(length)]
    words.insert(number * 3 % (length + 1), label if number % 4 < 2 else SIGNS[label])
    return " ".join(words)


def write(path: Path, numbers: range, length: int) -> str:
    rows = [("good" if number % 2 else "bad", number) for number in numbers]
    lines = [f"{text_of(label, number, length)},{label}\n" for label, number in rows]
    path.write_text("text,label\n" + "".join(lines))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *SIGNS, *SIGNS.values(), *FILLER]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=len(words), max_position_embeddings=32, initializer_range=0.2, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> FinetuneConfig:
    train, dev = (write(tmp_path / f"{name}.csv", numbers, 5) for name, numbers in
                  (("train", range(80)), ("dev", range(100, 120))))  # fmt: skip
    values = {
        "task": "classification",
        "model": str(base),
        "output_dir": str(tmp_path / "run"),
        "data": {"train": train, "dev": dev},
        "text": {"max_length": 16},
        "optimizer": {"lr": 5e-3},
        "epochs": 6,
        "dropout": 0.0,
        "progress": False,
        "report": False,
        "device": "cpu",
    }
    return from_mapping(FinetuneConfig, values)


def with_(config: FinetuneConfig, **changes: Any) -> FinetuneConfig:
    """`config` with values replaced; a mapping replaces values within a group."""
    groups = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) and name != "options" else value
        for name, value in changes.items()
    }
    return replace(config, **groups)


def test_windows_and_pooling_are_trained_and_restored(config: FinetuneConfig, tmp_path: Path) -> None:
    data = {"train": write(tmp_path / "long.csv", range(60), 20), "dev": write(tmp_path / "dev.csv", range(9, 30), 20)}
    messages: list[str] = []
    text = {"max_length": 12, "long": "windows", "overlap": 4}
    changed = with_(config, data=data, text=text, options={"pooling": "mean_max"}, epochs=10)
    result = finetune(changed, report=messages.append)
    assert result.metrics["dev"]["accuracy"] >= 0.9
    assert any("transformers has no such head" in message for message in messages)
    model, tokenizer, task = load_task(result.folder, "cpu")
    assert model.config.extra["classifier_pooling"] == "mean_max"
    lines = [json.loads(line) for line in (Path(result.folder) / "predictions.dev.jsonl").read_text().splitlines()]
    table = Table({"text": [line["input"]["text"] for line in lines]})
    predictions = predict(model, task, tokenizer, table, {"text": "text"})
    expected = [list(line["prediction"]["scores"].values()) for line in lines]
    # The same model; float32 sums in batches of other sizes may differ by a few eps (1.2e-7) of a logit.
    assert np.allclose([list(one["scores"].values()) for one in predictions], expected, atol=1e-5)
    _, loading = transformers.BertForSequenceClassification.from_pretrained(
        result.folder, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert "bert.pooler.dense.weight" in loading["missing_keys"]
    theirs = transformers.BertForSequenceClassification.from_pretrained(config.model, num_labels=2)
    with pytest.raises(ValueError, match=r"model does not support .*mean_max"):
        finetune(with_(changed, overwrite=True), model=theirs, report=quiet)


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_a_result_is_fine_tuned_again_with_another_head(pooling: str, config: FinetuneConfig, tmp_path: Path) -> None:
    first = finetune(with_(config, options={"pooling": "mean_max"}, steps=2), report=quiet)
    messages: list[str] = []
    changed = with_(
        config, model=first.folder, options={"pooling": pooling}, steps=2, output_dir=str(tmp_path / "again")
    )
    again = finetune(changed, report=messages.append)
    assert any(f"for pooling mean_max, expected {pooling}; the head is initialized" in text for text in messages)
    assert again.model.classifier.weight.shape == (2, 32)
    messages.clear()
    small = {"model": again.folder, "steps": 1, "optimizer": {"lr": 1e-9}}
    kept = finetune(with_(changed, output_dir=str(tmp_path / "kept"), **small), report=messages.append)
    # One step of AdamW moves a weight by lr, 1e-9; an eps of weights of up to 0.7 is 8e-8.
    assert torch.allclose(kept.model.classifier.weight, again.model.classifier.weight, atol=1e-6)
    assert not any("initialized" in text for text in messages), "the same task and pooling keep the head"
    other = with_(
        changed, task="multi-label", options={"pooling": pooling}, output_dir=str(tmp_path / "other"), **small
    )
    moved = finetune(other, report=messages.append)
    assert any("a head for the task classification; the head is initialized" in text for text in messages)
    assert not torch.allclose(moved.model.classifier.weight, again.model.classifier.weight, atol=1e-3)


def test_augmentation_applies_only_in_training(config: FinetuneConfig) -> None:
    changed = with_(config, augment={"delete": 0.1, "swap": 0.3, "mask": 0.05})
    augmented, plain = (Finetuner([TaskRun(settings, report=quiet)]) for settings in (changed, config))
    ours, expected = ([list(one.input_ids) for one in x.task_runs[0].dev_examples] for x in (augmented, plain))
    assert ours == expected
    epochs = [
        [list(one.input_ids) for _, batch in batches for one in batch] for _, batches in islice(augmented.steps(), 10)
    ]
    assert epochs[:5] != epochs[5:]
    assert augmented.total_steps == plain.total_steps
    assert finetune(changed, report=quiet).metrics["dev"]["accuracy"] >= 0.9
