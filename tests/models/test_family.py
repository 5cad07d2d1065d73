"""The other architectures, as our models and fused: transformers' outputs, gradients and checkpoints."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor

import bert_fast
from bert_fast import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification, BertModel
from bert_fast.integrations.bert import is_fused
from bert_fast.models import from_hf, to_hf
from bert_fast.models.family import ARCHITECTURES, COMMON_MODELS

BATCH, SEQLEN, PAD = 3, 13, 1
# float64 (eps 2.2e-16): two layers, with sums of up to 80 terms, differ by at most 2e-13 of 1 + |value|.
EXACT = {"rtol": 1e-11, "atol": 1e-11}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "pad_token_id": PAD,
}
SETTINGS = {
    "roberta": {"type_vocab_size": 1},
    "xlm-roberta": {"type_vocab_size": 1},
    "camembert": {"hidden_act": "gelu_new"},  # the masked-LM head keeps the exact GELU
    "distilbert": {"activation": "relu"},
    "electra": {"embedding_size": 32},
}
NO_DROPOUT = ("hidden_dropout_prob", "attention_probs_dropout_prob")
CASES = [(model_type, head) for model_type in SETTINGS for head in COMMON_MODELS]
CASES.append(("electra", "ElectraForPreTraining"))
LABELS = {"ForSequenceClassification": 3, "ForTokenClassification": 3}


def transformers_class(model_type: str, suffix: str) -> Any:
    return getattr(transformers, ARCHITECTURES[model_type].prefix + suffix)


def pair(model_type: str, name: str, **settings: Any) -> tuple[Any, Any]:
    """Ours and transformers' model with the same weights, in float64 and eval mode."""
    suffix = name.removeprefix("Bert").removeprefix("Electra")
    names = ARCHITECTURES[model_type].settings
    values = {**SIZES, **dict.fromkeys(NO_DROPOUT, 0.0), **SETTINGS[model_type], **settings}
    if suffix in LABELS:
        values["num_labels"] = LABELS[suffix]
    config = transformers_class(model_type, "Config")(**{names.get(key, key): value for key, value in values.items()})
    config._attn_implementation = "eager"
    torch.manual_seed(7)
    theirs = transformers_class(model_type, suffix)(config)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape) * (0.15 if parameter.dim() > 1 else 0.3)
            parameter.copy_(noise + (1.0 if "norm" in key.lower() and key.endswith("weight") else 0.0))
    ours = getattr(bert_fast, name)(BertConfig.from_dict(config.to_dict()))
    ours, theirs = ours.double().eval(), theirs.double().eval()
    ours.load_state_dict(from_hf(theirs.state_dict(), ours.hf_names))
    return ours, theirs


def inputs_of(model_type: str, name: str) -> dict[str, Tensor]:
    """A batch with labels, padded on the right; some real tokens are the padding token, one padding token is not."""
    generator = torch.Generator().manual_seed(11)
    shape = (BATCH, 2, SEQLEN) if name == "BertForMultipleChoice" else (BATCH, SEQLEN)
    ids = torch.randint(2, 61, shape, generator=generator)
    mask = torch.ones_like(ids)
    mask[0, ..., 9:] = 0
    ids[0, ..., 9:] = PAD
    ids[1, ..., 4:6] = PAD  # attended to, as without a mask
    mask[2, ..., 12:] = 0  # padding that is not the padding token
    words = torch.randint(0, 61, shape, generator=generator).masked_fill(mask == 0, -100)
    labels = {
        "BertForMaskedLM": {"labels": words},
        "BertForSequenceClassification": {"labels": torch.tensor([2, 0, 1])},
        "BertForTokenClassification": {"labels": torch.where(words < 0, words, words % 3)},
        "ElectraForPreTraining": {"labels": words % 2},
        "BertForMultipleChoice": {"labels": torch.tensor([1, 0, 1])},
    }
    inputs = {"input_ids": ids, "attention_mask": mask}
    if model_type in ("camembert", "electra"):
        inputs["token_type_ids"] = torch.randint(0, 2, shape, generator=generator)
    if name == "BertForQuestionAnswering":  # transformers has padding in the softmax
        inputs["attention_mask"] = torch.ones_like(mask)
        return {**inputs, "start_positions": torch.tensor([1, 3, 99]), "end_positions": torch.tensor([2, 7, 99])}
    return {**inputs, **labels.get(name, {})}


def results(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, outputs and hidden states at the real tokens, and the gradient of every parameter, in our names."""
    out = model(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"].flatten(0, -2).bool()
    outputs = {}
    for key, value in out.items():
        if not key.startswith("mlm_"):
            for index, x in enumerate(value if isinstance(value, tuple) else (value,)):
                outputs[f"{key} {index}"] = x[mask] if x.shape[:2] == mask.shape else x
    loss = out["loss"] if "loss" in out else sum(x.square().sum() for x in outputs.values())
    if isinstance(model, transformers.ElectraForPreTraining):  # whose loss takes the labels in float32
        loss = F.binary_cross_entropy_with_logits(out.logits[mask], inputs["labels"][mask].double())
        outputs["loss 0"] = loss
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters(remove_duplicate=False) if p.grad is not None}
    return {**{key: x.detach() for key, x in outputs.items()}, **{f"d {key}": x for key, x in gradients.items()}}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, **EXACT, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_outputs_losses_and_gradients(model_type: str, name: str) -> None:
    ours, theirs = pair(model_type, name)
    inputs = inputs_of(model_type, name)
    actual, expected = results(ours, inputs), results(theirs, inputs)
    gradients = from_hf({key[2:]: x for key, x in expected.items() if key.startswith("d ")}, ours.hf_names)
    outputs = {key: x for key, x in expected.items() if not key.startswith("d ")}
    assert_same(actual, {**outputs, **{f"d {key}": x for key, x in gradients.items()}})


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_round_trip_through_both_libraries(model_type: str, name: str, tmp_path: Path) -> None:
    _, theirs = pair(model_type, name)
    settings = theirs.config.to_dict()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = getattr(bert_fast, name).from_pretrained(tmp_path / "theirs", dtype="auto")
    inputs = inputs_of(model_type, name)
    with torch.no_grad():
        for key, x in ours(**inputs).items():
            if key != "loss" and not key.startswith("mlm_"):
                mask = inputs["attention_mask"].bool()
                real = mask if x.shape[:2] == mask.shape else ...
                torch.testing.assert_close(x[real], theirs(**inputs)[key][real], **EXACT)
    ours.save_pretrained(tmp_path / "ours")
    names = [load_file(tmp_path / whose / "model.safetensors").keys() for whose in ("ours", "theirs")]
    assert names[0] == names[1]
    back, report = type(theirs).from_pretrained(tmp_path / "ours", dtype=torch.float64, output_loading_info=True)
    assert not any(report.values()), report
    for key, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    changed = {"architectures": [type(theirs).__name__], "dtype": "float64", "_name_or_path": str(tmp_path / "ours")}
    read = back.config.to_dict()
    assert {key: read[key] for key in settings} == {**settings, **changed}
    assert not written.keys() & ARCHITECTURES[model_type].fixed.keys()


def pack(inputs: dict[str, Tensor]) -> dict[str, Any]:
    real = inputs["attention_mask"].bool()
    lengths = real.sum(1)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    packed = {key: x[real] for key, x in inputs.items() if key in ("input_ids", "token_type_ids")}
    return {**packed, "cu_seqlens": ends, "max_seqlen": int(lengths.max())}


@pytest.mark.parametrize("model_type", list(SETTINGS))
def test_packed_input_has_the_same_positions(model_type: str) -> None:
    ours, theirs = pair(model_type, "BertModel")
    inputs = inputs_of(model_type, "BertModel")
    real = inputs["attention_mask"].bool()
    expected = theirs(**inputs).last_hidden_state[real]
    torch.testing.assert_close(ours(**pack(inputs)).last_hidden_state, expected, **EXACT)
    embeds = torch.randn(BATCH, SEQLEN, ours.config.input_size, dtype=torch.float64)
    padded = {"attention_mask": inputs["attention_mask"]}
    hidden = ours(inputs_embeds=embeds, **padded).last_hidden_state[real]
    torch.testing.assert_close(hidden, theirs(inputs_embeds=embeds, **padded).last_hidden_state[real], **EXACT)
    packed = {key: x for key, x in pack(inputs).items() if key in ("cu_seqlens", "max_seqlen")}
    torch.testing.assert_close(ours(inputs_embeds=embeds[real], **packed).last_hidden_state, hidden, **EXACT)


def test_too_many_positions_are_named() -> None:
    ours, _ = pair("roberta", "BertModel")
    ids = torch.full((1, 39), 5)
    with pytest.raises(ValueError, match="39 tokens; expected at most max_position_embeddings - 2 = 38"):
        ours(ids)
    ids[0, 38] = PAD  # padding takes no position: 38 tokens are left
    mask = (ids != PAD).long()
    assert ours(ids, mask).last_hidden_state.shape == (1, 39, 48)
    assert torch.equal(ours(ids, mask).last_hidden_state[:, :38], ours(ids[:, :38]).last_hidden_state)


def test_a_head_of_another_checkpoint_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`classifier.weight` means another tensor in each of the two heads: neither is loaded as the other."""
    tokens, _ = pair("roberta", "BertForTokenClassification")
    tokens.save_pretrained(tmp_path / "tokens")
    with caplog.at_level(logging.WARNING, logger="bert_fast"):
        model = BertForSequenceClassification.from_pretrained(tmp_path / "tokens", num_labels=3, dtype="auto")
    assert "not in the checkpoint: classifier.dense.bias" in caplog.text
    assert "not used: classifier.bias, classifier.weight" in caplog.text
    assert not torch.equal(model.classifier.weight, tokens.classifier.weight)
    model.save_pretrained(tmp_path / "sequences")
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="bert_fast"):
        again = BertForTokenClassification.from_pretrained(tmp_path / "sequences", dtype="auto")
    assert "not in the checkpoint: classifier.bias, classifier.weight" in caplog.text
    assert "not used: classifier.dense.bias" in caplog.text
    assert torch.equal(again.bert.embeddings.word_embeddings.weight, tokens.bert.embeddings.word_embeddings.weight)


@pytest.mark.parametrize("model_type", list(SETTINGS))
def test_an_encoder_alone_goes_into_a_head_and_back(model_type: str, tmp_path: Path) -> None:
    head, theirs = pair(model_type, "BertForMaskedLM")
    theirs.save_pretrained(tmp_path / "head")
    encoder = BertModel.from_pretrained(tmp_path / "head", add_pooling_layer=False, dtype="auto")
    assert all(torch.equal(x, head.bert.state_dict()[key]) for key, x in encoder.state_dict().items())
    encoder.save_pretrained(tmp_path / "encoder")
    again = BertForMaskedLM.from_pretrained(tmp_path / "encoder", dtype="auto")
    assert all(torch.equal(x, again.bert.state_dict()[key]) for key, x in encoder.state_dict().items())


def test_a_head_that_an_architecture_does_not_have_is_refused() -> None:
    config = BertConfig(model_type="roberta", vocab_size=9)
    with pytest.raises(ValueError, match=r"BertForPreTraining exists for bert only.*'roberta'.*BertForMaskedLM"):
        bert_fast.BertForPreTraining(config)
    with pytest.raises(ValueError, match="'gpt2'; expected one of bert, roberta"):
        BertConfig(model_type="gpt2")
    with pytest.raises(ValueError, match=r"pad_token_id is None.*positions of roberta start"):
        BertConfig(model_type="roberta", pad_token_id=None)


def test_the_names_of_tensors_both_ways() -> None:
    for model_type, name in CASES:
        ours, theirs = pair(model_type, name)
        assert to_hf(ours.state_dict(), ours.hf_names).keys() == theirs.state_dict().keys(), (model_type, name)


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_dropouts_of_the_heads(model_type: str, name: str) -> None:
    settings = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.25, "classifier_dropout": 0.3}
    if model_type == "distilbert":
        settings = {**settings, "seq_classif_dropout": 0.4, "qa_dropout": 0.15}
    ours, theirs = pair(model_type, name, **settings)
    base = f"{theirs.base_model_prefix}."
    theirs_p = {
        m.p for key, m in theirs.named_modules() if isinstance(m, torch.nn.Dropout) and not key.startswith(base)
    }
    ours_p = {m.p for m in ours.modules() if isinstance(m, torch.nn.Dropout)}
    if name == "BertModel":
        layer = ours.encoder.layer[0]
        theirs_p = {m.p for m in theirs.modules() if isinstance(m, torch.nn.Dropout)}
        ours_p = {ours.embeddings.dropout_p, layer.attention.self.dropout_p, layer.output.dropout_p}
    assert ours_p - {0.0} == theirs_p


@pytest.mark.parametrize("model_type", list(SETTINGS))
def test_untied_words(model_type: str, tmp_path: Path) -> None:
    ours, theirs = pair(model_type, "BertForMaskedLM", tie_word_embeddings=False)
    ours.save_pretrained(tmp_path)
    back, report = type(theirs).from_pretrained(tmp_path, dtype=torch.float64, output_loading_info=True)
    assert not any(report.values()), report
    inputs = inputs_of(model_type, "BertForMaskedLM")
    torch.testing.assert_close(back(**inputs).loss, ours(**inputs).loss, **EXACT)
    assert not torch.equal(back.get_output_embeddings().weight, back.get_input_embeddings().weight)


def test_distilbert_has_no_token_types() -> None:
    ours, theirs = pair("distilbert", "BertModel")
    inputs = inputs_of("distilbert", "BertModel")
    types = torch.ones_like(inputs["input_ids"])
    actual, expected = ours(**inputs, token_type_ids=types).last_hidden_state, theirs(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(actual[real], expected[real], **EXACT)
    assert ours.embeddings.token_type_embeddings is None


def test_the_discriminator_takes_packed_input_and_ignores_labels() -> None:
    ours, _ = pair("electra", "ElectraForPreTraining")
    inputs = inputs_of("electra", "ElectraForPreTraining")
    real = inputs["attention_mask"].bool()
    expected = ours(**inputs)
    assert not expected.logits[~real].any()
    packed = ours(**pack(inputs), labels=inputs["labels"][real])
    assert torch.equal(packed.logits, expected.logits[real])
    assert torch.equal(packed.loss, expected.loss)
    labels = inputs["labels"][real].clone()
    labels[3:] = -100
    loss = F.binary_cross_entropy_with_logits(packed.logits[:3], labels[:3].double())
    torch.testing.assert_close(ours(**pack(inputs), labels=labels).loss, loss, **EXACT)
    with pytest.raises(ValueError, match="labels has the value 2; expected 0 to 1"):
        ours(**pack(inputs), labels=labels.clamp(min=2))


def test_an_unsupported_summary_is_refused() -> None:
    config = BertConfig.from_dict({"model_type": "electra", "summary_type": "mean"})
    with pytest.raises(ValueError, match="summary_type is 'mean'; ElectraForMultipleChoice supports only 'first'"):
        bert_fast.BertForMultipleChoice(config)


@pytest.mark.parametrize(("model_type", "name"), CASES)
def test_fused(model_type: str, name: str) -> None:
    _, theirs = pair(model_type, name)
    inputs = inputs_of(model_type, name)
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    assert is_fused(ours.base_model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # none of these calls runs transformers' own forward
        actual = results(ours, inputs)
    assert_same(actual, results(theirs, inputs))
    plain = {"input_ids": inputs["input_ids"]}
    full = {"attention_mask": torch.ones_like(inputs["input_ids"])}
    outs = [model(**plain, output_hidden_states=True, return_dict=False) for model in (ours, theirs)]
    flat = [[x for y in out for x in (y if isinstance(y, tuple) else (y,))] for out in outs]
    for one, other in zip(*flat, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    assert type(ours(**plain)) is type(theirs(**plain))
    torch.testing.assert_close(ours(**plain)[0], ours(**plain, **full)[0], **EXACT)
    bert_fast.unfuse(ours)
    assert type(ours.base_model) is type(theirs.base_model)


@pytest.mark.parametrize("model_type", list(SETTINGS))
def test_fused_embeddings_hooks_wrappers_and_copies(model_type: str) -> None:
    _, theirs = pair(model_type, "BertModel", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    inputs = inputs_of(model_type, "BertModel")
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    embeds = torch.randn(BATCH, SEQLEN, theirs.get_input_embeddings().embedding_dim, dtype=torch.float64)
    torch.testing.assert_close(ours(inputs_embeds=embeds)[0], theirs(inputs_embeds=embeds)[0], **EXACT)
    for model in (ours, theirs):
        model.get_input_embeddings().register_forward_hook(twice)
        named = [name for name, _ in model.named_modules() if name.endswith(("layer.1.attention.self.query", "q_lin"))]
        model.set_submodule(named[-1], Doubled(model.get_submodule(named[-1])))
    expected = results(theirs, inputs)
    for one in (ours, pickle.loads(pickle.dumps(ours))):
        assert is_fused(one)
        assert_same(results(one, inputs), expected)
        one.zero_grad()
    ours.train()
    assert not torch.equal(ours(**inputs)[0], ours(**inputs)[0])
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    for _ in range(2):
        ours.zero_grad()
        torch.manual_seed(3)
        runs.append(results(ours, inputs))
        ours.gradient_checkpointing_disable()
    assert_same(*runs)


def twice(_module: torch.nn.Module, _args: Any, out: Tensor) -> Tensor:
    return out * 2


class Doubled(torch.nn.Module):
    """A wrapper like PEFT's."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * self.base_layer(x)
        return out


@pytest.mark.parametrize("model_type", ["roberta", "distilbert", "electra"])
def test_fused_compiles_without_a_break(model_type: str) -> None:
    _, theirs = pair(model_type, "BertForQuestionAnswering", num_hidden_layers=1)
    inputs = inputs_of(model_type, "BertForQuestionAnswering")
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    actual = {key.replace("_orig_mod.", ""): x for key, x in results(compiled, inputs).items()}
    assert_same(actual, results(theirs, inputs))


def test_fused_calls_that_the_kernels_do_not_support() -> None:
    _, theirs = pair("distilbert", "BertModel")
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    inputs = inputs_of("distilbert", "BertModel")
    with pytest.warns(UserWarning, match="output_attentions"):
        actual = ours(**inputs, output_attentions=True)
    assert torch.equal(actual.attentions[0], theirs(**inputs, output_attentions=True).attentions[0])
    ours.transformer.layer[1].register_forward_hook(lambda _module, _args, out: None)
    with pytest.warns(UserWarning, match=r"a module in `transformer\.layer\.1` was replaced, or has a hook"):
        ours(**inputs)


def test_settings_of_other_architectures_are_not_used() -> None:
    config = BertConfig.from_dict({"embedding_size": 32, "n_layers": 3, "vocab_size": 9})
    assert (config.input_size, config.num_hidden_layers) == (768, 12)
    assert BertConfig.from_dict({"model_type": "distilbert", "n_layers": 3}, hidden_size=96).to_dict()["dim"] == 96
    for model_type, architecture in ARCHITECTURES.items():
        theirs = transformers_class(model_type, "Config")()
        ours = BertConfig.from_dict({"model_type": model_type})
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "pad_token_id", "layer_norm_eps"):
            if name not in architecture.fixed:
                assert getattr(ours, name) == getattr(theirs, name), (model_type, name)
        assert ours.extra.items() <= theirs.to_dict().items()
