"""Keywords of from_pretrained and save_pretrained: as in transformers, or refused by name; none reaches config.json."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub.errors
import pytest
import torch
import transformers

import bert_fast
from bert_fast import BertConfig, BertModel
from bert_fast.models.files import Source
from bert_fast.models.settings import NEVER_WRITTEN, OTHER_SETTINGS
from tests.models.conftest import SMALL

HEADS = [name for name in bert_fast.__all__ if name.startswith(("Bert", "Electra")) and name != "BertConfig"]
SECRET = "hf_secret"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint of every model class."""
    root = tmp_path_factory.mktemp("heads")
    for name in HEADS:
        kind = getattr(bert_fast, name)
        settings = {**SMALL, "model_type": "electra", "embedding_size": 16} if name.startswith("Electra") else SMALL
        kind(BertConfig.from_dict(settings)).save_pretrained(root / name)
    return {name: root / name for name in HEADS}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"num_labls": 3}, "unexpected keyword 'num_labls'; did you mean 'num_labels'?"),
        ({"hidden_dropout": 0.2}, "'hidden_dropout'; did you mean 'hidden_dropout_prob'?"),
        ({"torch_dtyp": "float16"}, "'torch_dtyp'; did you mean 'torch_dtype'?"),
        ({"qqq": 1}, "'qqq'; it is neither an argument nor a setting of this model"),
        ({"use_auth_token": SECRET}, "does not support use_auth_token=a value; expected None (pass token)"),
        ({"proxies": {"http": f"http://me:{SECRET}@proxy"}}, "does not support proxies=a value"),
        ({"trust_remote_code": True}, "does not support trust_remote_code=True"),
        ({"attn_implementation": "sdpa"}, "bert_fast.use_impl chooses"),
        ({"output_loading_info": True}, "does not support output_loading_info=True"),
        ({"use_safetensors": False}, "allow_pickle=True reads"),
        ({"quantization": 1}, "unexpected keyword 'quantization'"),
        ({"strict": "no"}, "strict is 'no'; expected True or False"),
        ({"revision": 3}, "revision is of type int; expected str or None"),
        ({"cache_dir": 3}, "cache_dir is of type int"),
        ({"local_files_only": "yes"}, "local_files_only is of type str; expected bool"),
        ({"subfolder": None}, "subfolder is of type NoneType; expected str"),
        ({"dtype": 16}, "dtype is of type int; expected a torch.dtype"),
        ({"device_map": {"bert": "cpu", "classifier": "cpu"}}, "a model is never split"),
        ({"config": 3}, "config is of type int; expected a BertConfig"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_keyword_is_named(folders: dict[str, Path], name: str, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as error:
        getattr(bert_fast, name).from_pretrained(folders[name], **keywords)
    assert message in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("name", HEADS)
def test_keywords_of_the_hub_are_never_written(folders: dict[str, Path], name: str, tmp_path: Path) -> None:
    keywords = {"token": SECRET, "revision": "v1", "cache_dir": tmp_path, "local_files_only": True}
    harmless = {"trust_remote_code": False, "use_safetensors": True, "low_cpu_mem_usage": True, "device_map": "auto"}
    model = getattr(bert_fast, name).from_pretrained(folders[name], **keywords, force_download=True, **harmless)
    model.save_pretrained(tmp_path / "again")
    written = (tmp_path / "again" / "config.json").read_text()
    assert json.loads(written) == json.loads((folders[name] / "config.json").read_text())
    assert SECRET not in written
    assert SECRET not in repr(model.base_model.source)
    assert SECRET.encode() not in pickle.dumps(model)


def test_what_an_older_release_wrote_is_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = json.loads((folders["BertModel"] / "config.json").read_text())
    stray = {"token": SECRET, "device_map": "auto", "revision": "v1", "my_note": "kept"}
    stray |= dict.fromkeys(["auth_token", "hf_token", "HF_TOKEN", "hub_token", "api_key", "password"], SECRET)
    config = BertConfig.from_dict({**settings, **stray})
    assert config.extra == {"my_note": "kept"}
    config.extra |= {"token": SECRET, "access_token": SECRET}
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {**settings, "my_note": "kept"}
    assert not NEVER_WRITTEN & OTHER_SETTINGS


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16", "torch.float64", torch.float64, "auto"])
@pytest.mark.parametrize("keyword", ["dtype", "torch_dtype"])
def test_dtype_by_both_names(folders: dict[str, Path], keyword: str, dtype: Any) -> None:
    model = BertModel.from_pretrained(folders["BertModel"], **{keyword: dtype})
    expected = {"auto": torch.float32}.get(dtype, dtype)
    expected = getattr(torch, expected.removeprefix("torch.")) if isinstance(expected, str) else expected
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.extra == {}


def test_dtypes_that_contradict_or_are_none(folders: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float16 and torch_dtype.* is torch.float32"):
        BertModel.from_pretrained(folders["BertModel"], dtype=torch.float16, torch_dtype=torch.float32)
    for dtype in ("int8", "banana", torch.int64):
        with pytest.raises(ValueError, match="expected float32, float64"):
            BertModel.from_pretrained(folders["BertModel"], dtype=dtype)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), {"": "cpu"}, None, "auto"], ids=str)
def test_the_device_of_a_model(folders: dict[str, Path], device: Any) -> None:
    expected = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
    assert BertModel.from_pretrained(folders["BertModel"], device_map=device).device.type == expected


@pytest.mark.parametrize("device", ["balanced", "meta", "cuda:99", 99])
def test_a_device_that_is_not_there(folders: dict[str, Path], device: Any) -> None:
    with pytest.raises(ValueError, match="device"):
        BertModel.from_pretrained(folders["BertModel"], device_map=device)


def test_settings_that_transformers_accepts_replace_those_of_the_file(folders: dict[str, Path]) -> None:
    """Each changes our model's configuration as it changes that of transformers."""
    folder = folders["BertForSequenceClassification"]
    for settings in (
        {"num_labels": 3},
        {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}},
        {"hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2, "classifier_dropout": 0.4},
        {"layer_norm_eps": 1e-6},
        {"problem_type": "multi_label_classification", "num_labels": 4},
        {"output_hidden_states": True},
        {"use_cache": False},
    ):
        kwargs: Any = {**settings, "ignore_mismatched_sizes": True}
        ours = bert_fast.BertForSequenceClassification.from_pretrained(folder, **kwargs).config
        theirs = transformers.BertForSequenceClassification.from_pretrained(folder, **kwargs).config
        for name in ours.to_dict().keys() & theirs.to_dict().keys() - {"dtype", "architectures"}:
            assert getattr(ours, name, ours.extra.get(name)) == getattr(theirs, name), (settings, name)


@pytest.mark.parametrize(
    ("model_type", "good", "bad"),
    [
        ("distilbert", {"dim": 24, "n_heads": 3, "dropout": 0.2, "qa_dropout": 0.3}, {"embedding_size": 8}),
        ("electra", {"embedding_size": 8, "summary_last_dropout": 0.2}, {"n_layers": 2}),
        ("bert", {"hidden_size": 24}, {"embedding_size": 8}),
        ("roberta", {"type_vocab_size": 1}, {"dim": 3}),
    ],
)
def test_settings_are_those_of_the_architecture(model_type: str, good: dict[str, Any], bad: dict[str, Any]) -> None:
    config = BertConfig.from_dict({"model_type": model_type}, **good)
    assert good.items() <= config.to_dict().items()
    with pytest.raises(TypeError, match=f"unexpected keyword '{next(iter(bad))}'"):
        BertConfig.from_dict({"model_type": model_type}, **bad)


def test_a_config_from_elsewhere(folders: dict[str, Path]) -> None:
    folder = folders["BertModel"]
    theirs = transformers.BertConfig.from_pretrained(folder, hidden_dropout_prob=0.25)
    for config in (theirs, BertConfig.from_pretrained(folder, hidden_dropout_prob=0.25)):
        assert BertModel.from_pretrained(folder, config=config).config.hidden_dropout_prob == 0.25
        changed = BertModel.from_pretrained(folder, config=config, layer_norm_eps=1e-6).config
        assert (changed.hidden_dropout_prob, changed.layer_norm_eps) == (0.25, 1e-6)
        assert config.layer_norm_eps == 1e-12
        with pytest.raises(TypeError, match="'layer_norm_epz'; did you mean 'layer_norm_eps'"):
            BertModel.from_pretrained(folder, config=config, layer_norm_epz=1e-6)
    for path in (folder, str(folder)):
        assert BertModel.from_pretrained(folder, config=path).config.hidden_size == SMALL["hidden_size"]


def test_a_subfolder(folders: dict[str, Path]) -> None:
    folder = folders["BertModel"]
    model = BertModel.from_pretrained(folder.parent, subfolder="BertModel")
    assert torch.equal(model.embeddings.LayerNorm.weight, BertModel.from_pretrained(folder).embeddings.LayerNorm.weight)
    assert BertConfig.from_pretrained(folder.parent, subfolder="BertModel") == model.config
    with pytest.raises(FileNotFoundError, match=r"absent has no config\.json"):
        BertModel.from_pretrained(folder.parent, subfolder="absent")


def test_the_hub_is_asked_as_transformers_asks_it(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, filename: str, **options: Any) -> str:
        asked.append({"name": name, "filename": filename, **options})
        if not (path := folders["BertModel"] / filename).exists():
            raise huggingface_hub.errors.EntryNotFoundError(filename)
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    options = {"revision": "v1", "token": SECRET, "cache_dir": tmp_path, "local_files_only": True}
    options |= {"subfolder": "encoder", "force_download": True}
    BertModel.from_pretrained("someone/model", **options)
    files = ("config.json", "model.safetensors", "modules.json")
    assert asked == [{"name": "someone/model", "filename": file, **options} for file in files]
    asked.clear()
    BertModel.from_pretrained("someone/model", token=False)
    assert asked[0] == {"name": "someone/model", "filename": "config.json", "token": False}
    asked.clear()
    BertModel.from_pretrained("someone/model")
    assert asked[0] == {"name": "someone/model", "filename": "config.json"}


def test_a_source_names_itself_without_its_token() -> None:
    source = Source("someone/model", subfolder="a", token=SECRET)
    assert str(source) == "someone/model/a"
    assert pickle.loads(pickle.dumps(source)).token is None


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"push_to_hub": True}, "does not support push_to_hub=True"),
        ({"safe_serialization": False}, "does not support safe_serialization=False"),
        ({"max_shard_size": "1MB"}, "does not support max_shard_size='1MB'"),
        ({"token": SECRET}, "does not support token=a value"),
        ({"state_dic": {}}, "unexpected keyword 'state_dic'; did you mean 'state_dict'?"),
        ({"is_main_process": 0}, "is_main_process is 0; expected True or False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keywords_of_save_pretrained(
    folders: dict[str, Path], tmp_path: Path, name: str, keywords: dict[str, Any], message: str
) -> None:
    model = getattr(bert_fast, name).from_pretrained(folders[name])
    with pytest.raises(TypeError) as error:
        model.save_pretrained(tmp_path / "out", **keywords)
    assert message in str(error.value)
    assert SECRET not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_save_pretrained_of_another_state_dict(folders: dict[str, Path], tmp_path: Path) -> None:
    model = BertModel.from_pretrained(folders["BertModel"])
    doubled = {name: 2 * x for name, x in model.state_dict().items()}
    model.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()
    model.save_pretrained(tmp_path, state_dict=doubled, safe_serialization=True)
    again = BertModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], x) for name, x in doubled.items())
    with pytest.raises(ValueError, match="state_dict and the model's differ in pooler"):
        model.save_pretrained(tmp_path, state_dict={k: x for k, x in doubled.items() if "pooler" not in k})


def test_transformers_trainer_is_refused_when_it_is_constructed(folders: dict[str, Path], tmp_path: Path) -> None:
    """It would save a state_dict that nobody can load; with `fuse` it works (tests/integrations/test_tools.py)."""
    arguments = transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    for name in HEADS:
        model = getattr(bert_fast, name).from_pretrained(folders[name])
        with pytest.raises(TypeError, match=rf"can't save and resume bert_fast's {name}: use bert_fast\.fuse"):
            transformers.Trainer(model=model, args=arguments)
        ids = torch.ones(1, 2, 3, dtype=torch.int64) if "Choice" in name else torch.ones(1, 3, dtype=torch.int64)
        with pytest.raises(TypeError, match=r"num_items_in_batch \(transformers' Trainer needs .*use bert_fast\.fuse"):
            model(input_ids=ids, num_items_in_batch=3)


def test_prefixes_of_wrappers_are_ignored(folders: dict[str, Path], caplog: pytest.LogCaptureFixture) -> None:
    from bert_fast.models import to_hf

    model = bert_fast.BertForSequenceClassification.from_pretrained(folders["BertForSequenceClassification"])
    stored = to_hf(model.state_dict())
    for prefix in ("module.", "_orig_mod.", "model.", "base_model.model.", "module._orig_mod.", "_orig_mod.module."):
        other = bert_fast.BertForSequenceClassification(model.config)
        with caplog.at_level(logging.INFO, logger="bert_fast"):
            other.load_hf({prefix + name: x for name, x in stored.items()})
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in other.state_dict().items()), prefix
        assert "of every tensor's name in the checkpoint is ignored" in caplog.text
    other = bert_fast.BertForSequenceClassification(model.config)
    other.load_hf({name.replace("encoder.", "encoder._orig_mod."): x for name, x in stored.items()})
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in other.state_dict().items())


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_another_model_is_never_a_random_one(folders: dict[str, Path], strict: bool) -> None:
    from bert_fast.models import to_hf

    model = BertModel.from_pretrained(folders["BertModel"])
    stored = to_hf(model.state_dict())
    foreign = {f"h.{number}.weight": torch.zeros(3) for number in range(40)}
    expected = r"none of the encoder's tensors, such as embeddings\.word_embeddings\.weight: it has "
    for tensors, rest in (
        (foreign, r"h\.0\.weight, h\.1\.weight, h\.10\.weight and 37 more$"),
        ({}, "no tensor at all"),
        ({f"net.{name}": x for name, x in stored.items()}, r"its names begin with 'net\.': remove that"),
        ({"loss": torch.zeros(1), **{f"model.{k}": x for k, x in stored.items()}}, r"begin with 'model\.'"),
        (
            {"encoder.layer.0.lora_A.weight": torch.zeros(2)},
            "of a PEFT adapter: save the result of its merge_and_unload",
        ),
    ):
        with pytest.raises(ValueError, match=f"{expected}.*{rest}"):
            model.load_hf(tensors, strict=strict)


def test_errors_list_three_names_and_warnings_every_random_tensor(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    from bert_fast.models import to_hf

    model = BertModel.from_pretrained(folders["BertModel"])
    stored = {name: x for name, x in to_hf(model.state_dict()).items() if "layer.1" not in name}
    with pytest.raises(ValueError, match="the checkpoint does not fit the model") as error:
        model.load_hf(stored)
    assert str(error.value).count("encoder.layer.1") == 3
    assert "and 13 more" in str(error.value)
    model.load_hf(stored, strict=False)
    assert caplog.text.count("encoder.layer.1") == 16
    assert "newly initialized" in caplog.text
    assert 0.0 < model.encoder.layer[1].output.dense.weight.std().item() < 0.05
    with pytest.raises(ValueError, match="and 26 more") as error:
        BertModel.from_pretrained(folders["BertModel"], hidden_size=96)
    assert str(error.value).count("expected") == 3


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.float8_e4m3fn], ids=str)
def test_quantized_weights_are_refused(folders: dict[str, Path], dtype: torch.dtype) -> None:
    from bert_fast.models import to_hf

    model = BertModel.from_pretrained(folders["BertModel"])
    stored = to_hf(model.state_dict())
    stored["pooler.dense.weight"] = stored["pooler.dense.weight"].to(dtype)
    with pytest.raises(ValueError, match=r"pooler\.dense\.weight is .* in the checkpoint; expected one of float16"):
        model.load_hf(stored)
