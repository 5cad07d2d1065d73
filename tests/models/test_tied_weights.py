"""Tied weights: stored under either name, under both, or under both with different values, as in transformers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import bert_fast
from bert_fast import BertConfig, BertForMaskedLM, BertModel
from bert_fast.models.family import ARCHITECTURES
from tests.models.conftest import randomise

WORD, DECODER = "embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"
DECODERS = {
    "bert": DECODER,
    "roberta": "lm_head.decoder.weight",
    "xlm-roberta": "lm_head.decoder.weight",
    "camembert": "lm_head.decoder.weight",
    "distilbert": "vocab_projector.weight",
    "electra": "generator_lm_head.weight",
}
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
}
IDS = torch.arange(2, 14).view(2, 6)


def save(model_type: str, folder: Path, **settings: Any) -> Any:
    """Transformers' masked-LM model of an architecture, in float64, saved to `folder`."""
    architecture = ARCHITECTURES[model_type]
    extra = {"embedding_size": 24} if model_type == "electra" else {}
    names = architecture.settings
    config = getattr(transformers, f"{architecture.prefix}Config")(
        **{names.get(name, name): value for name, value in {**SIZES, **extra, **settings}.items()}
    )
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{architecture.prefix}ForMaskedLM")(config)
    randomise(model)
    model = model.double().eval()
    model.save_pretrained(folder)
    return model


def edit(folder: Path, change: Any) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(IDS).logits
    return out


def assert_same(ours: Any, theirs: Any) -> None:
    # float64 (eps 2.2e-16): two layers of sums of up to 80 terms, off by at most 1e-13 of values of about 10.
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("model_type", DECODERS)
def test_stored_under_the_decoders_name_only(model_type: str, tmp_path: Path) -> None:
    theirs = save(model_type, tmp_path)
    word, decoder = f"{ARCHITECTURES[model_type].base}.{WORD}", DECODERS[model_type]
    edit(tmp_path, lambda tensors: {decoder if name == word else name: x for name, x in tensors.items()})
    assert_same(BertForMaskedLM.from_pretrained(tmp_path, dtype="auto"), theirs)
    again = getattr(transformers, f"{ARCHITECTURES[model_type].prefix}ForMaskedLM").from_pretrained(tmp_path)
    assert_same(again.double(), theirs)  # the yardstick
    table = theirs.get_input_embeddings().weight
    for name in ("BertModel", "BertForTokenClassification", "BertForQuestionAnswering"):
        model = getattr(bert_fast, name).from_pretrained(tmp_path, dtype="auto")
        assert torch.equal(model.get_input_embeddings().weight, table), name


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForNextSentencePrediction", "BertForMultipleChoice"])
def test_the_other_heads_read_the_decoders_name(name: str, tmp_path: Path) -> None:
    theirs = transformers.BertForPreTraining(transformers.BertConfig(**SIZES))
    theirs.save_pretrained(tmp_path)
    word = f"bert.{WORD}"
    edit(tmp_path, lambda tensors: {DECODER if key == word else key: x for key, x in tensors.items()})
    model = getattr(bert_fast, name).from_pretrained(tmp_path, dtype="auto")
    assert torch.equal(model.get_input_embeddings().weight, theirs.get_input_embeddings().weight)


@pytest.mark.parametrize("model_type", DECODERS)
def test_stored_under_both_names_with_the_same_values(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = save(model_type, tmp_path)
    word, decoder = f"{ARCHITECTURES[model_type].base}.{WORD}", DECODERS[model_type]
    edit(tmp_path, lambda tensors: {**tensors, decoder: tensors[word].clone()})
    model = BertForMaskedLM.from_pretrained(tmp_path, dtype="auto")
    assert caplog.messages == []
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight
    assert_same(model, theirs)


@pytest.mark.parametrize("model_type", DECODERS)
def test_different_values_are_not_tied_with_a_warning(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(model_type, tmp_path / "model")
    word, decoder = f"{ARCHITECTURES[model_type].base}.{WORD}", DECODERS[model_type]
    edit(tmp_path / "model", lambda tensors: {**tensors, decoder: tensors[word] + 0.5})
    kind = getattr(transformers, f"{ARCHITECTURES[model_type].prefix}ForMaskedLM")
    config = BertConfig.from_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING, logger="bert_fast"):
        ours = BertForMaskedLM.from_pretrained(tmp_path / "model", config=config, dtype="auto")
    assert f"{word} and {decoder} differ in the checkpoint, though tie_word_embeddings is True" in caplog.text
    assert (config.tie_word_embeddings, ours.config.tie_word_embeddings) == (True, False)
    theirs = kind.from_pretrained(tmp_path / "model").double()
    if int(transformers.__version__.split(".")[0]) >= 5:  # version 4 ties them
        assert_same(ours, theirs)
    ours.save_pretrained(tmp_path / "ours")
    caplog.clear()
    assert_same(BertForMaskedLM.from_pretrained(tmp_path / "ours", dtype="auto"), ours)
    assert caplog.messages == []
    assert_same(kind.from_pretrained(tmp_path / "ours").double(), ours)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_biases_that_differ_are_not_tied(model_type: str, tmp_path: Path) -> None:
    save(model_type, tmp_path)
    bias = {"bert": "cls.predictions.bias", "roberta": "lm_head.bias"}[model_type]
    decoder_bias = DECODERS[model_type].replace("weight", "bias")
    edit(tmp_path, lambda tensors: {**tensors, decoder_bias: tensors[bias] + 1.0})
    ours = BertForMaskedLM.from_pretrained(tmp_path, dtype="auto")
    assert not ours.config.tie_word_embeddings
    assert torch.equal(ours.cls.predictions.decoder.weight, ours.get_input_embeddings().weight)
    if int(transformers.__version__.split(".")[0]) >= 5:
        kind = getattr(transformers, f"{ARCHITECTURES[model_type].prefix}ForMaskedLM")
        assert_same(ours, kind.from_pretrained(tmp_path).double())


def test_an_untied_model_needs_both(tmp_path: Path) -> None:
    save("bert", tmp_path, tie_word_embeddings=False)
    edit(tmp_path, lambda tensors: {name: x for name, x in tensors.items() if name != DECODER})
    with pytest.raises(ValueError, match=f"it lacks {DECODER}"):
        BertForMaskedLM.from_pretrained(tmp_path)


# The size of the vocabulary

RESIZED = [
    *((name, tie) for name in ("BertForMaskedLM", "BertForPreTraining") for tie in (True, False)),
    *((name, True) for name in ("BertModel", "BertForSequenceClassification", "BertForTokenClassification")),
]


@pytest.mark.parametrize(("rows", "multiple"), [(70, None), (50, None), (62, 8), (None, 64), (61, None), (None, None)])
@pytest.mark.parametrize(("name", "tie"), RESIZED)
def test_resizing_keeps_rows_and_logits_as_in_transformers(
    name: str, tie: bool, rows: int | None, multiple: int | None, tmp_path: Path
) -> None:
    config = transformers.BertConfig(**SIZES, tie_word_embeddings=tie)
    theirs = getattr(transformers, name)(config)
    randomise(theirs)
    theirs = theirs.double().eval()
    theirs.save_pretrained(tmp_path / "before")
    ours = getattr(bert_fast, name).from_pretrained(tmp_path / "before", dtype="auto")
    returned = ours.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
    theirs.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
    assert returned is ours.get_input_embeddings()
    assert ours.config.vocab_size == theirs.config.vocab_size == returned.num_embeddings == returned.weight.shape[0]
    head = ours.get_output_embeddings()
    if head is not None:
        assert (head.weight is returned.weight) == tie
        assert head.out_features == head.weight.shape[0] == head.bias.shape[0] == ours.config.vocab_size
    ours.save_pretrained(tmp_path / "after")
    back, report = getattr(transformers, name).from_pretrained(
        tmp_path / "after", dtype=torch.float64, output_loading_info=True
    )
    assert not any(report.values()), report
    kept = min(61, ours.config.vocab_size)
    expected = theirs.state_dict()
    for key, value in back.state_dict().items():
        assert value.shape == expected[key].shape, key
        if key == "cls.predictions.bias" and not tie:  # which nothing reads; transformers replaces it by the decoder's
            continue
        old = slice(kept) if value.shape[0] == ours.config.vocab_size else slice(None)
        assert torch.equal(value[old], expected[key][old]), key
    with torch.no_grad():
        ours_out, back_out = ours(input_ids=IDS), back(input_ids=IDS)
    for key, value in back_out.items():
        torch.testing.assert_close(ours_out[key], value, rtol=1e-11, atol=1e-11)


def test_new_rows_are_drawn_as_in_transformers() -> None:
    """Near the mean of the old rows, or around zero; a bias gets zeros."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SIZES))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(torch.randn(48))
        model.cls.predictions.bias.fill_(1.0)
    old = model.get_input_embeddings().weight.detach().clone()
    new = model.resize_token_embeddings(1061).weight.detach()[61:]
    # The noise has 1e-9 of the covariance: a standard deviation of 6e-7, and float32 rounds values of about 1.
    torch.testing.assert_close(new, old.mean(0).expand(1000, 48), rtol=0.0, atol=1e-5)
    assert not model.cls.predictions.decoder.bias[61:].any()
    assert bool((model.cls.predictions.decoder.bias[:61] == 1.0).all())
    draws = BertModel(BertConfig(**SIZES)).resize_token_embeddings(1061, mean_resizing=False).weight.detach()[61:]
    # 48,000 draws of standard deviation 0.02: their mean's is 9e-5, and their deviation's 6e-5.
    assert abs(draws.mean().item()) < 5e-4
    assert draws.std().item() == pytest.approx(0.02, abs=4e-4)


def test_noise_of_new_rows_has_the_covariance_of_the_old_ones() -> None:
    """In float64 the noise is visible: correlated where the old rows are."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES)).double()
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        table[:, 1] = 2 * table[:, 0]
    covariance = torch.cov(table.detach().T, correction=0)
    new = model.resize_token_embeddings(20_061).weight.detach()[61:]
    # 20,000 draws: a covariance is off by about 1 / sqrt(10,000) of the variances, here less than 0.002.
    torch.testing.assert_close(torch.cov(new.T) / 1e-9, covariance, rtol=0.0, atol=1e-4)


def test_a_resized_model_trains_and_takes_new_ids() -> None:
    model = BertForMaskedLM(BertConfig(**SIZES, hidden_dropout_prob=0.0)).train()
    with pytest.raises(ValueError, match="input_ids"):
        model(torch.tensor([[1, 64]]))
    model.resize_token_embeddings(61, pad_to_multiple_of=8)
    loss = model(torch.tensor([[1, 62, 63]]), labels=torch.tensor([[-100, 63, 62]])).loss
    loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient.shape == (64, 48)
    assert gradient[62:].abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"new_num_tokens": 0}, ValueError, "new_num_tokens is 0; expected 1 to"),
        ({"new_num_tokens": -5}, ValueError, "new_num_tokens is -5"),
        ({"new_num_tokens": 10**9}, ValueError, "new_num_tokens is 1000000000"),
        ({"new_num_tokens": 70.0}, TypeError, "new_num_tokens is of type float; expected an int"),
        ({"new_num_tokens": True}, TypeError, "new_num_tokens is of type bool"),
        ({"pad_to_multiple_of": 0}, ValueError, "pad_to_multiple_of is 0"),
        ({"pad_to_multiple_of": "8"}, TypeError, "pad_to_multiple_of is of type str"),
        ({"mean_resizing": 1}, TypeError, "mean_resizing is 1; expected True or False"),
        ({"new_num_tokens": 3}, ValueError, "there would be 3 rows and pad_token_id is 5"),
    ],
    ids=str,
)
def test_wrong_sizes_are_named(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    model = BertModel(BertConfig(**SIZES, pad_token_id=5))
    with pytest.raises(kind, match=message):
        model.resize_token_embeddings(**arguments)
    assert model.get_input_embeddings().weight.shape == (61, 48)


@pytest.mark.parametrize("tie", [True, False])
def test_another_table_by_hand(tie: bool, tmp_path: Path) -> None:
    model = BertForMaskedLM(BertConfig(**SIZES, tie_word_embeddings=tie)).double()
    table = torch.nn.Embedding(70, 48, padding_idx=0).double()
    model.set_input_embeddings(table)
    assert model.config.vocab_size == model.bert.config.vocab_size == 70
    model.tie_weights()
    decoder = model.get_output_embeddings()
    assert (decoder.weight is table.weight) == tie
    assert decoder.weight.shape[0] == decoder.bias.shape[0] == decoder.out_features == (70 if tie else 61)
    assert model(torch.tensor([[1, 69]])).logits.shape == (1, 2, decoder.out_features)
    if tie:
        model.save_pretrained(tmp_path)
        assert_same(transformers.BertForMaskedLM.from_pretrained(tmp_path).double().eval(), model.eval())
    with pytest.raises(TypeError, match=r"of type Linear; expected an nn\.Embedding"):
        model.set_input_embeddings(torch.nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the word embedding have 3 values; expected 48"):
        model.set_input_embeddings(torch.nn.Embedding(70, 3))
