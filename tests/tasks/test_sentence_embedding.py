"""Vectors: learnt from pairs, triplets and scores, with the losses written out by hand, ranked among all pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from bert_fast.models.embedding import encode
from bert_fast.tasks.io.columns import choose_columns
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.sentence_embedding import SentenceEmbedding
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import CONFIG_KEY, Example, LossOptions, make_task, task_entry, task_from_config

TEXT = TextSettings(max_length=16)
# Words of one topic, said in two ways.
TOPICS = [("cat", "kitten"), ("dog", "puppy"), ("car", "auto"), ("sea", "ocean"), ("sun", "star"), ("tea", "chai")]
FILLERS = ["the", "my", "old"]


def said(topic: int, way: int, generator: random.Random) -> str:
    return f"{generator.choice(FILLERS)} {TOPICS[topic][way]} {generator.choice(FILLERS)}"


def rows(count: int, seed: int, kind: str) -> Table:
    generator = random.Random(seed)
    columns: dict[str, list[Any]] = {"anchor": [], "positive": [], "negative": [], "score": []}
    for number in range(count):
        topic = number % len(TOPICS)
        other = (topic + generator.randint(1, len(TOPICS) - 1)) % len(TOPICS)
        same = generator.random() < 0.5
        columns["anchor"].append(said(topic, 0, generator))
        columns["positive"].append(said(topic if same or kind != "cosine" else other, 1, generator))
        columns["negative"].append(said(other, 1, generator))
        columns["score"].append(5 if same else 1)
    drop = {"contrastive": ("negative", "score"), "triplet": ("score",), "cosine": ("negative",)}[kind]
    return Table({name: values for name, values in columns.items() if name not in drop}, "made up")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of: Callable[..., Tokenizer]) -> Tokenizer:
    return tokenizer_of(" ".join([*FILLERS, *(word for topic in TOPICS for word in topic)]))


def fitted(table: Table, **options: Any) -> tuple[SentenceEmbedding, dict[str, str]]:
    task = make_task("sentence-embedding", options)
    assert isinstance(task, SentenceEmbedding)
    columns = choose_columns(table, task.roles)
    task.fit(table, columns)
    return task, columns


@pytest.mark.parametrize(
    ("kind", "objective", "metric"),
    [("contrastive", "auto", "mrr"), ("triplet", "triplet", "triplet_accuracy"), ("cosine", "auto", "spearman")],
    ids=["pairs", "triplets", "scores"],
)
def test_it_learns_what_belongs_together(
    kind: str, objective: str, metric: str, tokenizer: Tokenizer, learn: Callable[..., Any], predict: Callable[..., Any]
) -> None:
    train = rows(180 if kind == "cosine" else 60, 0, kind)
    # One row a topic: a text's pair is then the only one of its topic.
    test = rows(len(TOPICS), 1, kind) if kind != "cosine" else rows(40, 1, kind)
    task, columns = fitted(train, objective=objective)
    assert (task.objective, task.main_metric) == (kind, metric)
    assert task.check(test, columns) == []
    examples = task.encode(train, columns, tokenizer, TEXT, training=True)
    model = learn(task, tokenizer, examples, epochs=20 if kind == "cosine" else 12, rows=12)
    predictions = predict(task, model, tokenizer, test, columns, TEXT)
    metrics = task.evaluate(predictions, test, columns)
    if kind == "cosine":
        assert metrics["pearson"] > 0.95
        assert np.array_equal(
            np.array([item["similarity"] > 0.5 for item in predictions]), np.array(test["score"]) == 5
        )
    else:
        assert metrics[metric] == 1.0
        assert metrics["recall_at_1"] == (1.0 if kind == "contrastive" else metrics["recall_at_1"])
    json.dumps([predictions, metrics], allow_nan=False)


def vectors(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64)


def examples_of(rows: int, kinds: int, targets: list[float] | None = None) -> list[Example]:
    """Texts that are all different, in the order the task encodes them."""
    return [
        Example(row, [row, kind], [0, 0], None if targets is None else targets[row], kind)
        for row in range(rows)
        for kind in range(kinds)
    ]


def test_the_contrastive_loss_by_hand() -> None:
    task, _ = fitted(rows(12, 0, "contrastive"), temperature=0.2)
    x = vectors(12, 1)
    anchors, pairs, negatives = F.normalize(x, dim=-1).view(4, 3, 5).unbind(1)
    expected = 0.0
    for row in range(4):
        among = torch.stack([anchors[row] @ other / 0.2 for other in (*pairs, *negatives)])
        expected += float(among.logsumexp(0) - among[row])
    assert float(task.loss(x, examples_of(4, 3), LossOptions())) == pytest.approx(expected, rel=1e-9)
    assert task.weight(examples_of(4, 3), LossOptions()) == 4


def test_a_pair_that_is_there_twice_is_no_wrong_answer() -> None:
    task, _ = fitted(rows(12, 0, "contrastive"))
    x = vectors(4, 2)
    different = [Example(0, [1], [0], None, 0), Example(0, [2], [0], None, 1), Example(1, [3], [0], None, 0)]
    twice = [*different, Example(1, [2], [0], None, 1)]
    assert float(task.loss(x, twice, LossOptions())) == 0.0
    itself = [*different, Example(1, [1], [0], None, 1)]
    first = float(task.loss(x, itself, LossOptions()))
    unit = F.normalize(x, dim=-1)
    # Row 0 may not be told from its own text; row 1 has to be told from row 0's pair.
    among = torch.stack([unit[2] @ unit[1], unit[2] @ unit[3]]) / task.options.temperature
    assert first == pytest.approx(float(among.logsumexp(0) - among[1]), rel=1e-9)


def test_the_other_losses_by_hand() -> None:
    x = vectors(9, 3)
    anchors, pairs, negatives = F.normalize(x, dim=-1).view(3, 3, 5).unbind(1)
    task, _ = fitted(rows(6, 0, "triplet"), objective="triplet", margin=0.4)
    gaps = (anchors * pairs).sum(1) - (anchors * negatives).sum(1)
    expected = (0.4 - gaps).clamp(min=0).sum()
    torch.testing.assert_close(task.loss(x, examples_of(3, 3), LossOptions()), expected, rtol=1e-9, atol=0)
    task, _ = fitted(rows(6, 0, "cosine"))
    x = vectors(6, 4)
    targets = [0.0, 0.25, 1.0]
    found = task.loss(x, examples_of(3, 2, targets), LossOptions())
    cosines = F.cosine_similarity(x[0::2], x[1::2])
    torch.testing.assert_close(found, F.mse_loss(cosines, torch.tensor(targets).double(), reduction="sum"))


def test_scores_become_cosines_from_0_to_1(tokenizer: Tokenizer) -> None:
    table = rows(12, 0, "cosine")
    task, columns = fitted(table)
    assert (task.low, task.high) == (1.0, 5.0)
    found = task.encode(table, columns, tokenizer, TEXT, training=True)
    assert [example.target for example in found if example.extra == 0] == [(score - 1) / 4 for score in table["score"]]
    task, _ = fitted(table, score_low=0.0, score_high=10.0)
    assert {example.target for example in task.encode(table, columns, tokenizer, TEXT, training=True)} == {0.1, 0.5}
    again = task_from_config(json.loads(json.dumps({CONFIG_KEY: task_entry(task)})))
    assert again.settings() == {"objective": "cosine", "low": 0.0, "high": 10.0}
    assert again.main_metric == "spearman"
    assert task.check(table.with_column("score", [11] * 12), columns) == ["made up: 12 scores are outside 0.0 to 10.0"]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "pooler"])
def test_texts_alone_get_the_vectors_of_encode(
    pooling: str, tokenizer: Tokenizer, models_for: Callable[..., Any], predict: Callable[..., Any]
) -> None:
    task, _ = fitted(rows(12, 0, "contrastive"), pooling=pooling)
    ours, theirs = models_for(task, tokenizer)
    texts = ["the cat", "my old dog the sea", "tea"]
    table, columns = Table({"text": texts}), {"text": "text"}
    expected = encode(ours, tokenizer, texts, pooling=pooling)
    for model in (ours, theirs):
        found = predict(task, model, tokenizer, table, columns, TEXT)
        torch.testing.assert_close(torch.tensor([item["vector"] for item in found]), expected, rtol=1e-5, atol=1e-6)


def test_ranks_by_hand() -> None:
    table = Table({"text": ["a", "b", "c"], "positive": ["x", "y", "x"]})
    task, columns = fitted(table)
    angles = {"a": 0.0, "b": 1.0, "c": 1.2, "x": 0.5, "y": 0.1}  # b and c are closer to x than to y
    order = ["a", "x", "b", "y", "c", "x"]
    outputs = [np.array([np.cos(angles[name]), np.sin(angles[name])]) for name in order]
    examples = [Example(i // 2, [0], [0], None, i % 2) for i in range(6)]
    found = task.decode(outputs, examples, table, columns)
    assert [item["rank"] for item in found] == [2, 2, 1], "x, which is there twice, counts once"
    assert found[0]["similarity"] == pytest.approx(np.cos(0.5))
    metrics = task.evaluate(found, table, columns)
    assert metrics["mrr"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3)
    assert metrics["recall_at_1"] == pytest.approx(1 / 3)
    assert metrics["recall_at_5"] == 1.0


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"text": ["a"]}, {}, "the objective contrastive needs a column for text_pair; it has text"),
        ({"text": ["a"], "positive": ["b"]}, {"objective": "triplet"}, "needs a column for negative"),
        ({"text": ["a"], "positive": ["b"], "score": ["x"]}, {}, "row 1: 'score' holds 'x'; expected a number"),
        ({"text": ["a"], "positive": ["b"], "score": [3]}, {}, "scores from 3.0 to 3.0; expected different ones"),
        ({"text": [], "positive": []}, {}, "there are no rows"),
        ({"text": ["a"], "positive": ["b"]}, {"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_can_not_be_learnt(columns: dict[str, list[Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(Table(columns), **options)
