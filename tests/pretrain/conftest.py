"""Fixtures of the pretraining tests: settings of a run that takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bert_fast.optim.config import OptimizerOptions
from bert_fast.pretrain.config import DataOptions, ModelOptions, PretrainConfig


@pytest.fixture
def make_config(tmp_path: Path, prepared: Path, tiny_config: Path) -> Callable[..., PretrainConfig]:
    """`make_config(steps=6, ...)`: settings of a run of the tiny model in `tmp_path / "run"`."""

    def make(**settings: Any) -> PretrainConfig:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "run"),
            "data": DataOptions(str(prepared), seq_len=32, token_budget=128),
            "model": ModelOptions(config=str(tiny_config)),
            "optimizer": OptimizerOptions(lr=1e-3),
            "ceiling": False,
            "tensorboard": False,
            "progress": False,
        }
        return PretrainConfig(**{**defaults, **settings})

    return make
