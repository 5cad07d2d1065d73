"""Texts that are too long for the model: head, tail, both, and windows; and the pooling of the classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from bert_fast.data import leading
from bert_fast.models import BertConfig, BertForSequenceClassification
from bert_fast.tasks.encoding import encode_texts, encode_windows, is_truncated
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import make_task

WORDS = "a b c d e f g h i j k l"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of: Callable[..., Tokenizer]) -> Tokenizer:
    return tokenizer_of(f"{WORDS} x y z")


@pytest.mark.parametrize(
    ("long", "expected"),
    [
        ("head", ["C a b c d e f g h S"]),
        ("tail", ["C e f g h i j k l S"]),
        ("head_tail", ["C a b g h i j k l S"]),
        ("windows", ["C a b c d e f g h S", "C f g h i j k l S"]),
    ],
)
def test_a_long_text(long: Any, expected: list[str], tokenizer: Tokenizer) -> None:
    text = TextSettings(max_length=10, long=long, overlap=3)
    assert shown(encode_windows(tokenizer, [WORDS], None, text)[0]) == expected
    assert shown(encode_windows(tokenizer, ["x y", ""], None, text)[0]) == ["C x y S"]
    assert shown(encode_windows(tokenizer, [""], None, text)[0]) == ["C S"]


def shown(parts: list[Any]) -> list[str]:
    return [" ".join(part.tokens).replace("[CLS]", "C").replace("[SEP]", "S") for part in parts]


@pytest.mark.parametrize(
    ("long", "truncation", "first", "second", "expected"),
    [
        ("windows", "longest_first", WORDS, "x y z", ["C a b c d e S x y z S", "C d e f g h S x y z S",
                                                      "C g h i j k S x y z S", "C j k l S x y z S"]),
        ("windows", "only_second", "x", WORDS, ["C x S a b c d e f g S", "C x S f g h i j k l S"]),
        ("windows", "only_second", WORDS, "x y z", ["C a b c d e S x y z S"]),
        ("windows", "only_first", "x y z", "a b c d e f g", ["C x y z S a b c d e S"]),
        ("head_tail", "longest_first", "x y z", WORDS, ["C x y z S a i j k l S"]),
        ("head_tail", "only_first", WORDS, WORDS, ["C a j k l S a b c d S"]),
        ("head_tail", "longest_first", "x", "y", ["C x S y S"]),
    ],
)  # fmt: skip
def test_long_pairs(
    long: Any, truncation: Any, first: str, second: str, expected: list[str], tokenizer: Tokenizer
) -> None:
    text = TextSettings(max_length=11, long=long, truncation=truncation, overlap=2)
    parts = encode_windows(tokenizer, [first], [second], text)[0]
    assert shown(parts) == expected
    for part in parts:
        assert part.type_ids == [0] * (part.tokens.index("[SEP]") + 1) + [1] * (
            len(part.ids) - part.tokens.index("[SEP]") - 1
        )


def test_tasks_without_windows_refuse_them(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"text\.long is windows; expected head, tail or head_tail"):
        encode_texts(tokenizer, ["a"], None, TextSettings(long="windows"))
    with pytest.raises(ValueError, match=r"text.long is 'middle'"):
        TextSettings(long="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"text.overlap is -1"):
        TextSettings(overlap=-1)


def test_the_logits_of_a_rows_windows_are_averaged(tokenizer: Tokenizer) -> None:
    task = make_task("classification")
    table, columns = Table({"text": [WORDS, "a", "b"], "label": ["p", "q", "p"]}), {"text": "text", "label": "label"}
    task.fit(table, columns)
    examples = task.encode(
        table, columns, tokenizer, TextSettings(max_length=8, long="windows", overlap=0), training=True
    )
    assert [(example.row, example.target) for example in examples] == [(0, 0), (0, 0), (1, 1), (2, 0)]
    outputs = [np.array(pair) for pair in ([1.0, 0.0], [3.0, 2.0], [0.0, 1.0], [5.0, 5.0])]
    scores = [one["scores"]["p"] for one in task.decode(outputs, examples, table, columns)]
    assert scores == pytest.approx([1 / (1 + np.exp(-1.0)), 1 / (1 + np.exp(1.0)), 0.5])


@pytest.mark.parametrize("pooling", ["mean", "max", "mean_max"])
def test_the_classifier_pools_all_tokens(pooling: str) -> None:
    torch.manual_seed(0)
    config = BertConfig.size("tiny", vocab_size=30).replace(extra={"classifier_pooling": pooling}, num_labels=3)
    model = BertForSequenceClassification(config).double().eval()
    ids = torch.randint(4, 30, (2, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    hidden = model.bert(input_ids=ids, attention_mask=mask).last_hidden_state
    rows = [hidden[0], hidden[1, :4]]
    parts = {"mean": [row.mean(0) for row in rows], "max": [row.amax(0) for row in rows]}
    pooled = torch.cat([torch.stack(parts[name]) for name in pooling.split("_")], 1).float().double()
    logits = model(input_ids=ids, attention_mask=mask).logits
    # Pooling rounds values of size 1 to float32, by half an eps (6e-8); a logit sums up to 256, times 0.02.
    assert torch.allclose(logits, model.classifier(pooled), atol=1e-7)
    assert model.bert.pooler is None
    with pytest.raises(ValueError, match="classifier_pooling is 'median'"):
        BertForSequenceClassification(replace(config, extra={"classifier_pooling": "median"}))


@pytest.mark.parametrize("long", ["head", "tail", "head_tail", "windows"])
@pytest.mark.parametrize("pair", [None, "d e", "d e f g h i j k"], ids=["single", "short", "long"])
@pytest.mark.parametrize("text", ["a b", "a b c d e f g h i j"])
def test_truncation_is_noticed(long: Any, pair: str | None, text: str, tokenizer: Tokenizer) -> None:
    """A row is truncated if a word is in none of its encodings."""
    settings = TextSettings(max_length=9, long=long, overlap=1)
    windows = encode_windows(tokenizer, [text], None if pair is None else [pair], settings)[0]
    read = {span for window in windows for span in zip(window.sequence_ids, window.offsets, strict=True)}
    words = {(index, (at, at + 1)) for index, part in enumerate([text, pair or ""]) for at in range(0, len(part), 2)}
    assert is_truncated(windows) == bool(words - read)


def test_of_a_long_text_only_a_part_is_tokenized(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encodings are those of the whole text, truncated by the tokenizer."""
    monkeypatch.setattr(leading, "CHARACTERS", 1)
    texts = ["a b", "", "c " * 5000, "d" * 5000, " " * 400 + "a b c d e f g h i", "a b c d e f g", "a b c d e f g h"]
    read: list[int] = []

    class Counted:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def encode_batch(self, batch: list[str]) -> Any:
            read.extend(map(len, batch))
            return tokenizer.encode_batch(batch)

    encodings = encode_texts(Counted(), texts, None, TextSettings(max_length=9))  # type: ignore[arg-type]
    assert 10_000 > sum(read) > 5000, "the text without a place to cut is read whole, and no other"
    tokenizer.enable_truncation(9)
    expected = tokenizer.encode_batch(texts)
    tokenizer.no_truncation()
    for ours, theirs in zip(encodings, expected, strict=True):
        for what in ("ids", "type_ids", "offsets", "tokens", "word_ids", "attention_mask", "special_tokens_mask"):
            assert getattr(ours, what) == getattr(theirs, what), what
        assert is_truncated([ours]) == is_truncated([theirs])
