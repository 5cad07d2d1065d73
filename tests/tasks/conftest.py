"""Fixtures: a tokenizer of given pieces, tiny models for a task, and a few training steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from torch import nn

import bert_fast
from bert_fast.data import load_tokenizer
from bert_fast.data.vocab import SPECIAL_TOKENS
from bert_fast.models import from_hf
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Batch, Columns, Example, LossOptions, Task

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small models are faster on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tokenizer]:
    """`tokenizer_of("ab ##c")`: a tokenizer with these pieces and the special tokens."""

    def make(pieces: str, *, lowercase: bool = True) -> Tokenizer:
        folder: Path = tmp_path_factory.mktemp("tokenizer")
        tokens = [*SPECIAL_TOKENS, *dict.fromkeys(pieces.split())]
        (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(f'{{"do_lower_case": {str(lowercase).lower()}}}')
        return load_tokenizer(folder)

    return make


@pytest.fixture(scope="session")
def models_for() -> Callable[[Task, Tokenizer], tuple[Any, Any]]:
    """`models_for(task, tokenizer)`: a bert_fast and a transformers model with equal random weights, in float64."""

    def make(task: Task, tokenizer: Tokenizer) -> tuple[Any, Any]:
        settings = {**SMALL, "vocab_size": tokenizer.get_vocab_size(), **task.model_config()}
        torch.manual_seed(3)
        theirs = getattr(transformers, task.model_class)(transformers.BertConfig(**settings))
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.2 + float(name.endswith("LayerNorm.weight")))
        theirs = theirs.double().eval()
        ours = getattr(bert_fast, task.model_class)(bert_fast.BertConfig(**settings)).double().eval()
        ours.load_state_dict(from_hf(theirs.state_dict()))
        return ours, theirs

    return make


def batches(task: Task, examples: Sequence[Example], rows: int) -> list[Batch]:
    """Batches of the examples of `rows` rows each."""
    by_row = [list(group) for _, group in groupby(examples, key=lambda example: example.row)]
    return [Batch.of([x for group in by_row[i : i + rows] for x in group]) for i in range(0, len(by_row), rows)]


@pytest.fixture(scope="session")
def mean_loss() -> Callable[..., torch.Tensor]:
    """`mean_loss(task, model, examples)`: the loss that the loop minimizes, on one batch."""

    def compute(
        task: Task, model: nn.Module, examples: Sequence[Example], options: LossOptions | None = None
    ) -> torch.Tensor:
        options, batch = options or LossOptions(), Batch.of(examples)
        return task.loss(task.forward(model, batch), examples, options) / task.weight(examples, options)

    return compute


@pytest.fixture(scope="session")
def learn(mean_loss: Callable[..., torch.Tensor]) -> Callable[..., nn.Module]:
    """`learn(task, tokenizer, examples)`: a tiny bert_fast model, trained on the examples."""

    def train(
        task: Task, tokenizer: Tokenizer, examples: Sequence[Example], *, epochs: int, rows: int = 16, lr: float = 3e-3
    ) -> nn.Module:
        torch.manual_seed(5)
        config = bert_fast.BertConfig(**{**SMALL, "vocab_size": tokenizer.get_vocab_size(), **task.model_config()})
        model: nn.Module = getattr(bert_fast, task.model_class)(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        for _ in range(epochs):
            for batch in batches(task, examples, rows):
                optimizer.zero_grad()
                mean_loss(task, model, batch.examples).backward()
                optimizer.step()
        return model.eval()

    return train


@pytest.fixture(scope="session")
def predict() -> Callable[..., list[dict[str, Any]]]:
    """`predict(task, model, tokenizer, table, columns, text)`: the prediction of every row."""

    @torch.no_grad()
    def run(
        task: Task, model: nn.Module, tokenizer: Tokenizer, table: Table, columns: Columns, text: TextSettings
    ) -> list[dict[str, Any]]:
        examples = task.encode(table, columns, tokenizer, text, training=False)
        outputs = [
            x for batch in batches(task, examples, 16) for x in task.per_example(task.forward(model, batch), batch)
        ]
        return task.decode(outputs, examples, table, columns)

    return run


def without(columns: Mapping[str, str], *roles: str) -> dict[str, str]:
    """The columns without those of some roles."""
    return {role: name for role, name in columns.items() if role not in roles}
