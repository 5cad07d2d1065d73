"""BertConfig: transformers' names, defaults and file; contradictions are named."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from bert_fast import BertConfig, BertForPreTraining, BertModel

NOT_IN_TRANSFORMERS = {"extra"}


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = BertConfig(), transformers.BertConfig()
    for item in fields(BertConfig):
        if item.name not in NOT_IN_TRANSFORMERS:
            assert getattr(ours, item.name) == getattr(theirs, item.name), item.name


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": 100, "num_attention_heads": 12}, ["hidden_size is 100", "num_attention_heads is 12"]),
        ({"hidden_act": "gleu"}, ["hidden_act is 'gleu'", "gelu_new"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers is -1"]),
        ({"vocab_size": 0}, ["vocab_size is 0"]),
        ({"intermediate_size": 3.5}, ["intermediate_size is 3.5"]),
        ({"hidden_dropout_prob": 1.0}, ["hidden_dropout_prob is 1.0"]),
        ({"attention_probs_dropout_prob": -0.1}, ["attention_probs_dropout_prob is -0.1"]),
        ({"layer_norm_eps": 0.0}, ["layer_norm_eps is 0.0"]),
        ({"pad_token_id": 7, "vocab_size": 7}, ["pad_token_id is 7", "vocab_size is 7"]),
        ({"problem_type": "ranking"}, ["problem_type is 'ranking'", "regression"]),
        ({"num_labels": 3, "id2label": {0: "a", 1: "b"}}, ["num_labels is 3", "id2label has 2"]),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, ["num_labels is 1"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_contradictions_are_named(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (each message is checked below)
        BertConfig(**settings)  # type: ignore[arg-type]
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    "setting",
    [
        {"is_decoder": True},
        {"add_cross_attention": True},
        {"position_embedding_type": "relative_key"},
        {"pruned_heads": {"0": [1]}},
        {"model_type": "gpt2"},
        {"quantization_config": {"bits": 8}},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_unsupported_models_are_refused(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is "):
        BertConfig.from_dict(setting)


def test_numpy_scalars_become_numbers_and_what_json_has_not_is_named(tmp_path: Path) -> None:
    config = BertConfig(num_labels=np.int64(3), hidden_dropout_prob=np.float32(0.25), vocab_size=np.int32(9))  # type: ignore[arg-type]
    config.save_pretrained(tmp_path)
    assert (
        BertConfig.from_pretrained(tmp_path)
        == config
        == BertConfig(num_labels=3, hidden_dropout_prob=0.25, vocab_size=9)
    )
    assert BertConfig(id2label={np.int64(0): "a", np.int64(1): "b"}).id2label == {0: "a", 1: "b"}  # type: ignore[dict-item]
    for value in ({1, 2}, torch.float32):
        with pytest.raises(ValueError, match="can't be written as JSON"):
            BertConfig(extra={"mine": value}).save_pretrained(tmp_path)
    circular: dict[str, Any] = {}
    circular["again"] = circular
    with pytest.raises(ValueError, match="can't be written as JSON"):
        BertConfig(extra=circular).save_pretrained(tmp_path)


@pytest.mark.parametrize("config", [None, "bert-base-uncased", {"vocab_size": 9}, transformers.BertConfig()], ids=type)
def test_a_model_takes_a_bert_config_only(config: Any) -> None:
    with pytest.raises(TypeError, match=f"config is of type {type(config).__name__}; expected a BertConfig"):
        BertModel(config)


def test_the_model_checks_a_config_that_was_changed() -> None:
    config = BertConfig.size("tiny", vocab_size=9)
    config.num_attention_heads = 3
    with pytest.raises(ValueError, match="num_attention_heads is 3"):
        BertModel(config)


def test_labels_follow_from_each_other() -> None:
    assert BertConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    named = BertConfig(id2label={0: "no", 1: "yes", 2: "maybe"})
    assert (named.num_labels, named.label2id) == (3, {"no": 0, "yes": 1, "maybe": 2})
    assert BertConfig(label2id={"no": 0, "yes": 1}).id2label == {0: "no", 1: "yes"}
    assert BertConfig.from_dict(named.to_dict(), num_labels=5).num_labels == 5
    assert named.replace(num_labels=2).id2label == {0: "LABEL_0", 1: "LABEL_1"}


def test_round_trip_keeps_unused_settings(tmp_path: Path) -> None:
    config = BertConfig.from_dict({"num_labels": 3, "use_cache": False, "my_note": "kept", "transformers_version": "4"})
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["my_note"] == "kept"
    assert written["use_cache"] is False
    assert "transformers_version" not in written
    assert BertConfig.from_pretrained(tmp_path) == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_transformers_reads_our_file_and_we_read_its(tmp_path: Path) -> None:
    settings = {"vocab_size": 99, "hidden_size": 96, "id2label": {0: "a", 1: "b", 2: "c"}, "hidden_act": "relu"}
    BertConfig(**settings, problem_type="single_label_classification").save_pretrained(tmp_path / "ours")  # type: ignore[arg-type]
    theirs = transformers.BertConfig.from_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours = BertConfig.from_pretrained(tmp_path / "theirs")
    for name in (*settings, "problem_type", "num_labels", "label2id", "layer_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_a_file_that_is_not_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        BertConfig.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        BertConfig.from_pretrained(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        BertConfig.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="expected an object"):
        BertConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("size", ["tiny", "mini", "small", "medium", "base", "large"])
def test_parameter_counts_equal_transformers(size: str) -> None:
    config = BertConfig.size(size)
    with torch.device("meta"):
        ours = BertForPreTraining(config)
        theirs = transformers.BertForPreTraining(transformers.BertConfig(**_sizes(config)))
    assert ours.num_parameters() == theirs.num_parameters()
    assert ours.bert.num_parameters() == theirs.bert.num_parameters()
    published = {"base": 110_106_428, "large": 336_226_108}
    assert ours.num_parameters() == published.get(size, ours.num_parameters())


def _sizes(config: BertConfig) -> dict[str, int]:
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return {name: getattr(config, name) for name in names}


def test_an_unknown_size_is_named() -> None:
    with pytest.raises(ValueError, match=r"'huge'; expected one of tiny, .*large"):
        BertConfig.size("huge")
