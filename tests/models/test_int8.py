"""Checkpoints of quantized models: what is written, what is read, what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor

import bert_fast
from bert_fast.models import int8
from bert_fast.models.int8 import Int8Linear

SIZES = {
    "vocab_size": 60,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}
FAMILIES = ["bert", "roberta", "distilbert", "electra"]
HEADS = ["BertModel", "BertForMaskedLM", "BertForSequenceClassification", "BertForTokenClassification"]


def config(model_type: str = "bert") -> bert_fast.BertConfig:
    pad = {"pad_token_id": 1} if model_type == "roberta" else {}
    names = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"}
    names["intermediate_size"] = "hidden_dim"
    sizes = {names.get(name, name): x for name, x in SIZES.items()} if model_type == "distilbert" else SIZES
    return bert_fast.BertConfig.from_dict({**sizes, **pad, "model_type": model_type})


def quantized(name: str = "BertModel", model_type: str = "bert", **options: Any) -> Any:
    torch.manual_seed(0)
    return bert_fast.quantize(getattr(bert_fast, name)(config(model_type)).eval(), **options)


def output(model: Any) -> Tensor:
    ids = torch.arange(5, 23).view(2, 9)
    with torch.no_grad():
        return next(x for x in model(input_ids=ids).to_tuple() if isinstance(x, Tensor))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("name", HEADS)
def test_a_loaded_model_has_the_bits_of_the_saved_one(
    name: str, model_type: str, calibrated: bool, tmp_path: Path, poisoned_empty: None
) -> None:
    calibration = [torch.arange(5, 25).view(2, 10)] if calibrated else None
    model = quantized(name, model_type, calibration=calibration)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    layers, expected = int8.int8_layers(loaded), int8.int8_layers(model)
    assert layers.keys() == expected.keys()
    assert len(layers) == 8
    for layer, other in zip(layers.values(), expected.values(), strict=True):
        for buffer in ("values", "scale", "sums", "bias", "input_range"):
            x, y = getattr(layer, buffer), getattr(other, buffer)
            assert (x is None and y is None) or (x.dtype == y.dtype and torch.equal(x, y)), buffer
    assert torch.equal(output(loaded), output(model))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.base_model.parameters())
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    for file in ("model.safetensors", "config.json"):
        assert (again / file).read_bytes() == (tmp_path / file).read_bytes()


def test_the_files(tmp_path: Path) -> None:
    """A layer's weight is a byte a value, with its scale, and no float weight of it is left; config.json says so."""
    model = quantized("BertForSequenceClassification", limit=64)
    model.save_pretrained(tmp_path)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    linears = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    for layer in range(2):
        for linear in (*linears, "intermediate.dense", "output.dense"):
            prefix = f"bert.encoder.layer.{layer}.{linear}"
            assert f"{prefix}.weight" not in stored
            assert stored[f"{prefix}.weight_int8"].dtype == torch.int8
            assert stored[f"{prefix}.weight_scale"].dtype == torch.float32
            assert stored[f"{prefix}.weight_scale"].shape == stored[f"{prefix}.weight_int8"].shape[:1]
            assert f"{prefix}.input_range" not in stored
    key = stored["bert.encoder.layer.1.attention.self.key.weight_int8"]
    assert torch.equal(key, model.bert.encoder.layer[1].attention.self.qkv.values[64:128])
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"] == {
        "method": "bert_fast",
        "bits": 8,
        "largest_weight": 64,
        "activations": "by token",
    }


def test_a_quantized_model_and_a_float_one_replace_each_other(tmp_path: Path) -> None:
    """config.json describes the weights beside it, whatever model its settings came from."""
    model = quantized()
    model.save_pretrained(tmp_path)
    float_model = bert_fast.BertModel(bert_fast.BertModel.from_pretrained(tmp_path).config).eval()
    float_model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded = bert_fast.BertModel.from_pretrained(tmp_path)
    assert not int8.int8_layers(loaded)
    assert torch.equal(output(loaded), output(float_model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_leaves_scales_and_sums_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    model = quantized(calibration=[torch.arange(5, 25).view(2, 10)])
    model.save_pretrained(tmp_path)
    for converted in (copy.deepcopy(model).to(dtype), bert_fast.BertModel.from_pretrained(tmp_path, dtype=dtype)):
        assert output(converted).dtype == dtype
        for name, layer in int8.int8_layers(converted).items():
            expected: Any = model.get_submodule(name)
            assert layer.bias.dtype == dtype
            for buffer in ("values", "scale", "sums", "input_range"):
                assert torch.equal(getattr(layer, buffer), getattr(expected, buffer)), (name, buffer)


def test_another_head_is_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    quantized("BertForMaskedLM").save_pretrained(tmp_path)
    model = bert_fast.BertForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert output(model).shape == (2, 5)
    assert "newly initialized" in caplog.text
    assert len(int8.int8_layers(model)) == 8


def test_weights_that_this_cpu_would_saturate_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantized(limit=127).save_pretrained(tmp_path / "127")
    quantized(limit=64).save_pretrained(tmp_path / "64")
    monkeypatch.setattr(int8, "weight_limit", lambda: 64)
    expected = output(bert_fast.BertModel.from_pretrained(tmp_path / "64"))
    assert torch.equal(output(quantized(limit=64)), expected)
    with pytest.raises(
        ValueError,
        match=r"127: the INT8 weight of encoder.layer.0.attention.self.qkv has values up to "
        r"127 in magnitude, and this CPU multiplies up to 64 exactly; .*quantize\(model, limit=64\)",
    ):
        bert_fast.BertModel.from_pretrained(tmp_path / "127")


def rewrite(folder: Path, change: Any) -> None:
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    change(stored)
    safetensors.torch.save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


KEY = "encoder.layer.1.attention.self.key"
DAMAGES = {
    "no scale": (
        lambda stored: [stored.pop(f"encoder.layer.{layer}.output.dense.weight_scale") for layer in range(2)],
        r"lacks encoder\.layer\.0\.output\.dense\.weight_scale",
    ),
    "no bias": (lambda stored: stored.pop("encoder.layer.1.output.dense.bias"), r"lacks .*output\.dense\.bias"),
    "no key": (lambda stored: stored.pop(f"{KEY}.weight_int8"), r"lacks .*self\.key\.weight_int8; expected query, key"),
    "one range alone": (
        lambda stored: stored.update({f"{KEY}.input_range": torch.zeros(2)}),
        r"lacks .*\.input_range; expected query, key and value",
    ),
    "ranges of one layer": (
        lambda stored: stored.update({"encoder.layer.1.output.dense.input_range": torch.zeros(2)}),
        r"lacks .*\.input_range",
    ),
    "a float weight": (
        lambda stored: stored.update({f"{KEY}.weight": torch.zeros(64, 64)}),
        r"self\.key\.weight|lacks .*weight",
    ),
    "float values": (
        lambda stored: stored.update({"encoder.layer.0.output.dense.weight_int8": torch.zeros(64, 128)}),
        r"output\.dense\.weight_int8 is float32 in the checkpoint; expected int8",
    ),
    "other shape": (
        lambda stored: stored.update({"encoder.layer.0.output.dense.weight_scale": torch.ones(63)}),
        r"weight_scale is \(63,\), expected \(64,\)",
    ),
    "float16 scales": (
        lambda stored: stored.update({f"{KEY}.weight_scale": stored[f"{KEY}.weight_scale"].half()}),
        r"layer\.1\.attention\.self\.key\.weight_scale is float16 in the checkpoint; expected float32",
    ),
    "bool values": (  # concatenated with the query's, they would be int8
        lambda stored: stored.update({f"{KEY}.weight_int8": stored[f"{KEY}.weight_int8"].bool()}),
        r"self\.key\.weight_int8 is bool in the checkpoint; expected int8",
    ),
    "a NaN scale": (
        lambda stored: stored[f"{KEY}.weight_scale"][5:].fill_(float("nan")),
        r"layer\.1\.attention\.self\.key\.weight_scale\[5\] is nan in the checkpoint; expected a finite number of at "
        r"least 0",
    ),
    "a negative scale": (
        lambda stored: stored["encoder.layer.0.output.dense.weight_scale"][63:].neg_(),
        r"layer\.0\.output\.dense\.weight_scale\[63\] is -0\.\d+ in the checkpoint; expected a finite",
    ),
    "an infinite scale": (
        lambda stored: stored["encoder.layer.0.output.dense.weight_scale"][:1].fill_(float("inf")),
        r"output\.dense\.weight_scale\[0\] is inf",
    ),
    "scales of two dimensions": (
        lambda stored: stored.update({"encoder.layer.0.output.dense.weight_scale": torch.ones(64, 1)}),
        r"weight_scale is \(64, 1\), expected \(64,\)",
    ),
    "transposed values": (
        lambda stored: stored.update({"encoder.layer.0.output.dense.weight_int8": torch.ones(128, 64).char()}),
        r"weight_int8 is \(128, 64\), expected \(64, 128\)",
    ),
    "-128": (
        lambda stored: stored["encoder.layer.0.output.dense.weight_int8"].fill_(-128),
        r"has values up to 128 in magnitude",
    ),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints_are_refused(damage: str, strict: bool, tmp_path: Path) -> None:
    """Also with strict=False: an INT8 layer has no initial value."""
    change, message = DAMAGES[damage]
    if damage == "a float weight" and not strict:
        message = r"lacks"
    quantized().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        bert_fast.BertModel.from_pretrained(tmp_path, strict=strict)


def test_ranges_of_one_input_that_differ_are_refused(tmp_path: Path) -> None:
    quantized(calibration=[torch.arange(5, 25).view(2, 10)]).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda stored: stored[f"{KEY}.input_range"].add_(1))
    with pytest.raises(ValueError, match="differ; expected the range of one input"):
        bert_fast.BertModel.from_pretrained(tmp_path)


DENSE_RANGE = "encoder.layer.1.output.dense.input_range"
RANGES = {
    "inverted": ([2.0, -1.0], r"is \[2\.0, -1\.0\] in the checkpoint; expected the lowest input first"),
    "NaN": ([0.0, float("nan")], r"\[1\] is nan in the checkpoint; expected a finite number"),
    "infinite": ([-float("inf"), 1.0], r"\[0\] is -inf in the checkpoint; expected a finite number"),
    "three numbers": ([0.0, 1.0, 2.0], r"is \(3,\), expected \(2,\)"),
    "a scalar": (1.0, r"is \(\), expected \(2,\)"),
}


@pytest.mark.parametrize("damage", RANGES)
def test_damaged_ranges_are_refused(damage: str, tmp_path: Path) -> None:
    values, message = RANGES[damage]
    quantized(calibration=[torch.arange(5, 25).view(2, 10)]).save_pretrained(tmp_path)
    rewrite(tmp_path, lambda stored: stored.update({DENSE_RANGE: torch.tensor(values)}))
    with pytest.raises(ValueError, match=rf"layer\.1\.output\.dense\.input_range ?{message}"):
        bert_fast.BertModel.from_pretrained(tmp_path)


def test_constant_inputs_and_weights_of_zero_are_loaded(tmp_path: Path) -> None:
    """A range without extent and a scale of zero are what a calibration and a quantization can give."""
    model = quantized(calibration=[torch.arange(5, 25).view(2, 10)])
    layer = model.encoder.layer[1].output.dense
    layer.input_range.fill_(0.5)
    layer.scale[3] = 0.0
    model.save_pretrained(tmp_path)
    assert torch.equal(output(bert_fast.BertModel.from_pretrained(tmp_path)), output(model))


def test_folders_saved_with_a_quant_method_are_loaded(tmp_path: Path) -> None:
    model = quantized()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"]["quant_method"] = settings["quantization_config"].pop("method")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert torch.equal(output(bert_fast.BertModel.from_pretrained(tmp_path)), output(model))


@pytest.mark.parametrize("value", [{"bits": 8}, {"quant_method": "bert_fast", "bits": 4}, {"quant_method": "awq"}, "x"])
def test_other_quantizations_are_refused(value: Any, tmp_path: Path) -> None:
    quantized().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": value}))
    with pytest.raises(ValueError, match=r"quantization_config is .*not supported"):
        bert_fast.BertModel.from_pretrained(tmp_path)


def test_half_calibrated_models_are_not_saved(tmp_path: Path) -> None:
    model = quantized(calibration=[torch.arange(5, 25).view(2, 10)])
    layer = model.encoder.layer[0].output.dense
    assert isinstance(layer, Int8Linear)
    layer.input_range = None
    with pytest.raises(ValueError, match="some INT8 layers of the model are calibrated and some are not"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


@pytest.mark.parametrize("name", ["BertModel", "AutoModel", "AutoModelForMaskedLM"])
def test_transformers_refuses_the_folder(name: str, tmp_path: Path) -> None:
    """It would initialize the encoder at random, with a warning, if config.json named a method that it doesn't know."""
    quantized().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quant_method"):
        getattr(transformers, name).from_pretrained(tmp_path)
    assert transformers.AutoConfig.from_pretrained(tmp_path).hidden_size == 64  # as tokenizers read it


def test_transformers_reports_the_encoders_weights_as_missing(tmp_path: Path) -> None:
    """It must not read bytes as if they were weights: their names are no weights' names."""
    quantized().save_pretrained(tmp_path)
    kinds = {key for key in safetensors.torch.load_file(tmp_path / "model.safetensors") if "encoder" in key}
    model = transformers.BertModel(transformers.BertConfig(**SIZES))
    weights = {name for name, _ in model.named_parameters() if name.startswith("encoder") and name.endswith("weight")}
    assert kinds & weights == {name for name in weights if "LayerNorm" in name}
