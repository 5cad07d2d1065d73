"""Explanations: rollout by hand, integrated gradients that sum to the difference of logits, and the HTML page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

from bert_fast.cli.main import main
from bert_fast.models import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertPreTrainedModel,
)
from bert_fast.tasks.explain import Explanation, explain, page, rollout
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import CONFIG_KEY, Task, make_task, task_entry

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXT = TextSettings(max_length=16)


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of: Callable[..., Tokenizer]) -> Tokenizer:
    return tokenizer_of("good bad the film was ##s &")


@pytest.fixture(scope="module")
def task() -> Task:
    task = make_task("classification")
    task.fit(Table({"text": ["a", "b", "c"], "label": ["no", "<yes>", "maybe"]}), {"text": "text", "label": "label"})
    return task


def model_of(task: Task, tokenizer: Tokenizer, **more: Any) -> BertForSequenceClassification:
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=16, initializer_range=0.3, **SMALL,
        **task.model_config(), extra=more,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def test_rollout_is_the_product_of_the_layers_and_their_residuals() -> None:
    first = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]])  # mean: all 0.5
    second = torch.tensor([[[0.2, 0.8], [0.6, 0.4]]])
    lower = np.array([[0.75, 0.25], [0.25, 0.75]])
    upper = np.array([[0.6, 0.4], [0.3, 0.7]])
    assert np.allclose(rollout([first, second]), upper @ lower)


@pytest.mark.parametrize("pooling", ["cls", "mean_max"])
def test_gradients_sum_to_the_difference_of_the_logits(pooling: str, task: Task, tokenizer: Tokenizer) -> None:
    model = model_of(task, tokenizer, classifier_pooling=pooling)
    explanation = explain(model, task, tokenizer, ["the goods film was bad"], TEXT, steps=200)
    ids = tokenizer.encode("the goods film was bad").ids
    logits = model(input_ids=torch.tensor([ids])).logits[0].detach()
    assert explanation.label == task.labels[int(logits.argmax())] == explanation.prediction["label"]  # type: ignore[attr-defined]
    # float32: an eps of logits of up to 2 is 2.4e-7.
    assert explanation.logit == pytest.approx(float(logits.max()), abs=1e-5)
    empty = [2, *[0] * (len(ids) - 2), 3]
    without = model(input_ids=torch.tensor([empty])).logits[0].detach()
    assert explanation.baseline == pytest.approx(float(without[logits.argmax()]), abs=1e-5)
    # The gradients are summed at 200 points of the path; the error is 6e-4.
    assert explanation.gradients.sum() == pytest.approx(explanation.logit - explanation.baseline, abs=0.02)
    assert explanation.gradients[0] == explanation.gradients[-1] == 0.0
    # float32 products of rows that sum to 1: an eps (1.2e-7) each.
    assert explanation.rollout.sum() == pytest.approx(1.0, abs=1e-5)
    assert explanation.tokens == ["[CLS]", "the", "good", "##s", "film", "was", "bad", "[SEP]"]
    assert explanation.spans[2:4] == [(0, 4, 8), (0, 8, 9)]


def test_another_label_a_pair_and_windows(task: Task, tokenizer: Tokenizer) -> None:
    model = model_of(task, tokenizer)
    explanation = explain(model, task, tokenizer, ["the film", "was bad"], TEXT, label="maybe", steps=5)
    assert explanation.label == "maybe"
    assert [span and span[0] for span in explanation.spans] == [None, 0, 0, None, 1, 1, None]
    text = TextSettings(max_length=6, long="windows")
    assert explain(model, task, tokenizer, ["the film was bad " * 3], text, steps=2).windows > 1
    with pytest.raises(ValueError, match=r"label is 'never'; expected one of <yes>, maybe, no"):
        explain(model, task, tokenizer, ["the"], TEXT, label="never")
    with pytest.raises(ValueError, match="the task of the model is multiple-choice; expected one of classification"):
        explain(nn.Linear(1, 1), make_task("multiple-choice"), tokenizer, ["the"], TEXT)


def span_model(kind: type[BertPreTrainedModel], tokenizer: Tokenizer, count: int) -> Any:
    torch.manual_seed(2)
    size = tokenizer.get_vocab_size()
    config = BertConfig(
        vocab_size=size, max_position_embeddings=16, initializer_range=0.5, num_labels=count, **SMALL
    )  # fmt: skip
    return kind(config).eval()


def test_the_label_of_a_word(tokenizer: Tokenizer) -> None:
    task: Any = make_task("token-classification")
    rows = Table({"tokens": [["the", "film"], ["bad"]], "tags": [["O", "B-X"], ["B-Y"]]})
    task.fit(rows, {"tokens": "tokens", "tags": "tags"})
    model = span_model(BertForTokenClassification, tokenizer, len(task.labels))
    text = "The goods  film was"
    ids = tokenizer.encode(text).ids
    logits = model(input_ids=torch.tensor([ids])).logits[0].detach()
    firsts = {1: "The", 2: "goods", 4: "film", 5: "was"}
    for label in (None, "B-Y"):
        explanation = explain(model, task, tokenizer, [text], TEXT, label=label, steps=300)
        columns = [task.labels.index(label)] if label else [i for i, x in enumerate(task.labels) if x != "O"]
        sure = {(at, c): float(logits.softmax(-1)[at, c]) for at in firsts for c in columns}
        at, column = max(sure, key=sure.__getitem__)
        assert explanation.label == f"{task.labels[column]} of {firsts[at]!r}"
        # float32: an ulp of logits of up to 8 is 4.8e-7.
        assert explanation.logit == pytest.approx(float(logits[at, column]), abs=1e-5)
        # The gradients are summed at 300 points of the path; the error is 2e-6.
        assert explanation.gradients.sum() == pytest.approx(explanation.logit - explanation.baseline, abs=0.03)
        assert explanation.rollout.sum() == pytest.approx(1.0, abs=1e-5)
        assert explanation.rollout.argmax() == at, "half of each layer is the residual connection"
    assert "entities " in page([explanation], "t")
    with pytest.raises(ValueError, match="splits this text into windows of 16 tokens"):
        explain(model, task, tokenizer, ["the film was bad " * 8], TEXT)
    with pytest.raises(ValueError, match="2 texts; expected tokens for the task token-classification"):
        explain(model, task, tokenizer, ["the", "film"], TEXT)
    with pytest.raises(ValueError, match="the text has no words"):
        explain(model, task, tokenizer, [" "], TEXT)


def test_the_start_of_an_answer(tokenizer: Tokenizer) -> None:
    task: Any = make_task("question-answering")
    rows = Table({"question": ["what"], "context": ["the film"], "answers": ["film"]})
    task.fit(rows, {name: name for name in rows.columns})
    model = span_model(BertForQuestionAnswering, tokenizer, 2)
    explanation = explain(model, task, tokenizer, ["was the", "the film  was bad"], TEXT, steps=300)
    start = explanation.prediction["start"]
    assert explanation.label == f"the start of {explanation.prediction['answer']!r}"
    token = explanation.spans.index(next(at for at in explanation.spans if at is not None and at[:2] == (1, start)))
    encoded = tokenizer.encode("was the", "the film  was bad")
    ids, types = torch.tensor([encoded.ids]), torch.tensor([encoded.type_ids])
    logits = model(input_ids=ids, token_type_ids=types).start_logits[0].detach()
    # float32: an ulp of logits of up to 4 is 2.4e-7.
    assert explanation.logit == pytest.approx(float(logits[token]), abs=1e-5)
    # The gradients are summed at 300 points of the path; the error is 2e-6.
    assert explanation.gradients.sum() == pytest.approx(explanation.logit - explanation.baseline, abs=0.03)
    assert explanation.rollout.argmax() == token
    html = page([explanation], "t")
    assert f"answer {explanation.prediction['answer']}, probability" in html
    with pytest.raises(ValueError, match="1 texts; expected question and context for the task question-answering"):
        explain(model, task, tokenizer, ["the"], TEXT)
    with pytest.raises(ValueError, match="label is 'x'; expected one of none: the model has no labels"):
        explain(model, task, tokenizer, ["the", "film"], TEXT, label="x")


def test_the_page_colours_every_character() -> None:
    texts = ["A <b>  & é", "好"]
    spans = [None, (0, 0, 1), (0, 2, 5), (0, 7, 8), None, (1, 0, 1)]
    values = np.array([0.5, 0.2, -0.4, 0.0, 0.1, 0.1])
    one = Explanation(texts, ["t"] * 6, spans, "<yes>", {"label": "<yes>", "probability": 0.75, "scores": {}},
                      np.abs(values), values, 1.0, 0.5, 2)  # fmt: skip
    html = page([one], "a < b")
    assert "<title>a &lt; b</title>" in html
    assert "label &lt;yes&gt;, probability 0.750" in html
    assert "Special tokens have 60% of the attention. First of 2 windows." in html
    line = html[html.index("Gradients: <span") : html.index("</section>")]
    assert unescape(re.sub("<[^>]*>", "", line)) == "Gradients: A <b>  & é ‖ 好"
    colours = re.findall(r"rgba\((\d+),\d+,\d+,([\d.]+)\)", line)
    assert colours == [("27", "0.40"), ("217", "0.80"), ("27", "0.00"), ("27", "0.20")]


def test_the_command_writes_a_page(
    task: Task, tokenizer: Tokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {**task_entry(task), "text": {"max_length": 16}}
    model_of(task, tokenizer, **{CONFIG_KEY: entry}).save_pretrained(tmp_path / "model")
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    output = str(tmp_path / "page.html")
    assert main(["explain", str(tmp_path / "model"), "the film", "was bad", "--output", output, "--steps", "3"]) == 0
    assert capsys.readouterr().out.strip() == output
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<section>") == 2
    arguments = ["explain", str(tmp_path / "model"), "the film", "--output", output]
    assert main([*arguments, "--label", "never"]) == 2
    assert "label is 'never'" in capsys.readouterr().err
    assert main([*arguments, "--steps", "0"]) == 2
    assert "--steps is 0; expected at least 1" in capsys.readouterr().err
    assert json.loads((tmp_path / "model" / "config.json").read_text())[CONFIG_KEY]["name"] == "classification"


@pytest.mark.parametrize("long", ["head", "tail", "head_tail", "windows"])
def test_what_was_cut_off_is_marked(
    long: Any, task: Task, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, recwarn: Any
) -> None:
    text = "the film was bad <goods>"  # nine tokens: < goods > are four
    settings = TextSettings(max_length=6, long=long)
    explanation = explain(model_of(task, tokenizer), task, tokenizer, [text], settings, steps=2)
    kept = {span[1:] for span in explanation.spans if span is not None}
    assert all(not start < at < end for _, start, end in explanation.cut for at, _ in kept)
    tokens = tokenizer.encode(text)
    spans = zip(tokens.special_tokens_mask, tokens.offsets, strict=True)
    missing = [span for special, span in spans if not special and span not in kept]
    marked = "".join(text[start:end] for _, start, end in explanation.cut)
    assert len(missing) == len(tokens.ids) - 2 - len(kept)
    assert marked.replace(" ", "") == "".join(text[start:end] for start, end in missing)
    html = page([explanation], "t")
    struck = re.findall(r'<span class="cut">([^<]*)</span>', html)
    assert struck[0] == "Struck through"
    assert unescape(struck[1]) == text[explanation.cut[0][1] : explanation.cut[0][2]]
    assert ("in other windows" if long == "windows" else "cut off, not read by the model") in html
    assert caplog.text == ""
    assert not list(recwarn)
    whole = explain(model_of(task, tokenizer), task, tokenizer, ["the film"], settings, steps=2)
    assert whole.cut == []
    assert 'class="cut"' not in page([whole], "t")


def test_the_mode_of_the_model_is_kept_and_dropout_is_off(task: Task, tokenizer: Tokenizer) -> None:
    model = model_of(task, tokenizer)
    expected = explain(model, task, tokenizer, ["the film"], TEXT, steps=2)
    model.train()
    model.bert.embeddings.eval()
    modes = [module.training for module in model.modules()]
    explanation = explain(model, task, tokenizer, ["the film"], TEXT, steps=2)
    assert explanation.logit == expected.logit
    assert np.array_equal(explanation.gradients, expected.gradients)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(TypeError, match="tokenizer"):
        explain(model, task, "bert", ["the film"], TEXT)  # type: ignore[arg-type]
