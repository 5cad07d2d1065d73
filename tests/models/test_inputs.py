"""Packed and padded input: the same tokens give the same bits, empty batches work, errors name the wrong input."""

from __future__ import annotations

from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import bert_fast
from bert_fast import BertConfig, BertForMaskedLM, BertForPreTraining, BertModel
from bert_fast.models import BertPreTrainedModel

CONFIG = BertConfig.size("tiny", vocab_size=50, max_position_embeddings=70, num_labels=2)
LENGTHS = [7, 1, 64, 0, 12]
HEADS = [name for name in bert_fast.__all__ if name.startswith("BertFor")]


@pytest.fixture(scope="module")
def model() -> BertPreTrainedModel:
    torch.manual_seed(1)
    return BertModel(CONFIG).eval()


def pack(lengths: list[int]) -> dict[str, Any]:
    T = sum(lengths)
    return {
        "input_ids": torch.randint(0, 50, (T,)),
        "token_type_ids": torch.randint(0, 2, (T,)),
        "cu_seqlens": torch.tensor([0, *lengths]).cumsum(0).int(),
        "max_seqlen": max(lengths, default=0),
    }


def pad_right(packed: dict[str, Any], lengths: list[int], seqlen: int) -> dict[str, Tensor]:
    padded = {name: torch.zeros(len(lengths), seqlen, dtype=torch.int64) for name in ("input_ids", "token_type_ids")}
    mask = torch.zeros(len(lengths), seqlen, dtype=torch.int64)
    start = 0
    for row, length in enumerate(lengths):
        for name, x in padded.items():
            x[row, :length] = packed[name][start : start + length]
        mask[row, :length] = 1
        start += length
    return {**padded, "attention_mask": mask}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "dropout"])
def test_packed_equals_padded_to_the_bit(model: BertModel, training: bool) -> None:
    packed = pack(LENGTHS)
    padded = pad_right(packed, LENGTHS, 66)
    results = []
    try:
        model.train(training)
        for inputs in (packed, padded):
            torch.manual_seed(3)
            model.zero_grad()
            out = model(**inputs)
            (out.last_hidden_state.square().sum() + out.pooler_output.sum()).backward()
            results.append((out, {name: p.grad.clone() for name, p in model.named_parameters()}))
    finally:
        model.eval()
    (from_packed, gradients), (from_padded, other_gradients) = results
    real = padded["attention_mask"].bool()
    assert torch.equal(from_packed.last_hidden_state, from_padded.last_hidden_state[real])
    assert not from_padded.last_hidden_state[~real].any()
    assert torch.equal(from_packed.pooler_output, from_padded.pooler_output)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


@pytest.mark.parametrize("side", ["alone", "right", "left"])
def test_a_sequence_is_the_same_however_it_is_padded(model: BertModel, side: str) -> None:
    packed = pack(LENGTHS)
    expected = model(**packed).last_hidden_state[8:72]  # the sequence of 64
    ids, types = packed["input_ids"][8:72].unsqueeze(0), packed["token_type_ids"][8:72].unsqueeze(0)
    left = 5 if side == "left" else 0
    right = 5 if side == "right" else 0
    mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
    output = model(
        torch.nn.functional.pad(ids, (left, right)),
        mask if side != "alone" else None,
        torch.nn.functional.pad(types, (left, right)),
        position_ids=torch.nn.functional.pad(torch.arange(64), (left, right)).unsqueeze(0),
    )
    # float32: a product with another number of rows may sum in another order; 1e-5 is 20 eps of values of up to 4.
    torch.testing.assert_close(output.last_hidden_state[0, left : left + 64], expected, rtol=1e-5, atol=1e-5)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(lengths=st.lists(st.integers(0, 20), max_size=6))
def test_any_lengths_packed_and_padded(lengths: list[int]) -> None:
    torch.manual_seed(5)
    model = BertForPreTraining(CONFIG).eval()
    packed = pack(lengths)
    padded = pad_right(packed, lengths, 20)
    real = padded["attention_mask"].bool()
    labels = torch.where(torch.rand(real.shape) < 0.3, padded["input_ids"], -100)
    follows = torch.randint(0, 2, (len(lengths),))
    actual = model(**packed, labels=labels[real], next_sentence_label=follows)
    expected = model(**padded, labels=labels, next_sentence_label=follows)
    assert torch.equal(actual.prediction_logits, expected.prediction_logits[real])
    assert torch.equal(actual.seq_relationship_logits, expected.seq_relationship_logits)
    assert torch.equal(actual.loss, expected.loss)
    assert bool(actual.loss.isfinite())
    assert int(actual.mlm_count) == int((labels[real] != -100).sum())


@pytest.mark.parametrize("name", HEADS)
def test_heads_take_packed_input(name: str) -> None:
    torch.manual_seed(2)
    model = getattr(bert_fast, name)(CONFIG).eval()
    lengths = [5, 9, 3, 9]
    packed = pack(lengths)
    padded: dict[str, Any] = pad_right(packed, lengths, 9)
    labels = {"labels": torch.tensor([0, 1, 1, 0])}
    real = padded["attention_mask"].bool()
    packed_labels: dict[str, Tensor] = labels
    if name in ("BertForMaskedLM", "BertForTokenClassification"):
        labels = {"labels": torch.randint(0, 2, (4, 9))}
        packed_labels = {"labels": labels["labels"][real]}
    elif name == "BertForPreTraining":
        labels = {"labels": torch.randint(0, 50, (4, 9)), "next_sentence_label": torch.tensor([0, 1, 1, 0])}
        packed_labels = {**labels, "labels": labels["labels"][real]}
    elif name == "BertForQuestionAnswering":
        labels = packed_labels = {
            "start_positions": torch.tensor([0, 1, 2, 8]),
            "end_positions": torch.tensor([4, 1, 2, 9]),
        }
    elif name == "BertForMultipleChoice":
        labels = packed_labels = {"labels": torch.tensor([0, 1])}
        padded = {key: x.view(2, 2, 9) for key, x in padded.items()}
        packed["num_choices"] = 2
    per_token = {"prediction_logits", "start_logits", "end_logits"}
    if name in ("BertForMaskedLM", "BertForTokenClassification"):
        per_token.add("logits")
    actual, expected = model(**packed, **packed_labels), model(**padded, **labels)
    assert actual.keys() == expected.keys()
    for key in actual.keys():  # noqa: SIM118 (an output is not a dict)
        value = expected[key]
        value = value[real] if key in per_token else value
        # Both compute the same packed rows; a sum in another order would be off by a few float32 eps (1.2e-7).
        torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def test_packed_attentions_and_hidden_states(model: BertModel) -> None:
    packed = pack([5, 0, 3])
    out = model(**packed, output_attentions=True, output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert len(out.hidden_states) == len(out.attentions) + 1 == 3
    sums = out.attentions[0].sum(dim=-1)  # (B, N, max_seqlen)
    expected = torch.tensor([[1.0] * 5, [0.0] * 5, [1.0] * 3 + [0.0] * 2]).unsqueeze(1).expand_as(sums)
    torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize("name", [*HEADS, "BertModel"])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (2, 4)], ids=["no sequences", "no columns", "all padding"])
def test_empty_batches(name: str, shape: tuple[int, int]) -> None:
    model = getattr(bert_fast, name)(CONFIG).train()
    if name == "BertForMultipleChoice":
        shape = (shape[0], 2, shape[1])  # type: ignore[assignment]
    ids = torch.zeros(shape, dtype=torch.int64)
    labels: dict[str, Tensor] = {"labels": torch.zeros(shape[0], dtype=torch.int64)}
    if name in ("BertForMaskedLM", "BertForTokenClassification", "BertForPreTraining"):
        labels = {"labels": ids}
    if name == "BertForPreTraining":
        labels["next_sentence_label"] = torch.zeros(shape[0], dtype=torch.int64)
    if name == "BertForQuestionAnswering":
        labels = {key: torch.zeros(shape[0], dtype=torch.int64) for key in ("start_positions", "end_positions")}
    out = model(ids, attention_mask=ids, **({} if name == "BertModel" else labels))
    tensors = [value for value in out.values() if isinstance(value, Tensor)]
    assert all(bool(value.double().isfinite().all()) for value in tensors)
    sum(value.sum() for value in tensors if value.requires_grad).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


IDS = torch.zeros(2, 5, dtype=torch.int64)
PACKED = {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32), "max_seqlen": 3}


@pytest.mark.parametrize(
    ("inputs", "error", "words"),
    [
        ({}, ValueError, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 5, 128)}, ValueError, "exactly one of"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids is torch.float32"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids has shape \(5,\); expected \(B, S\)"),
        ({"input_ids": IDS + 50}, ValueError, r"input_ids has values from 50 to 50; expected 0 to 49 \(vocab_size\)"),
        ({"input_ids": IDS - 1}, ValueError, "input_ids has values from -1 to -1"),
        ({"input_ids": torch.zeros(1, 71, dtype=torch.int64)}, ValueError, "71 tokens.*max_position_embeddings = 70"),
        ({"input_ids": IDS, "token_type_ids": IDS + 2}, ValueError, r"token_type_ids has values.*type_vocab_size"),
        ({"input_ids": IDS, "token_type_ids": IDS[:, :4]}, ValueError, r"token_type_ids has shape \(2, 4\)"),
        ({"input_ids": IDS, "position_ids": IDS + 70}, ValueError, "position_ids has values.*max_position_embeddings"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :4]}, ValueError, r"attention_mask has shape \(2, 4\)"),
        ({"input_ids": IDS, "attention_mask": IDS + 2}, ValueError, "attention_mask has the values 2"),
        ({"input_ids": IDS, "attention_mask": [[1] * 5] * 2}, TypeError, "attention_mask is list"),
        ({"input_ids": IDS, "attention_mask": IDS.view(2, 1, 1, 5)}, ValueError, "attention_mask has shape"),
        ({"inputs_embeds": torch.zeros(2, 5, 64)}, ValueError, r"inputs_embeds has shape \(2, 5, 64\)"),
        ({"inputs_embeds": IDS.unsqueeze(2).expand(2, 5, 128)}, TypeError, "inputs_embeds is torch.int64"),
        ({"input_ids": IDS, "max_seqlen": 5}, ValueError, "max_seqlen came without cu_seqlens"),
        ({"input_ids": IDS[0], "cu_seqlens": PACKED["cu_seqlens"]}, ValueError, "cu_seqlens came without max_seqlen"),
        ({"input_ids": IDS, **PACKED}, ValueError, r"input_ids has shape \(2, 5\); expected \(T,\)"),
        ({"input_ids": IDS[0], **PACKED, "attention_mask": IDS[0]}, ValueError, "attention_mask came with cu_seqlens"),
        ({"input_ids": IDS[0, :4], **PACKED}, ValueError, "expected from 0 to 4"),
        ({"input_ids": IDS[0], **PACKED, "max_seqlen": 2}, ValueError, "at most max_seqlen = 2"),
        ({"input_ids": IDS[0], **PACKED, "max_seqlen": 71}, ValueError, "71 tokens"),
        (
            {"input_ids": IDS[0], **PACKED, "cu_seqlens": torch.tensor([0, 4, 2, 5], dtype=torch.int32)},
            ValueError,
            "falls",
        ),
        (
            {"input_ids": IDS[0], **PACKED, "cu_seqlens": torch.tensor([0, 2, 5])},
            TypeError,
            "cu_seqlens is torch.int64",
        ),
        ({"input_ids": IDS, "output_everything": True}, TypeError, "output_everything"),
    ],
)
def test_wrong_input_is_named(model: BertModel, inputs: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        model(**inputs)


@pytest.mark.parametrize(
    ("name", "labels", "error", "words"),
    [
        ("BertForMaskedLM", {"labels": IDS + 50}, ValueError, "labels has the value 50; expected 0 to 49, or -100"),
        ("BertForMaskedLM", {"labels": IDS - 1}, ValueError, "labels has the value -1"),
        ("BertForMaskedLM", {"labels": IDS[:, :4]}, ValueError, r"labels has shape \(2, 4\); expected \(2, 5\)"),
        ("BertForMaskedLM", {"labels": IDS.float()}, TypeError, "labels is torch.float32"),
        (
            "BertForPreTraining",
            {"labels": IDS, "next_sentence_label": IDS[0, :2] + 2},
            ValueError,
            "next_sentence_label",
        ),
        (
            "BertForNextSentencePrediction",
            {"labels": IDS[0, :3]},
            ValueError,
            r"labels has shape \(3,\); expected \(2,\)",
        ),
        ("BertForSequenceClassification", {"labels": IDS[0, :2] + 2}, ValueError, "labels has the value 2"),
        ("BertForSequenceClassification", {"labels": torch.zeros(2, 3)}, ValueError, r"expected \(2, 2\)"),
        ("BertForTokenClassification", {"labels": IDS + 2}, ValueError, "labels has the value 2"),
        (
            "BertForQuestionAnswering",
            {"start_positions": IDS[0, :2].float(), "end_positions": IDS[0, :2]},
            TypeError,
            "start_positions is torch.float32",
        ),
        ("BertForMultipleChoice", {}, ValueError, r"expected \(B, choices, S\)"),
    ],
)
def test_wrong_labels_are_named(name: str, labels: dict[str, Tensor], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        getattr(bert_fast, name)(CONFIG)(IDS, **labels)


@pytest.mark.parametrize("name", ["BertForMaskedLM", "BertForPreTraining", "BertForNextSentencePrediction"])
def test_a_hook_on_the_container_of_the_heads_is_refused(name: str) -> None:
    model = getattr(bert_fast, name)(CONFIG).eval()
    handle = model.cls.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the module `cls` has a hook, and it is never called"):
        model(IDS)
    handle.remove()
    model(IDS)


def test_the_pooling_layer_is_a_flag() -> None:
    with pytest.raises(TypeError, match="add_pooling_layer is 'no'; expected True or False"):
        BertModel(CONFIG, add_pooling_layer="no")  # type: ignore[arg-type]


def test_question_answering_needs_two_labels() -> None:
    with pytest.raises(ValueError, match="num_labels is 3; expected 2"):
        bert_fast.BertForQuestionAnswering(CONFIG.replace(num_labels=3))


def test_labels_at_padding_are_ignored() -> None:
    model = BertForMaskedLM(CONFIG).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    everywhere = model(IDS, attention_mask=mask, labels=IDS + 3)
    where_real = model(IDS, attention_mask=mask, labels=(IDS + 3).masked_fill(mask == 0, -100))
    assert torch.equal(everywhere.loss, where_real.loss)
    assert int(everywhere.mlm_count) == 7


def test_answers_are_never_at_padding() -> None:
    model = bert_fast.BertForQuestionAnswering(CONFIG).eval()
    mask = torch.tensor([[0, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    out = model(IDS, attention_mask=mask, start_positions=torch.tensor([0, 4]), end_positions=torch.tensor([3, 9]))
    lowest = torch.finfo(torch.float32).min
    assert bool((out.start_logits[mask == 0] == lowest).all())
    assert bool((out.end_logits[mask == 1] > lowest).all())
    assert out.loss.item() == 0.0  # every position is at padding or past the end


def test_return_dict_false_returns_a_tuple(model: BertModel) -> None:
    hidden, pooled = model(IDS, return_dict=False)
    assert (hidden.shape, pooled.shape) == ((2, 5, 128), (2, 128))
    loss, logits = BertForMaskedLM(CONFIG).eval()(IDS, labels=IDS, return_dict=False)
    assert (loss.shape, logits.shape) == ((), (2, 5, 50))
    assert isinstance(BertModel(CONFIG.replace(return_dict=False))(IDS), tuple)
