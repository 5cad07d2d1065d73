"""The trainers of sentence-transformers over a fused model: the losses and weights of the unfused one."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bert_fast
from tests.integrations.test_sentence_training import LOSSES, SIZES, folder, st, texts

__all__ = ["folder"]  # the fixture
modules: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")
ROWS, BATCH = 16, 4


def settings(kind: Any, output: Path) -> Any:
    """Two epochs of four steps, whose losses are logged."""
    return kind(
        output_dir=str(output),
        num_train_epochs=2,
        per_device_train_batch_size=BATCH,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
    )


def trained(trainer: Any) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def data_set(**columns: list[Any]) -> Any:
    return importlib.import_module("datasets").Dataset.from_dict(columns)


def pairs(scored: bool) -> Any:
    columns: dict[str, list[Any]] = {"anchor": texts(1, ROWS), "positive": texts(2, ROWS)}
    if scored:
        columns["score"] = torch.linspace(0, 1, ROWS).tolist()
    return data_set(**columns)


def check(values: list[float], expected: list[float], own: Any, theirs: Any) -> None:
    assert len(values) == 8
    assert values[0] != values[-1]
    # float32, eight steps of AdamW, whose update of a gradient near zero may have either sign: 1e-3 a step at most.
    assert values == pytest.approx(expected, rel=1e-4)
    for x, y in zip(own.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0.0, atol=2e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_the_trainer_of_embeddings(name: str, folder: Path, tmp_path: Path) -> None:
    trainers = importlib.import_module("sentence_transformers")
    theirs = st.SentenceTransformer(
        modules=[modules.Transformer(str(folder)), modules.Pooling(SIZES["hidden_size"])], device="cpu"
    )
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    results = []
    for model in (theirs, ours):
        trainer = trainers.SentenceTransformerTrainer(
            model=model,
            args=settings(trainers.SentenceTransformerTrainingArguments, tmp_path),
            train_dataset=pairs(scored=name == "CoSENT"),
            loss=LOSSES[name](model),
        )
        results.append(trained(trainer))
    assert bert_fast.is_fused(ours)
    check(results[1], results[0], ours, theirs)


def test_the_trainer_of_cross_encoders(folder: Path, tmp_path: Path) -> None:
    package = importlib.import_module("sentence_transformers.cross_encoder")
    losses = importlib.import_module("sentence_transformers.cross_encoder.losses")
    classifier = tmp_path / "classifier"
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, num_labels=1)
    transformers.BertForSequenceClassification(config).save_pretrained(classifier)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(classifier)
    results, models = [], []
    for fused in (False, True):
        model = package.CrossEncoder(str(classifier), device="cpu")
        if fused:
            bert_fast.fuse(model.model)
            assert bert_fast.is_fused(model.model)
        labels = [float(i % 2) for i in range(ROWS)]
        data = data_set(query=texts(1, ROWS), text=texts(2, ROWS), label=labels)
        trainer = package.CrossEncoderTrainer(
            model=model,
            args=settings(package.CrossEncoderTrainingArguments, tmp_path / "run"),
            train_dataset=data,
            loss=losses.BinaryCrossEntropyLoss(model),
        )
        results.append(trained(trainer))
        models.append(model)
    check(results[1], results[0], models[1], models[0])
