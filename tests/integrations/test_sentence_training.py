"""Losses of sentence-transformers over a fused model: those of the unfused one, step after step."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bert_fast
from bert_fast.data import load_tokenizer
from bert_fast.data.tokenizer_saving import save_tokenizer

st: Any = (
    pytest.importorskip("sentence_transformers")
    if torch.cuda.is_available()
    else importlib.import_module("sentence_transformers")
)
modules: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")
losses: Any = importlib.import_module("sentence_transformers.sentence_transformer.losses")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(56))]
SIZES = {
    "vocab_size": len(WORDS),
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "max_position_embeddings": 40,
    "initializer_range": 0.15,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
LOSSES: dict[str, Callable[[Any], Any]] = {
    "multiple negatives": lambda model: losses.MultipleNegativesRankingLoss(model),
    "cached multiple negatives": lambda model: losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=3),
    "CoSENT": lambda model: losses.CoSENTLoss(model),
    "Matryoshka": lambda model: losses.MatryoshkaLoss(
        model, losses.MultipleNegativesRankingLoss(model), matryoshka_dims=[48, 16, 5]
    ),
}
STEPS, ROWS = 4, 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    (path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = load_tokenizer(path / "vocab.txt")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(path)
    save_tokenizer(tokenizer, path, model_max_length=40)
    return path


def texts(seed: int, count: int) -> list[str]:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 20, (count,), generator=draw).tolist()
    return [" ".join(f"w{i}" for i in torch.randint(56, (n,), generator=draw).tolist()) for n in lengths]


def train(model: Any, loss: Any) -> tuple[list[float], list[torch.Tensor]]:
    """The loss of each step, and the weights after the last."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    values = []
    for step in range(STEPS):
        columns = [model.preprocess(texts(3 * step + column, ROWS)) for column in range(2)]
        scores = torch.linspace(0, 1, ROWS, dtype=torch.float64)
        value = loss(columns, scores)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    return values, [x.detach().clone() for x in model.parameters()]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_losses_and_weights_are_those_of_the_unfused_model(name: str, pooling: str, folder: Path) -> None:
    theirs = st.SentenceTransformer(
        modules=[modules.Transformer(str(folder)), modules.Pooling(48, pooling_mode=pooling), modules.Normalize()],
        device="cpu",
    ).double()
    ours = bert_fast.fuse(copy.deepcopy(theirs))
    assert bert_fast.is_fused(ours)
    expected, weights = train(theirs, LOSSES[name](theirs))
    values, own = train(ours, LOSSES[name](ours))
    assert values[-1] != values[0]
    # float64, four steps: sums in another order (eps 2e-16) through two layers and back.
    assert values == pytest.approx(expected, rel=1e-10)
    for x, y in zip(own, weights, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10)


def test_the_cached_loss_replays_the_dropout_of_a_fused_model(folder: Path) -> None:
    """Its second forward pass drops what the first dropped, so its gradient is that of the plain loss."""
    first = modules.Transformer(
        str(folder), config_kwargs={"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
    )
    model = bert_fast.fuse(st.SentenceTransformer(modules=[first, modules.Pooling(48)], device="cpu").double()).train()
    columns = [model.preprocess(texts(column, ROWS)) for column in range(2)]

    def run(loss: Any, seed: int) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        torch.manual_seed(seed)
        value = loss([dict(column) for column in columns], None)
        value.backward()
        return float(value.detach()), [x.grad.clone() for x in model.parameters() if x.grad is not None]

    # sentence-transformers before 6.2 rounds the cached gradients to float32: an unfused model without dropout is off
    # by 6e-8 as well.
    atol = 1e-10 if tuple(map(int, st.__version__.split(".")[:2])) >= (6, 2) else 1e-6
    plain = losses.MultipleNegativesRankingLoss(model)
    cached = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=ROWS)
    for seed in range(3):
        expected, gradients = run(plain, seed)
        value, own = run(cached, seed)
        assert value == pytest.approx(expected, rel=1e-10)
        for x, y in zip(own, gradients, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-8, atol=atol)
    assert run(plain, 1)[0] != run(plain, 2)[0]
