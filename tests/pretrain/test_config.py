"""Configurations: checks, nested mappings, and which settings may change when a run resumes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from bert_fast._config import from_mapping
from bert_fast.optim.config import OptimizerOptions
from bert_fast.pretrain.config import DataOptions, ModelOptions, PretrainConfig, check_resumable


def config(**changes: Any) -> PretrainConfig:
    return PretrainConfig(**{"output_dir": "out", "data": DataOptions("data"), "steps": 100, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": None}, "neither of steps and epochs given"),
        ({"epochs": 1}, "both of steps and epochs given"),
        ({"steps": 0}, "steps is 0; expected at least 1"),
        ({"accumulation": 0}, "accumulation is 0; expected at least 1"),
        ({"output_dir": ""}, "output_dir is empty"),
        ({"precision": "fp16"}, "precision is 'fp16'; expected one of fp32, bf16"),
        ({"keep_last": -1}, "keep_last is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**63}, r"seed is 9223372036854775808; expected at most 2\*\*63 - 1"),
        ({"timeout": float("inf")}, "timeout is inf; expected a finite number"),
        ({"timeout": 1e300}, r"timeout is 1e\+300; expected seconds, more than 0 and at most 1e9"),
        ({"explosion": float("nan")}, "explosion is nan; expected a finite number"),
        ({"explosion": float("inf")}, "explosion is inf; expected a finite number"),
        ({"max_skips": 0}, "max_skips is 0; expected at least 1"),
        ({"optimizer": OptimizerOptions(warmup_steps=100)}, "warmup_steps is 100 of 100 steps"),
    ],
)
def test_invalid_run_configs_raise(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (OptimizerOptions, {"name": "sgd"}, "name is 'sgd'; expected one of adamw, lamb"),
        (OptimizerOptions, {"lr": 0.0}, "lr is 0.0; expected a positive number"),
        (OptimizerOptions, {"lr": float("nan")}, "lr is nan"),
        *(
            (OptimizerOptions, {name: value}, f"{name} is {value}; expected a finite number")
            for name in ("lr", "eps", "weight_decay", "max_grad_norm", "warmup_steps")
            for value in (float("nan"), float("inf"), -float("inf"))
        ),
        *(
            (OptimizerOptions, {name: -0.5}, f"{name} is -0.5; expected")
            for name in ("lr", "eps", "weight_decay", "max_grad_norm", "warmup_steps")
        ),
        (OptimizerOptions, {"lr": 1e39}, r"lr is 1e\+39; expected a positive number of float32"),
        (OptimizerOptions, {"lr": 1e-50}, r"lr is 1e-50; expected a positive number of float32"),
        (OptimizerOptions, {"eps": 1e-50}, r"eps is 1e-50; expected a positive number of float32"),
        (OptimizerOptions, {"betas": (0.9, float("nan"))}, r"betas is \(0.9, nan\); expected a finite number"),
        (OptimizerOptions, {"warmup_steps": 1.5}, "warmup_steps is 1.5; expected whole steps, or a fraction"),
        (OptimizerOptions, {"betas": (0.9, 1.0)}, "betas is"),
        (ModelOptions, {"size": "huge"}, "size is 'huge'; expected one of tiny, mini"),
        (ModelOptions, {"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
        (ModelOptions, {"config": "a", "init_from": "b"}, "model.config and model.init_from are both given"),
        (DataOptions, {"folder": ""}, "data.folder is empty"),
        (DataOptions, {"folder": "f", "token_budget": 64}, "token_budget is 64, below seq_len = 128"),
        (DataOptions, {"folder": "f", "max_span": 0}, "max_span is 0; expected 1 to 1000 words"),
        (DataOptions, {"folder": "f", "span_p": 0.0}, "span_p is 0.0; expected more than 0 and less than 1"),
        (DataOptions, {"folder": "f", "mask_prob": 0.0}, "mask_prob is 0.0; expected more than 0"),
        (DataOptions, {"folder": "f", "mask_token_prob": 0.95}, r"mask_token_prob \+ random_token_prob is 1.05"),
    ],
)
def test_invalid_option_groups_raise(kind: type, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**changes)


def test_warm_up_as_steps_and_as_a_fraction() -> None:
    assert config(optimizer=OptimizerOptions(warmup_steps=7)).warmup(100) == 7
    assert config(optimizer=OptimizerOptions(warmup_steps=0.06)).warmup(250) == 15
    assert config(optimizer=OptimizerOptions(warmup_steps=0)).warmup(100) == 0
    assert config(steps=1).warmup(1) == 0
    with pytest.raises(ValueError, match="warmup_steps is 50 of 20 steps"):
        config(steps=None, epochs=1, optimizer=OptimizerOptions(warmup_steps=50)).warmup(20)


def test_from_mapping_round_trips_and_rejects_unknown_names() -> None:
    before = config(optimizer=OptimizerOptions(betas=(0.8, 0.95)), accumulation=3)
    values = asdict(before)
    values["optimizer"]["betas"] = [0.8, 0.95]  # as YAML and JSON have it
    assert from_mapping(PretrainConfig, values) == before
    with pytest.raises(ValueError, match="OptimizerOptions has no learning_rate; it has name, lr"):
        from_mapping(PretrainConfig, {**values, "optimizer": {"learning_rate": 1.0}})


def test_resuming_accepts_only_changes_that_keep_the_run() -> None:
    before = asdict(config())
    with pytest.raises(ValueError, match=r"belongs to another run \(data.seq_len 128 -> 64, seed 0 -> 1\)"):
        check_resumable(before, asdict(config(seed=1, data=DataOptions("data", seq_len=64))))
    changed = check_resumable(before, asdict(config(steps=200, data=DataOptions("moved"), log_interval=1)))
    assert changed == {"steps": (100, 200), "log_interval": (10, 1)}
