"""Checkpoints: transformers loads ours, we load its, and tensors that do not fit are named."""

from __future__ import annotations

import json
import logging
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import bert_fast
from bert_fast import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel
from bert_fast.models import from_hf, to_hf

Pair = Callable[..., tuple[Any, Any]]
MODELS = [name for name in bert_fast.__all__ if name.startswith("Bert") and name != "BertConfig"]
KEY = "encoder.layer.0.attention.self.key.weight"


def inputs_of(name: str) -> dict[str, Tensor]:
    ids = torch.arange(1, 25).view(2, 2, 6) if name == "BertForMultipleChoice" else torch.arange(1, 13).view(2, 6)
    mask = torch.ones_like(ids)
    mask[1, ..., 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_same(outputs: Any, expected: Any, mask: Tensor) -> None:
    for key, value in expected.items():
        real = (slice(None),) if value.shape[:2] != mask.shape else (mask.bool(),)
        # float64 (eps 2.2e-16): the same weights through the same layers, off by at most 5e-15.
        torch.testing.assert_close(
            outputs[key][real], value[real], rtol=1e-11, atol=1e-11, msg=lambda text, key=key: key + text
        )


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite the tensors of a checkpoint."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def saved(pair: Pair, tmp_path: Path) -> Callable[[str], tuple[Any, Path]]:
    """`saved(name)`: transformers' model and the folder that it was saved to."""

    def make(name: str, **settings: Any) -> tuple[Any, Path]:
        _, theirs = pair(name, torch.float64, **settings)
        theirs.save_pretrained(tmp_path / "theirs")
        return theirs, tmp_path / "theirs"

    return make


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_through_both_libraries(saved: Any, tmp_path: Path, name: str, tie: bool) -> None:
    theirs, folder = saved(name, tie_word_embeddings=tie)
    ours = getattr(bert_fast, name).from_pretrained(folder, dtype="auto")
    assert not ours.training
    assert ours.dtype == torch.float64
    inputs = inputs_of(name)
    assert_same(ours(**inputs), theirs(**inputs), inputs["attention_mask"])
    ours.save_pretrained(tmp_path / "ours")
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]
    back, report = getattr(transformers, name).from_pretrained(
        tmp_path / "ours", dtype=torch.float64, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    settings = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert settings["architectures"] == [name]
    assert settings["dtype"] == "float64"


def test_the_names_of_tensors_both_ways(pair: Pair) -> None:
    ours, theirs = pair("BertForPreTraining")
    assert to_hf(ours.state_dict()).keys() == theirs.state_dict().keys()
    packed = from_hf(to_hf(ours.state_dict()))
    assert packed.keys() == ours.state_dict().keys()
    assert all(torch.equal(packed[key], value) for key, value in ours.state_dict().items())


def test_old_names_and_stored_positions_are_read(saved: Any) -> None:
    theirs, folder = saved("BertForMaskedLM")

    def age(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
            for key, value in tensors.items()
        }
        old["cls.predictions.decoder.weight"] = old["bert.embeddings.word_embeddings.weight"].clone()
        old["cls.predictions.decoder.bias"] = old.pop("cls.predictions.bias")
        old["bert.embeddings.position_ids"] = torch.arange(40).unsqueeze(0)
        old["bert.embeddings.token_type_ids"] = torch.zeros(1, 40, dtype=torch.int64)
        return old

    edit(folder, age)
    inputs = inputs_of("BertForMaskedLM")
    ours = BertForMaskedLM.from_pretrained(folder, dtype="auto")
    assert_same(ours(**inputs), theirs(**inputs), inputs["attention_mask"])


def test_a_base_checkpoint_in_a_head_model_names_the_new_head(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    theirs, folder = saved("BertModel")
    with caplog.at_level(logging.WARNING, logger="bert_fast"):
        model = BertForSequenceClassification.from_pretrained(folder, dtype="auto", num_labels=3)
    assert caplog.messages == ["newly initialized, because not in the checkpoint: classifier.bias, classifier.weight"]
    assert_same(
        model.bert(**inputs_of("BertModel")), theirs(**inputs_of("BertModel")), inputs_of("BertModel")["attention_mask"]
    )
    assert model.classifier.weight.shape == (3, 48)
    assert 0.0 < model.classifier.weight.std().item() < 0.05
    assert not model.classifier.bias.any()


def test_a_head_of_another_shape_or_kind_is_newly_initialized(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Where the classifier reads two poolings, its bias fits but is initialized with the weight, which does not."""
    _, folder = saved("BertForSequenceClassification")
    wide = {"extra": {"classifier_pooling": "mean_max"}}
    config = BertConfig.from_pretrained(folder)
    before = BertForSequenceClassification.from_pretrained(folder)
    with caplog.at_level(logging.WARNING, logger="bert_fast"):
        model = BertForSequenceClassification.from_pretrained(
            folder, config=config.replace(**wide), ignore_mismatched_sizes=True
        )
    assert (
        "newly initialized, because the shape in the checkpoint differs: classifier.weight was (2, 48)"
        in caplog.messages
    )
    assert model.classifier.weight.shape == (config.num_labels, 2 * config.hidden_size)
    assert before.classifier.bias.any()
    assert not model.classifier.bias.any()
    again = BertForSequenceClassification.from_pretrained(folder, new_head=True)
    assert torch.equal(again.bert.pooler.dense.weight, before.bert.pooler.dense.weight)
    assert not again.classifier.bias.any()
    with pytest.raises(ValueError, match=r"classifier.weight is .*, expected .*ignore_mismatched_sizes"):
        BertForSequenceClassification.from_pretrained(folder, config=config.replace(**wide))


def test_a_head_checkpoint_in_the_base_model_names_what_it_does_not_use(
    saved: Any, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, folder = saved("BertForMaskedLM")
    with caplog.at_level(logging.WARNING, logger="bert_fast"):
        model = BertModel.from_pretrained(folder, dtype="auto", add_pooling_layer=False)
    (message,) = caplog.messages
    assert message.startswith("in the checkpoint and not used: cls.predictions.bias, cls.predictions.transform.")
    outputs = model(**inputs_of("BertModel"))
    assert outputs.pooler_output is None
    assert_same(outputs, theirs.bert(**inputs_of("BertModel")), inputs_of("BertModel")["attention_mask"])
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="bert_fast"):
        BertModel.from_pretrained(folder)
    assert "not in the checkpoint: pooler.dense.bias, pooler.dense.weight" in caplog.text


def test_a_tensor_missing_from_the_encoder_is_named(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, folder = saved("BertModel")
    edit(folder, lambda tensors: {key: x for key, x in tensors.items() if key != KEY})
    with pytest.raises(ValueError, match=r"lacks encoder\.layer\.0\.attention\.self\.key\.weight"):
        BertModel.from_pretrained(folder)
    bias = "encoder.layer.1.output.dense.bias"
    theirs, folder = saved("BertModel")
    edit(folder, lambda tensors: {key: x for key, x in tensors.items() if key != bias})
    with pytest.raises(ValueError, match=f"lacks {bias}"):
        BertModel.from_pretrained(folder)
    model = BertModel.from_pretrained(folder, strict=False, dtype="auto")
    assert f"not in the checkpoint: {bias}" in caplog.text
    assert not model.encoder.layer[1].output.dense.bias.any()
    assert torch.equal(model.encoder.layer[1].output.dense.weight, theirs.encoder.layer[1].output.dense.weight)


def test_an_incomplete_head_is_an_error(saved: Any) -> None:
    _, folder = saved("BertForSequenceClassification")
    edit(folder, lambda tensors: {key: x for key, x in tensors.items() if key != "classifier.bias"})
    with pytest.raises(ValueError, match=r"lacks classifier\.bias"):
        BertForSequenceClassification.from_pretrained(folder)


def test_an_unexpected_tensor_is_named(saved: Any, caplog: pytest.LogCaptureFixture) -> None:
    _, folder = saved("BertModel")
    edit(folder, lambda tensors: {**tensors, "encoder.adapter.weight": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"unexpected encoder\.adapter\.weight"):
        BertModel.from_pretrained(folder)
    BertModel.from_pretrained(folder, strict=False)
    assert "not used: encoder.adapter.weight" in caplog.text


def test_wrong_shapes_are_named_and_a_head_can_be_newly_initialized(saved: Any) -> None:
    theirs, folder = saved("BertForSequenceClassification", num_labels=3)
    message = r"classifier.bias is \(3,\), expected \(5,\); classifier.weight .* expected \(5, 48\).*ignore_mismatched"
    with pytest.raises(ValueError, match=message):
        BertForSequenceClassification.from_pretrained(folder, num_labels=5)
    model = BertForSequenceClassification.from_pretrained(
        folder, num_labels=5, ignore_mismatched_sizes=True, dtype="auto"
    )
    assert model.classifier.weight.shape == (5, 48)
    assert torch.equal(model.bert.pooler.dense.weight, theirs.bert.pooler.dense.weight)
    with pytest.raises(ValueError, match=r"word_embeddings.weight is \(61, 48\), expected \(60, 48\)"):
        BertForSequenceClassification.from_pretrained(folder, vocab_size=60, ignore_mismatched_sizes=True)


def test_shards_are_read_and_a_missing_one_is_named(saved: Any, pair: Pair) -> None:
    theirs, folder = saved("BertModel")
    theirs.save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink()
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    ours = BertModel.from_pretrained(folder, dtype="auto")
    assert_same(
        ours(**inputs_of("BertModel")), theirs(**inputs_of("BertModel")), inputs_of("BertModel")["attention_mask"]
    )
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"names {shards[0].name}, which is not in the same folder"):
        BertModel.from_pretrained(folder)


def test_pickled_weights_need_allow_pickle(saved: Any) -> None:
    theirs, folder = saved("BertModel")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="allow_pickle=True"):
        BertModel.from_pretrained(folder)
    ours = BertModel.from_pretrained(folder, allow_pickle=True, dtype="auto")
    assert_same(
        ours(**inputs_of("BertModel")), theirs(**inputs_of("BertModel")), inputs_of("BertModel")["attention_mask"]
    )


def test_a_pickle_that_would_run_code_is_refused(saved: Any) -> None:
    _, folder = saved("BertModel")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": print}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"Weights only|weights_only"):
        BertModel.from_pretrained(folder, allow_pickle=True)


def test_a_damaged_file_is_named(saved: Any) -> None:
    _, folder = saved("BertModel")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        BertModel.from_pretrained(folder)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"has no model\.safetensors"):
        BertModel.from_pretrained(folder)


def test_a_save_that_fails_leaves_the_old_files(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = saved("BertModel")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(tensors: dict[str, Tensor], path: Path, **_: Any) -> None:
        path.write_text("half")
        raise OSError("disk full")

    model = BertModel.from_pretrained(folder)
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_dtypes_and_a_given_config(saved: Any) -> None:
    _, folder = saved("BertModel")
    assert BertModel.from_pretrained(folder).dtype == torch.float32
    assert BertModel.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert BertModel.from_pretrained(folder, dtype="float16").dtype == torch.float16
    with pytest.raises(ValueError, match=r"dtype is 'int8'; expected float32, .* or 'auto'"):
        BertModel.from_pretrained(folder, dtype="int8")
    config = BertConfig.from_pretrained(folder, hidden_dropout_prob=0.3)
    assert BertModel.from_pretrained(folder, config=config).embeddings.dropout_p == 0.3


class FakeHub(types.ModuleType):
    """A fake huggingface_hub: the repository "someone/model" is a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.errors = types.ModuleType("huggingface_hub.errors")
        names = ("EntryNotFoundError", "RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError")
        for name in names:
            setattr(self.errors, name, type(name, (Exception,), {}))
        self.errors.LocalEntryNotFoundError = type("LocalEntryNotFoundError", (self.errors.EntryNotFoundError,), {})  # type: ignore[attr-defined]
        self.folder = folder

    _CACHED_NO_EXIST = object()

    def try_to_load_from_cache(self, name: str, filename: str, **_: Any) -> Any:
        """What the hub said before it went offline: "someone/cached" has no other files than the folder."""
        return self._CACHED_NO_EXIST if name == "someone/cached" else None

    def hf_hub_download(self, name: str, filename: str, revision: str | None = None) -> str:
        if name == "someone/cached" and (self.folder / filename).exists():
            return str(self.folder / filename)
        if name in ("someone/offline", "someone/cached"):
            raise self.errors.LocalEntryNotFoundError
        if name != "someone/model" or revision not in (None, "v1"):
            raise self.errors.RepositoryNotFoundError
        if not (self.folder / filename).exists():
            raise self.errors.EntryNotFoundError
        return str(self.folder / filename)


def test_hub_names(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, folder = saved("BertModel")
    hub = FakeHub(folder)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", hub.errors)
    ours = BertModel.from_pretrained("someone/model", revision="v1", dtype="auto")
    assert_same(
        ours(**inputs_of("BertModel")), theirs(**inputs_of("BertModel")), inputs_of("BertModel")["attention_mask"]
    )
    with pytest.raises(FileNotFoundError, match="the hub has no repository of that name"):
        BertModel.from_pretrained("someone/else")
    with pytest.raises(FileNotFoundError, match="the hub can't be reached"):
        BertModel.from_pretrained("someone/offline")
    assert BertModel.from_pretrained("someone/cached").sentence_modules is None
    monkeypatch.setattr(hub, "_CACHED_NO_EXIST", None)  # it was never asked for modules.json
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: "unknown")
    model = BertModel.from_pretrained("someone/cached")
    with pytest.raises(ValueError, match=r"'someone/cached' is .*; its modules\.json is not in the hub's cache"):
        model.encode("a", tokenizer=object())
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"someone/model has no config\.json"):
        BertModel.from_pretrained("someone/model")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="pip install huggingface_hub, or give a folder"):
        BertModel.from_pretrained("someone/model")
