"""The types of settings: numbers of numpy and torch and as text, or an error that names the setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bert_fast._config import from_mapping
from bert_fast.finetune.config import (
    BatchOptions,
    FinetuneConfig,
    FinetuneOptimizer,
    LossSettings,
    MultitaskConfig,
    TableOptions,
    TaskSettings,
)
from bert_fast.optim.config import OptimizerOptions
from bert_fast.pretrain.config import DataOptions, PretrainConfig


def exact(value: Any) -> tuple[type, Any]:
    return type(value), value


@pytest.mark.parametrize("kind", [FinetuneOptimizer, OptimizerOptions])
@pytest.mark.parametrize(
    "value", ["3e-5", " 3e-05 ", np.float64(3e-5), np.array(3e-5), torch.tensor(3e-5, dtype=torch.float64)], ids=repr
)
def test_a_number_of_any_kind(kind: Any, value: Any) -> None:
    assert exact(kind(lr=value).lr) == (float, 3e-5)


@pytest.mark.parametrize(
    "value", [8, 8.0, "8", "8.0", np.int64(8), np.float32(8), np.array(8), torch.tensor(8)], ids=repr
)
def test_an_integer_of_any_kind(value: Any) -> None:
    assert exact(BatchOptions(rows=value, tokens=value).rows) == (int, 8)
    assert exact(BatchOptions(rows=value, tokens=value).tokens) == (int, 8)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(True, True), ("true", True), ("False", False), (np.bool_(True), True), (torch.tensor(False), False)],
    ids=repr,
)
def test_a_bool_of_any_kind(value: Any, expected: bool) -> None:
    assert FinetuneOptimizer(freeze_embeddings=value).freeze_embeddings is expected


def test_sequences_texts_and_groups() -> None:
    for weights in ([1, 2.5], (1, 2.5), np.array([1, 2.5]), torch.tensor([1, 2.5]), ["1", "2.5"]):
        assert LossSettings(class_weights=weights).class_weights == [1, 2.5]  # type: ignore[arg-type]
    assert LossSettings(class_weights={"a": np.float64(2)}).class_weights == {"a": 2.0}
    assert FinetuneOptimizer(betas=["0.8", np.float64(0.9)]).betas == (0.8, 0.9)  # type: ignore[arg-type]
    config = FinetuneConfig(
        "classification",
        Path("m"),
        Path("o"),
        {"train": Path("a.csv"), "max_rows": "7"},
        steps=np.int32(3),  # type: ignore[arg-type]
    )
    assert (config.model, config.output_dir, config.data) == ("m", "o", TableOptions("a.csv", max_rows=7))
    assert exact(config.steps) == (int, 3)
    several = MultitaskConfig({"a": {"task": "regression", "data": {"train": "a.csv"}, "weight": "2"}}, "m", "o")  # type: ignore[dict-item]
    assert several.tasks["a"] == TaskSettings("regression", TableOptions("a.csv"), weight=2.0)


NEEDED = {"task": "classification", "model": "m", "output_dir": "o", "data": {"train": "a"}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr is 'fast'; expected a number"),
        ({"optimizer": {"lr": [1e-3]}}, "optimizer.lr is [0.001]; expected a number"),
        ({"optimizer": {"lr": True}}, "optimizer.lr is True; expected a number"),
        ({"optimizer": {"lr": None}}, "optimizer.lr is None; expected a number"),
        ({"optimizer": {"lr": 1j}}, "optimizer.lr is 1j; expected a number"),
        ({"optimizer": {"lr": np.ones(2)}}, "optimizer.lr is array([1., 1.]); expected a number"),
        ({"optimizer": {"lr": "nan"}}, "optimizer.lr is nan; expected a positive number"),
        ({"optimizer": {"lr": np.float32("inf")}}, "optimizer.lr is inf; expected a positive number"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas is [0.9]; expected 2 numbers"),
        ({"optimizer": {"betas": 0.9}}, "optimizer.betas is 0.9; expected 2 numbers"),
        ({"optimizer": {"eps": float("inf")}}, "optimizer.eps is inf; expected a positive number"),
        ({"optimizer": {"weight_decay": "nan"}}, "optimizer.weight_decay is nan; expected a finite number"),
        ({"optimizer": {"freeze_embeddings": "no"}}, "optimizer.freeze_embeddings is 'no'; expected true or false"),
        ({"optimizer": 3e-5}, "optimizer is 3e-05; expected a mapping or FinetuneOptimizer"),
        ({"batch": {"rows": 2.5}}, "batch.rows is 2.5; expected an integer"),
        ({"batch": {"rows": "many"}}, "batch.rows is 'many'; expected an integer"),
        ({"batch": {"tokens": "9" * 5000}}, "batch.tokens is '9999"),
        ({"batch": {"tokens": []}}, "batch.tokens is []; expected an integer or none"),
        ({"loss": {"class_weights": [1, "heavy"]}}, "loss.class_weights is [1, 'heavy']; expected"),
        ({"loss": {"class_weights": []}}, "loss.class_weights is []; expected positive numbers"),
        ({"data": {"train": 3}}, "data.train is 3; expected text"),
        ({"data": {"train": "a", "names": "b,c"}}, "data.names is 'b,c'; expected a list of texts or none"),
        ({"data": {"train": "a", "columns": ["b"]}}, "data.columns is ['b']; expected a mapping"),
        ({"seed": "one"}, "seed is 'one'; expected an integer"),
        ({"overwrite": "yes"}, "overwrite is 'yes'; expected true or false"),
        ({"epochs": "inf"}, "epochs is inf; expected more than 0"),
        ({"metric": 3}, "metric is 3; expected text or none"),
        ({"precision": 16}, "precision is 16; expected one of fp32, bf16"),
        ({"checkpoint_minutes": -1}, "checkpoint_minutes is -1; expected a finite number, 0 or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_values_are_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError)) as error:
        from_mapping(FinetuneConfig, {**NEEDED, **values})
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 200


def test_pretraining_has_the_same_types() -> None:
    config = PretrainConfig(output_dir="o", data=DataOptions("d", seq_len="64"), steps=np.int64(9))  # type: ignore[arg-type]
    assert exact(config.steps) == (int, 9)
    assert exact(config.data.seq_len) == (int, 64)
    with pytest.raises(TypeError, match="seq_len is 'long'; expected an integer"):
        DataOptions("d", seq_len="long")  # type: ignore[arg-type]
