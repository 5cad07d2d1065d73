"""The pretraining recipes state what `benchmarks.reports.recipes` computes, and their phases fit together."""

from __future__ import annotations

import pytest
import yaml

from benchmarks.reports.recipes import RECIPES, Estimate, recipes
from bert_fast._config import from_mapping
from bert_fast.pretrain.config import PretrainConfig

ESTIMATES = recipes()


def config(name: str) -> PretrainConfig:
    recipe: PretrainConfig = from_mapping(PretrainConfig, yaml.safe_load((RECIPES / f"{name}.yaml").read_text()))
    return recipe


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_recipe_states_tokens_memory_and_estimated_hours(name):
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "\n".join(ESTIMATES[name].lines()) in text, "copy the output of python -m benchmarks.reports.recipes"
    assert config(name).accumulation % 8 == 0, "a step of the recipe can be shared by 8 GPUs"
    assert ESTIMATES[name].memory < 141e9, "an H200 has 141 GB"


@pytest.mark.parametrize("name", [name.removesuffix("-phase2") for name in ESTIMATES if name.endswith("-phase2")])
def test_a_second_phase_starts_from_the_first(name):
    first, second = config(f"{name}-phase1"), config(f"{name}-phase2")
    assert second.model.init_from == f"{first.output_dir}/final"
    assert (first.data.seq_len, second.data.seq_len) == (128, 512)
    assert second.data.folder == first.data.folder
    assert second.model.size == first.model.size


@pytest.mark.parametrize(
    ("recipe", "prepared_by"),
    [
        ("bert-base-modern", "english"),
        ("bert-large-phase1", "english"),
        ("bert-base-chinese-wwm", "chinese"),
        ("bert-base-domain", "domain"),
    ],
)
def test_a_recipe_reads_what_its_preparation_writes(recipe, prepared_by):
    prepared = yaml.safe_load((RECIPES / f"{prepared_by}-prepare.yaml").read_text())
    assert config(recipe).data.folder == prepared["output"]


def test_the_arithmetic_by_hand():
    # BERT-base, S = 128: 3 x (12 x (24 x 768^2 + 4 x 128 x 768) + 0.15 x (2 x 768^2 + 2 x 768 x 30522)) = 545 MFLOP.
    estimate = ESTIMATES["bert-base-phase1"]
    assert estimate.flops == pytest.approx(545e6, rel=2e-3)
    assert estimate.tokens == 900_000 * 32_768
    # 545e6 x 29.5e9 / 316e12 / 3600
    assert estimate.hours == pytest.approx(14.1, abs=0.05)
    assert Estimate(10, 100, 1000.0, 790e12 * 0.4 * 3.6, 0.0).hours == pytest.approx(1.0)
