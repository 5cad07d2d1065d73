"""Cross-encoders: learning from labels and from negatives, losses and metrics by hand, the result in other readers."""

from __future__ import annotations

import importlib
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

import bert_fast
from bert_fast._config import from_mapping
from bert_fast.finetune import FinetuneConfig, finetune
from bert_fast.tasks.io.columns import choose_columns
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.metrics import ranking_metrics
from bert_fast.tasks.rerank import Rerank
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import CONFIG_KEY, Example, LossOptions, make_task, task_entry, task_from_config

TEXT = TextSettings(max_length=16)
TOPICS = ["cat", "dog", "car"]
FILLERS = ["the", "my"]
AGES = ["old", "new"]


def rows(count: int, seed: int, *, negatives: bool) -> Table:
    """A relevant text is old, another is new, whatever the query: a few epochs teach that to two small layers."""
    generator = random.Random(seed)
    columns: dict[str, list[Any]] = {"query": [], "positive": [], "negative": [], "negative_2": [], "label": []}
    for number in range(count):
        topic = TOPICS[number % len(TOPICS)]
        words = ["old", "new", "new"]
        texts = [f"{generator.choice(FILLERS)} {word} {generator.choice(TOPICS)}" for word in words]
        label = generator.random() < 0.5
        columns["query"].append(topic)
        columns["positive"].append(texts[0] if label or negatives else texts[1])
        columns["negative"].append(texts[1])
        columns["negative_2"].append(texts[2] if number % 3 else "")
        columns["label"].append(int(label))
    drop = ("label",) if negatives else ("negative", "negative_2")
    return Table({name: values for name, values in columns.items() if name not in drop}, "made up")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of: Callable[..., Tokenizer]) -> Tokenizer:
    return tokenizer_of(" ".join([*FILLERS, *AGES, *TOPICS]))


def fitted(table: Table, **options: Any) -> tuple[Rerank, dict[str, str]]:
    task = make_task("rerank", options)
    assert isinstance(task, Rerank)
    columns = choose_columns(table, task.roles)
    task.fit(table, columns)
    return task, columns


@pytest.mark.parametrize("objective", ["bce", "listwise"])
def test_relevant_texts_are_ranked_first(
    objective: str, tokenizer: Tokenizer, learn: Callable[..., Any], predict: Callable[..., Any]
) -> None:
    negatives = objective == "listwise"
    train, test = rows(240, 0, negatives=negatives), rows(60, 1, negatives=negatives)
    task, columns = fitted(train)
    assert (task.objective, task.main_metric) == (objective, "ndcg_at_10")
    assert task.check(test, columns) == []
    examples = task.encode(train, columns, tokenizer, TEXT, training=True)
    model = learn(task, tokenizer, examples, epochs=8, rows=16)
    predictions = predict(task, model, tokenizer, test, columns, TEXT)
    metrics = task.evaluate(predictions, test, columns)
    assert metrics["queries"] == len(TOPICS)
    # 1.0 with each of six seeds of the rows.
    assert metrics["ndcg_at_10"] > 0.95, "chance is 0.5, with negatives 0.4"
    json.dumps([predictions, metrics], allow_nan=False)


def examples_of(sizes: list[int], targets: list[float]) -> list[Example]:
    kinds = [(row, number > 0) for row, size in enumerate(sizes) for number in range(size)]
    return [Example(row, [0], [0], target, extra) for (row, extra), target in zip(kinds, targets, strict=True)]


def test_the_losses_by_hand() -> None:
    logits = torch.tensor([0.3, -1.2, 2.0, 0.7, 0.1], dtype=torch.float64)
    task, _ = fitted(rows(12, 0, negatives=True))
    examples = examples_of([3, 2], [1.0, 0.0, 0.0, 1.0, 0.0])
    expected = math.log(math.exp(0.3) + math.exp(-1.2) + math.exp(2.0)) - 0.3
    expected += math.log(math.exp(0.7) + math.exp(0.1)) - 0.7
    # float64 (eps 2.2e-16), sums of 3 terms.
    assert float(task.loss(logits, examples, LossOptions())) == pytest.approx(expected, rel=1e-9)
    assert task.weight(examples, LossOptions()) == 2
    task, _ = fitted(rows(12, 0, negatives=False))
    targets = [1.0, 0.0, 0.25, 1.0, 0.5]
    examples = examples_of([1] * 5, targets)
    shares = [1 / (1 + math.exp(-float(x))) for x in logits]
    expected = -sum(y * math.log(p) + (1 - y) * math.log(1 - p) for y, p in zip(targets, shares, strict=True))
    # float64 (eps 2.2e-16), sums of 5 terms.
    assert float(task.loss(logits, examples, LossOptions())) == pytest.approx(expected, rel=1e-9)
    assert task.weight(examples, LossOptions()) == 5


def test_a_negative_of_several_rows_counts_once() -> None:
    """The texts of a query are A, B (relevant), C and D, in this order of their scores: nothing is out of place."""
    table = Table(
        {"query": ["q", "q"], "positive": ["A", "B"], "negative": ["B", "C"], "negative_2": ["C", "D"]}, "made up"
    )
    task, columns = fitted(table)
    predictions = [{"score": 0.9, "negative_scores": [0.8, 0.2]}, {"score": 0.8, "negative_scores": [0.2, 0.1]}]
    metrics = task.evaluate(predictions, table, columns)
    assert metrics == ranking_metrics([([1.0, 0.0, 1.0, 0.0], [0.9, 0.2, 0.8, 0.1])])
    assert (metrics["ndcg_at_10"], metrics["mrr_at_10"], metrics["average_precision"]) == (1.0, 1.0, 1.0)


def test_metrics_by_hand() -> None:
    first = ([0.0, 1.0, 0.0, 1.0], [0.9, 0.8, 0.1, 0.2])  # relevant at ranks 2 and 3
    tied = ([1.0, 0.0], [0.5, 0.5])
    metrics = ranking_metrics([first, tied, ([1.0], [0.3])])
    best = 1 + 1 / math.log2(3)
    ndcg = [(1 / math.log2(3) + 1 / 2) / best, (1 + 1 / math.log2(3)) / 2]
    assert metrics["ndcg_at_10"] == pytest.approx(np.mean(ndcg), rel=1e-12)
    assert metrics["mrr_at_10"] == pytest.approx((1 / 2 + 1 / 2) / 2), "a tie counts against the relevant text"
    assert metrics["queries"] == 2, "one text alone has no order"
    late = ([1.0] + [0.0] * 10, [0.0] + [1.0] * 10)
    assert ranking_metrics([late])["mrr_at_10"] == 0.0
    assert ranking_metrics([([0.2], [0.1]), ([0.7], [0.9])]) == {
        "ndcg_at_10": None, "mrr_at_10": None, "queries": 0, "average_precision": None, "spearman": pytest.approx(1.0),
    }  # fmt: skip
    with pytest.raises(ValueError, match="the table is empty"):
        ranking_metrics([])


def test_the_main_metric_follows_from_the_rows() -> None:
    pairs = {"query": ["a", "b"], "text": ["c", "d"]}
    for labels, queries, metric in (
        ([0, 1], ["a", "a"], "ndcg_at_10"),
        ([0, 1], ["a", "b"], "average_precision"),
        ([0.2, 1], ["a", "b"], "spearman"),
    ):
        task, _ = fitted(Table({**pairs, "query": queries, "label": labels}))
        again = task_from_config(json.loads(json.dumps({CONFIG_KEY: task_entry(task)})))
        assert again.main_metric == metric
        assert again.settings() == task.settings()


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"query": ["a"], "text": ["b"]}, {}, "no column for label among query, text, required by the objective bce"),
        ({"query": ["a"]}, {}, "no column for text_pair among query"),
        ({"query": ["a"], "positive": ["b"], "label": [1]}, {"objective": "listwise"}, "no column for negative among"),
        ({"query": ["a"], "text": ["b"], "label": [3]}, {}, "row 1: 'label' holds 3; expected 0 to 1"),
        ({"query": ["a"], "text": ["b"], "label": [1]}, {}, "every row has the label 1.0; expected different labels"),
        ({"query": [], "text": [], "label": []}, {}, "the table is empty"),
    ],
    ids=["no label", "no text", "no negatives", "range", "one label", "empty"],
)
def test_invalid_rows(columns: dict[str, list[Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fitted(Table(columns), **options)


def test_other_truncations_are_refused(tokenizer: Tokenizer) -> None:
    table = rows(6, 0, negatives=True)
    task, columns = fitted(table)
    for settings in (TextSettings(long="tail"), TextSettings(truncation="only_second")):
        with pytest.raises(ValueError, match="expected head and longest_first, as rerankers truncate"):
            task.encode(table, columns, tokenizer, settings, training=True)


def test_a_result_has_the_same_scores_everywhere(tmp_path: Path) -> None:
    """In predictions, `rerank`, and CrossEncoder, also of pairs longer than text.max_length."""
    base = tmp_path / "base"
    base.mkdir()
    (base / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *AGES, *TOPICS]) + "\n"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = bert_fast.BertConfig(
        vocab_size=5 + len(FILLERS) + len(AGES) + len(TOPICS),
        max_position_embeddings=32,
        initializer_range=0.2,
        **sizes,
    )
    bert_fast.BertModel(config).save_pretrained(base)
    train = rows(60, 0, negatives=False)
    lines = [json.dumps(train.row(row)) for row in range(len(train))]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    values = {
        "task": "rerank", "model": base, "output_dir": tmp_path / "run", "data": {"train": tmp_path / "train.jsonl"},
        "text": {"max_length": 9}, "optimizer": {"lr": 3e-3}, "epochs": 2.0, "progress": False, "report": False,
        "device": "cpu",
    }  # fmt: skip
    result = finetune(from_mapping(FinetuneConfig, values), report=lambda _: None)
    query, texts = "the cat", ["my old cat", "the dog", "old car " * 10, "my car the dog my old old cat"]
    model = bert_fast.BertForSequenceClassification.from_pretrained(result.folder).eval()
    scores = model.rerank(query, texts)
    predictions = bert_fast.tasks.prediction.predict(
        model,
        result.task,
        model.source_tokenizer(),
        Table({"query": [query] * len(texts), "text": texts}),
        {"text": "query", "text_pair": "text"},
    )
    # float32 (eps 1.2e-7): the same logits in other batches.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(torch.tensor([item["score"] for item in predictions]), scores, **close)
    encoder = importlib.import_module("sentence_transformers").CrossEncoder(result.folder, device="cpu")
    theirs = torch.from_numpy(encoder.predict([(query, text) for text in texts]))
    torch.testing.assert_close(theirs, scores, **close)
    assert len({round(score, 6) for score in scores.tolist()}) == len(texts), "the scores differ"
