"""The same weights give the same outputs, losses and gradients as transformers.

In float64 both sides are exact to rounding, which pins what is computed, whatever the mask. In float32 and bfloat16 our
error against float64 may be three times that of transformers in the same precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from bert_fast.golden import HEADS
from bert_fast.models import from_hf
from bert_fast.testing import assert_three_way, compare

BATCH, SEQLEN, CHOICES = 3, 13, 2
# float64 (eps 2.2e-16): two layers, with sums of up to 80 terms, differ by at most 4e-14 of 1 + |value|.
EXACT = 1e-11
# A bias added to every logit of a softmax: its gradient is zero but for rounding.
SHIFTS = {"d classifier.bias": "BertForMultipleChoice", "d qa_outputs.bias": "BertForQuestionAnswering"}
Pair = Callable[..., tuple[Any, Any]]


def inputs_of(name: str, *, padded: bool = True) -> dict[str, Tensor]:
    """A batch with labels; padding on the right, in the middle and, where nothing is pooled, on the left."""
    generator = torch.Generator().manual_seed(11)
    shape = (BATCH, CHOICES, SEQLEN) if name == "BertForMultipleChoice" else (BATCH, SEQLEN)
    pooled = name not in ("BertForMaskedLM", "BertForTokenClassification", "BertForQuestionAnswering")
    mask = torch.ones(shape, dtype=torch.int64)
    if padded:
        mask[0, ..., 9:] = 0
        mask[1, ..., 4:6] = 0
        mask[2, ..., 12 if pooled else 0] = 0
    inputs = {
        "input_ids": torch.randint(0, 61, shape, generator=generator),
        "token_type_ids": torch.randint(0, 2, shape, generator=generator),
        "attention_mask": mask,
    }
    words = torch.randint(0, 61, shape, generator=generator).masked_fill(
        torch.rand(shape, generator=generator) < 0.6, -100
    )
    words = words.masked_fill(mask == 0, -100)
    labels = {
        "BertForPreTraining": {"labels": words, "next_sentence_label": torch.tensor([0, 1, 1])},
        "BertForMaskedLM": {"labels": words},
        "BertForNextSentencePrediction": {"labels": torch.tensor([0, 1, 1])},
        "BertForSequenceClassification": {"labels": torch.tensor([2, 0, 1])},
        "BertForTokenClassification": {"labels": words % 3 * (words >= 0) + words * (words < 0)},
        "BertForQuestionAnswering": {
            "start_positions": torch.tensor([1, 3, 99]),
            "end_positions": torch.tensor([2, 7, 99]),
        },
        "BertForMultipleChoice": {"labels": torch.tensor([1, 0, 1])},
    }
    return {**inputs, **labels.get(name, {})}


def settings_of(name: str) -> dict[str, Any]:
    return {"num_labels": 3} if name in ("BertForSequenceClassification", "BertForTokenClassification") else {}


def run(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Loss, logits, hidden states of every layer at the real tokens, and the gradient of every parameter."""
    model.zero_grad()
    out = model(**inputs, output_hidden_states=True)
    mask = inputs["attention_mask"].flatten(0, -2).bool()
    target = out.loss if "loss" in out.keys() else out.last_hidden_state[mask].square().sum() + out.pooler_output.sum()  # noqa: SIM118
    target.backward()
    results = {"target": target.detach()}
    for key, value in out.items():
        if isinstance(value, Tensor) and not key.startswith(("mlm_", "next_")):
            at_tokens = value.shape[:2] == mask.shape and "relationship" not in key
            results[key] = (value[mask] if at_tokens else value).detach()
    results |= {f"layer {index}": state.detach()[mask] for index, state in enumerate(out.hidden_states)}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    # qkv stays packed: the gradient of the key bias alone is zero but for rounding, since softmax ignores a shift.
    return results | {f"d {name}": gradient for name, gradient in from_hf(gradients).items()}


def without_padding_in_the_softmax(theirs: Any, inputs: dict[str, Tensor]) -> None:
    """Remove padding from the softmax of transformers' question answering, as ours does."""
    padding = inputs["attention_mask"] == 0
    theirs.qa_outputs.register_forward_hook(
        lambda _module, _args, scores: scores.masked_fill(padding.unsqueeze(2), torch.finfo(scores.dtype).min)
    )


def measure(pair: Pair, name: str, dtype: torch.dtype, **settings: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    ours, theirs = pair(name, dtype, **settings_of(name), **settings)
    inputs = inputs_of(name)
    if name == "BertForQuestionAnswering":
        without_padding_in_the_softmax(theirs, inputs)
    return run(ours, inputs), run(theirs, inputs)


@pytest.mark.parametrize("name", HEADS)
def test_outputs_losses_and_gradients_in_float64(pair: Pair, name: str) -> None:
    actual, expected = measure(pair, name, torch.float64)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=EXACT, atol=EXACT, msg=lambda text, key=key: f"{key}: {text}"
        )


# Units in the last place. Eager PyTorch's error of a loss, a single number, may be tiny by chance, unlike the maximum
# over a tensor; after a whole model its rounding is several units.
FLOOR = 4.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", HEADS)
def test_three_way_against_transformers(pair: Pair, name: str, dtype: torch.dtype) -> None:
    ours, eager = measure(pair, name, dtype)
    _, theirs = pair(name, dtype, **settings_of(name))
    inputs = inputs_of(name)
    if name == "BertForQuestionAnswering":
        without_padding_in_the_softmax(theirs, inputs)
    truth = run(theirs.double(), inputs)  # the same rounded weights
    shifts = [key for key, model in SHIFTS.items() if model == name]
    assert_three_way(
        [compare(key, ours[key], eager[key], truth[key], 3.0, FLOOR) for key in truth if key not in shifts]
    )
    assert all(ours[key].abs().max() < 8 * torch.finfo(dtype).eps for key in shifts)


@pytest.mark.parametrize("act", ["gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "tanh"])
def test_other_activations(pair: Pair, act: str) -> None:
    actual, expected = measure(pair, "BertForPreTraining", torch.float64, hidden_act=act)
    for key, value in expected.items():
        # transformers rounds the sqrt(2 / pi) of gelu_fast to ten digits, an error of 4e-12; others differ by 4e-15.
        torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")


def test_untied_decoder(pair: Pair) -> None:
    actual, expected = measure(pair, "BertForMaskedLM", torch.float64, tie_word_embeddings=False)
    assert "d cls.predictions.decoder.weight" in actual
    for key, value in expected.items():
        # In transformers 4 the head's two biases are one Parameter, tied or not, and this is its name.
        ours = key.replace("predictions.bias", "predictions.decoder.bias")
        torch.testing.assert_close(actual[ours], value, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        (None, torch.tensor([[0.5], [1.0], [-2.0]])),
        (None, torch.tensor([0.5, 1.0, -2.0])),
        ("regression", torch.tensor([[0.5, 1.0], [1.0, 0.0], [-2.0, 3.0]])),
        (None, torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])),
        ("multi_label_classification", torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])),
        ("single_label_classification", torch.tensor([1, -100, 0])),
        (None, torch.tensor([[1], [0], [1]])),
    ],
    ids=["regression (B, 1)", "regression (B,)", "2 regressions", "multi inferred", "multi", "single", "single (B, 1)"],
)
def test_problem_types(pair: Pair, problem_type: str | None, labels: Tensor) -> None:
    columns = 1 if labels.is_floating_point() and labels.reshape(3, -1).shape[1] == 1 else 2
    ours, theirs = pair("BertForSequenceClassification", num_labels=columns, problem_type=problem_type)
    inputs = inputs_of("BertForSequenceClassification")
    inputs["labels"] = labels.double() if labels.is_floating_point() else labels
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, rtol=EXACT, atol=EXACT)


def test_answers_without_padding_have_transformers_loss(pair: Pair) -> None:
    ours, theirs = pair("BertForQuestionAnswering")
    inputs = inputs_of("BertForQuestionAnswering", padded=False)
    del inputs["attention_mask"]
    torch.testing.assert_close(ours(**inputs).loss, theirs(**inputs).loss, rtol=EXACT, atol=EXACT)


def test_attentions_equal_transformers(pair: Pair) -> None:
    ours, theirs = pair("BertModel")
    inputs = inputs_of("BertModel")
    actual, expected = (model(**inputs, output_attentions=True).attentions for model in (ours, theirs))
    real = inputs["attention_mask"].bool()[:, None, :, None]
    assert len(actual) == len(expected) == 2
    for ours_layer, theirs_layer in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours_layer, theirs_layer * real, rtol=EXACT, atol=EXACT)


def test_inputs_embeds_and_position_ids(pair: Pair) -> None:
    ours, theirs = pair("BertForMaskedLM")
    inputs = inputs_of("BertForMaskedLM")
    embeds = torch.randn(BATCH, SEQLEN, 48, dtype=torch.float64)
    del inputs["input_ids"]
    results = []
    for model in (ours, theirs):
        leaf = embeds.clone().requires_grad_()
        loss = model(inputs_embeds=leaf, position_ids=torch.arange(SEQLEN).flip(0).unsqueeze(0), **inputs).loss
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=EXACT, atol=EXACT)


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    rows, columns = draw(st.integers(1, 4)), draw(st.integers(1, 17))
    bits = st.lists(st.integers(0, 1), min_size=columns, max_size=columns).filter(any)
    mask = torch.tensor(draw(st.lists(bits, min_size=rows, max_size=rows)))
    return torch.randint(0, 61, (rows, columns)), mask


@hypothesis.settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.filter_too_much],
)
@hypothesis.given(batch=batches())
def test_any_mask(pair: Pair, batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    ours, theirs = pair("BertModel")
    output = ours(ids, attention_mask=mask)
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    real = mask.bool()
    torch.testing.assert_close(output.last_hidden_state[real], expected[real], rtol=EXACT, atol=EXACT)
    assert not output.last_hidden_state[~real].any()
    # [CLS] is the first real token: with padding on the left, transformers' pooler would read a padding token.
    first = expected[torch.arange(ids.shape[0]), real.int().argmax(dim=1)].unsqueeze(1)
    torch.testing.assert_close(output.pooler_output, theirs.pooler(first), rtol=EXACT, atol=EXACT)
