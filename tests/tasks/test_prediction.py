"""`predict` and `run_examples` of every task: eval mode and back, transformers' tokenizers, arguments."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer
from torch import nn

import bert_fast
from bert_fast.models import BertConfig
from bert_fast.tasks import prediction
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.prediction import predict, run_examples
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import make_task
from tests.tasks.conftest import SMALL

ROWS: dict[str, dict[str, list[Any]]] = {
    "classification": {"text": ["a b", "b c"], "label": ["x", "y"]},
    "multi-label": {"text": ["a b", "b c"], "label": ["x,y", "y"]},
    "regression": {"text": ["a b", "b c"], "label": [1.0, 2.0]},
    "token-classification": {"tokens": [["a", "b"], ["b"]], "tags": [["B-X", "O"], ["O"]]},
    "question-answering": {
        "question": ["a", "b"],
        "context": ["a b c", "b c"],
        "answers": [{"text": ["b"], "answer_start": [2]}, {"text": ["c"], "answer_start": [2]}],
    },
    "multiple-choice": {"text": ["a", "b"], "choices": [["b", "c"], ["a", "c"]], "label": [0, 1]},
    "sentence-embedding": {"text": ["a b", "c"], "text_pair": ["a", "b"], "label": [0.1, 0.9]},
}


class Failing(nn.Module):
    def forward(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("no encoder")


def modes(model: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("name", ROWS)
def test_predict_of_every_task(name: str, tokenizer_of: Callable[..., Tokenizer]) -> None:
    """Dropout is off, every module has its own mode again, and transformers' tokenizer gives the same."""
    tokenizer = tokenizer_of("a b c")
    table = Table(ROWS[name])
    task = make_task(name)
    columns = {role.name: role.name for role in task.roles if role.name in table.columns}
    task.fit(table, columns)
    settings = {**SMALL, "hidden_dropout_prob": 0.5, **task.model_config()}
    model = getattr(bert_fast, task.model_class)(BertConfig(vocab_size=tokenizer.get_vocab_size(), **settings)).train()
    model.base_model.encoder.layer[1].eval()
    before = modes(model)
    text = TextSettings(max_length=16)
    first = predict(model, task, tokenizer, table, columns, text=text)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for again in (tokenizer, theirs):
        assert predict(model, task, again, table, columns, text=text) == first
    assert modes(model) == before
    with pytest.raises(TypeError, match="tokenizer is of type str; expected"):
        predict(model, task, "bert-base-uncased", table, columns, text=text)
    for batch_tokens, kind in ((0, ValueError), (-1, ValueError), (1.5, TypeError), ("8", TypeError)):
        with pytest.raises(kind, match="batch_tokens is"):
            predict(model, task, tokenizer, table, columns, text=text, batch_tokens=batch_tokens)  # type: ignore[arg-type]
    model.base_model.encoder.layer[0] = Failing()
    before = modes(model)
    examples = task.encode(table, columns, tokenizer, text, training=False)
    with pytest.raises(RuntimeError, match="no encoder"):
        run_examples(model, task, examples)
    assert modes(model) == before


@pytest.mark.parametrize("name", ROWS)
def test_rows_that_a_thread_tokenizes_ahead_have_the_same_predictions(
    name: str, tokenizer_of: Callable[..., Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, task, text = tokenizer_of("a b c"), make_task(name), TextSettings(max_length=16)
    table = Table(ROWS[name]).select([0, 1, 1, 0, 1])
    columns = {role.name: role.name for role in task.roles if role.name in table.columns}
    task.fit(table, columns)
    settings = {**SMALL, **task.model_config()}
    model = getattr(bert_fast, task.model_class)(BertConfig(vocab_size=tokenizer.get_vocab_size(), **settings))
    arguments = (model, task, tokenizer)
    once = predict(*arguments, table, columns, text=text, batch_tokens=1)  # a row a batch, as below: the same bits
    monkeypatch.setattr(prediction, "WINDOW", 2)
    counted: list[int] = []
    assert predict(*arguments, table, columns, text=text, batch_tokens=1, progress=counted.append) == once
    examples = task.encode(table, columns, tokenizer, text, training=False)
    assert sum(counted) == len(examples)
    assert predict(*arguments, table.select([]), columns, text=text) == []
    encode = task.encode

    def fails(window: Table, *others: Any, **settings: Any) -> Any:
        if len(window) == 1:
            raise ValueError(window.where(0))
        return encode(window, *others, **settings)

    monkeypatch.setattr(task, "encode", fails)
    with pytest.raises(ValueError, match=r"^table, row 2$"):  # the number of the fifth row, in the third window
        predict(*arguments, table, columns, text=text)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]
