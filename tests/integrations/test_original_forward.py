"""Unsupported calls and decoders run transformers' own forward, to the bit, with one warning per reason."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import bert_fast
from bert_fast.integrations.bert import is_fused

FOUR = transformers.__version__ < "5"
SMALL = {
    "vocab_size": 61,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "initializer_range": 0.15,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
B, S = 3, 13
# float64 (eps 2.2e-16): two layers, with sums of up to 80 terms, differ by at most 3e-15 of 1 + |value|.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def make(name: str = "BertModel", **settings: Any) -> Any:
    torch.manual_seed(0)
    return getattr(transformers, name)(transformers.BertConfig(**SMALL, **settings)).double().eval()


def twins(name: str = "BertModel", **settings: Any) -> Any:
    """A fused model and its unfused twin."""
    return bert_fast.fuse(make(name, **settings)), make(name, **settings)


def ids_of(columns: int = S) -> Tensor:
    return torch.randint(0, 61, (B, columns), generator=torch.Generator().manual_seed(3))


def without_warning(model: Any, **inputs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return model(**inputs)


def assert_equal(actual: Any, expected: Any) -> None:
    """The same fields, equal to the bit; caches are not compared."""
    assert list(actual) == list(expected)
    for key, value in expected.items():
        if key != "past_key_values":
            parts = [x if isinstance(x, tuple) else (x,) for x in (actual[key], value)]
            assert all(torch.equal(x, y) for x, y in zip(*parts, strict=True)), key


def _hooked(model: Any) -> None:
    model.encoder.layer[1].register_forward_hook(lambda _module, _args, out: None)


STATES = torch.randn(B, 5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LEFT = torch.ones(B, S, dtype=torch.int64).index_fill(1, torch.arange(4), 0)
# transformers 5 takes masks of (B, 1, S, S), transformers 4 those of (B, S, S).
BLOCK = torch.ones(B, S, S).tril().long() if FOUR else torch.ones(B, 1, S, S).tril().bool()
FALLBACKS: dict[str, tuple[dict[str, Any], dict[str, Any], Any, str]] = {
    "attentions": ({"attn_implementation": "eager"}, {"output_attentions": True}, None, "output_attentions"),
    "mask of every pair": ({}, {"attention_mask": BLOCK}, None, r"attention_mask is not"),
    "soft mask": ({}, {"attention_mask": torch.rand(B, S).double()}, None, "attention_mask has values other"),
    "padding first": ({}, {"attention_mask": LEFT}, None, "pooler reads a padding token"),
    "head mask": ({}, {"head_mask": torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)}, None, "argument head_mask"),
    "head mask of layers": ({}, {"head_mask": torch.eye(2, 3, dtype=torch.float64)}, None, "argument head_mask"),
    "encoder states": ({}, {"encoder_hidden_states": STATES}, None, "argument encoder_hidden_states"),
    "layer hook": ({}, {}, _hooked, r"encoder\.layer\.1"),
    "decoder": ({}, {"use_cache": True}, lambda m: setattr(m.config, "is_decoder", True), "is_decoder"),
}


@pytest.mark.parametrize("case", FALLBACKS)
def test_unsupported_calls_run_the_original_and_warn_once(case: str) -> None:
    settings, arguments, change, warning = FALLBACKS[case]
    ours, theirs = twins(**settings)
    for model in (ours, theirs):
        if change is not None:
            change(model)
    inputs = {"input_ids": ids_of(), **arguments}
    with pytest.warns(UserWarning, match=warning):
        actual = ours(**inputs)
    expected = theirs(**inputs)
    assert_equal(actual, expected)
    assert_equal(without_warning(ours, **inputs), expected)
    # transformers 5 has no head masks and reads a soft mask's values as ones.
    if case == "mask of every pair" or (FOUR and "mask" in case):
        assert not torch.allclose(expected[0], theirs(inputs["input_ids"])[0])


def test_a_cache_is_passed_to_the_original() -> None:
    ours, theirs = twins()
    caches = [transformers.DynamicCache(config=model.config) for model in (ours, theirs)]
    with pytest.warns(UserWarning, match="argument past_key_values"):
        actual = ours(ids_of(), past_key_values=caches[0])
    assert_equal(actual, theirs(ids_of(), past_key_values=caches[1]))


def test_a_decoder_with_cross_attention_is_not_fused() -> None:
    settings = {"is_decoder": True, "add_cross_attention": True}
    decoder, theirs = make("BertLMHeadModel", **settings), make("BertLMHeadModel", **settings)
    with pytest.warns(UserWarning, match="does not change the BertModel at 'bert', because is_decoder is True"):
        bert_fast.fuse(decoder)
    assert not is_fused(decoder.bert)
    inputs = {"input_ids": ids_of(), "encoder_hidden_states": STATES, "labels": ids_of(), "use_cache": True}
    assert_equal(without_warning(decoder, **inputs), theirs(**inputs))


def test_a_model_that_becomes_a_decoder_after_fuse_decodes() -> None:
    """Cross attention and a growing cache, in float32: transformers 4 overflows on a float64 cache."""

    def build(*, fused: bool) -> Any:
        model = make(is_decoder=True, add_cross_attention=True).float()
        for name in ("is_decoder", "add_cross_attention"):
            setattr(model.config, name, False)
        if fused:
            assert is_fused(bert_fast.fuse(model))
        for name in ("is_decoder", "add_cross_attention"):
            setattr(model.config, name, True)
        return model

    def decode(model: Any) -> tuple[Tensor, Tensor]:
        context = {"encoder_hidden_states": STATES.float(), "encoder_attention_mask": torch.ones(B, 5).long()}
        first = model(ids_of()[:, :9], **context, use_cache=True)
        second = model(ids_of()[:, 9:10], **context, past_key_values=first.past_key_values, use_cache=True)
        return first.last_hidden_state, second.last_hidden_state

    theirs = build(fused=False)
    with pytest.warns(UserWarning, match="is_decoder is True") as messages:
        actual = decode(build(fused=True))
    assert len([message for message in messages if "bert_fast" in str(message.message)]) == 1
    expected = decode(theirs)
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    assert expected[1].shape == (B, 1, 48)


@pytest.mark.filterwarnings("ignore:Version v4.12.0:FutureWarning")  # given with every loss
def test_of_an_encoder_decoder_pair_only_the_encoder_is_fused() -> None:
    def build() -> Any:
        decoder = make("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
        return transformers.EncoderDecoderModel(encoder=make(), decoder=decoder).eval()

    theirs, ours = build(), build()
    with pytest.warns(UserWarning, match=r"does not change the BertModel at 'decoder\.bert'"):
        bert_fast.fuse(ours)
    assert is_fused(ours.encoder)
    assert not is_fused(ours.decoder.bert)
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[0, 9:] = 0
    mask[2, 3:] = 0
    inputs = {"input_ids": ids_of(), "attention_mask": mask, "decoder_input_ids": ids_of(6), "labels": ids_of(6)}
    results = []
    for run, model in ((without_warning, ours), (lambda m, **k: m(**k), theirs)):
        out = run(model, **inputs)
        out.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": out.loss.detach(), "logits": out.logits.detach(), **grads})
    assert results[0].keys() == results[1].keys()
    for key, value in results[1].items():
        torch.testing.assert_close(results[0][key], value, **EXACT, msg=lambda text, key=key: f"{key}: {text}")


def test_hidden_states_after_the_original_forward_installed_its_hooks() -> None:
    ours, theirs = twins(attn_implementation="eager")
    ids = ids_of()
    with pytest.warns(UserWarning, match="output_attentions"):
        ours(ids, output_attentions=True, output_hidden_states=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        actual = ours(ids, output_hidden_states=True)
    for x, y in zip(actual.hidden_states, theirs(ids, output_hidden_states=True).hidden_states, strict=True):
        torch.testing.assert_close(x, y, **EXACT)


def test_export_runs_the_original() -> None:
    ours, theirs = (model.float() for model in twins())
    ids, mask = ids_of(), torch.ones(B, S, dtype=torch.int64)
    with pytest.warns(UserWarning, match="being exported"):
        program = torch.export.export(ours, (ids, mask), strict=False)
    assert not [node for node in program.graph.nodes if "bert_fast" in str(node.target)]
    torch.testing.assert_close(program.module()(ids, mask).last_hidden_state, theirs(ids, mask).last_hidden_state)
