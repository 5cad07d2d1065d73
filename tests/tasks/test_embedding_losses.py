"""The losses on scores and negatives by hand, Matryoshka widths, and several negatives of a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from bert_fast.tasks.io.columns import choose_columns
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.sentence_embedding import SentenceEmbedding
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Example, LossOptions, make_task

TEXTS = {"text": ["a", "b", "c"], "positive": ["d", "e", "f"]}
SCORES = [0.2, 0.9, 0.5]


def fitted(columns: dict[str, list[Any]], **options: Any) -> tuple[SentenceEmbedding, Table, dict[str, str]]:
    task, table = make_task("sentence-embedding", options), Table(columns)
    assert isinstance(task, SentenceEmbedding)
    chosen = choose_columns(table, task.roles)
    task.fit(table, chosen)
    return task, table, chosen


def vectors(count: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def examples(kinds: Sequence[int], targets: Sequence[float] | None = None) -> list[Example]:
    """Distinct texts of these kinds; a kind of 0 begins a row."""
    rows = np.cumsum([kind == 0 for kind in kinds]) - 1
    return [
        Example(int(row), [number], [0], None if targets is None else targets[row], kind)
        for number, (row, kind) in enumerate(zip(rows, kinds, strict=True))
    ]


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def test_cosent_by_hand() -> None:
    task, _, _ = fitted({**TEXTS, "score": SCORES}, objective="cosent", temperature=0.1)
    assert task.main_metric == "spearman"
    x = vectors(6)
    cosines = [cosine(x[2 * row], x[2 * row + 1]) for row in range(3)]
    total = sum(math.exp((cosines[i] - cosines[j]) / 0.1) for i in range(3) for j in range(3) if SCORES[i] < SCORES[j])
    loss = task.loss(x, examples([0, 1] * 3, SCORES), LossOptions())
    # float64 (eps 2.2e-16), sums of 6 and 4 terms.
    assert float(loss) == pytest.approx(3 * math.log1p(total), rel=1e-9)
    equal = task.loss(x, examples([0, 1] * 3, [0.5] * 3), LossOptions())
    assert float(equal) == 0.0, "equal scores have no order"


@pytest.mark.parametrize("second", [False, True], ids=["margins", "scores of both"])
def test_margin_mse_by_hand(second: bool, tokenizer_of: Callable[..., Tokenizer]) -> None:
    columns = {**TEXTS, "negative": ["g", "h", "i"], "score": SCORES}
    others = [0.1, 0.3, 0.9]
    if second:
        columns["negative_score"] = others
    margins = [score - other * second for score, other in zip(SCORES, others, strict=True)]
    task, table, chosen = fitted(columns, objective="margin_mse")
    found = task.encode(table, chosen, tokenizer_of("a b c d e f g h i"), TextSettings(max_length=8), training=True)
    assert [example.target for example in found if example.extra == 0] == pytest.approx(margins, rel=1e-12)
    x = vectors(9)
    expected = sum(
        (float(x[3 * row] @ x[3 * row + 1]) - float(x[3 * row] @ x[3 * row + 2]) - margins[row]) ** 2
        for row in range(3)
    )
    # float64 (eps 2.2e-16), sums of 6 and 3 terms.
    assert float(task.loss(x, found, LossOptions())) == pytest.approx(expected, rel=1e-9)


KINDS = [0, 1, 2, 3, 0, 1, 2]  # the second row has one negative less


def test_the_negatives_of_all_rows_are_candidates() -> None:
    task, _, _ = fitted({**TEXTS, "negative": ["g", "h", "i"], "negative_2": ["j", "", "k"]}, temperature=0.3)
    x = vectors(7)
    candidates = [1, 5, 2, 3, 6]
    expected = 0.0
    for text, pair in ((0, 1), (4, 5)):
        total = sum(math.exp(cosine(x[text], x[other]) / 0.3) for other in candidates)
        expected += math.log(total) - cosine(x[text], x[pair]) / 0.3
    # float64 (eps 2.2e-16), sums of 6 and 5 terms.
    assert float(task.loss(x, examples(KINDS), LossOptions())) == pytest.approx(expected, rel=1e-9)


def test_the_triplet_loss_is_the_mean_over_the_negatives_of_a_row() -> None:
    task, _, _ = fitted(
        {**TEXTS, "negative": ["g", "h", "i"], "negative_2": ["j", "", "k"]}, objective="triplet", margin=2.0
    )
    x = vectors(7)
    gaps = [[2.0 - cosine(x[0], x[1]) + cosine(x[0], x[n]) for n in (2, 3)], [2.0 - cosine(x[4], x[5])]]
    gaps[1][0] += cosine(x[4], x[6])
    expected = sum(sum(row) / len(row) for row in gaps)
    # float64 (eps 2.2e-16), sums of 6 and 3 terms.
    assert float(task.loss(x, examples(KINDS), LossOptions())) == pytest.approx(expected, rel=1e-9)


def test_empty_further_negatives_are_left_out(tokenizer_of: Callable[..., Tokenizer]) -> None:
    task, table, columns = fitted({**TEXTS, "negative": ["g", "h", "i"], "negative_2": ["j", "", None]})
    assert list(columns) == ["text", "text_pair", "negative", "negative_2"]
    found = task.encode(table, columns, tokenizer_of("a b c d e f g h i j"), TextSettings(max_length=8), training=False)
    assert [(item.row, item.extra) for item in found] == [
        (0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2),
    ]  # fmt: skip
    angles = {0: 0.0, 1: 0.3, 2: 0.5, 3: 0.2}
    outputs = [np.array([np.cos(angles[item.extra]), np.sin(angles[item.extra])]) for item in found]
    predictions = task.decode(outputs, found, table, columns)
    closest = [item["negative_similarity"] for item in predictions]
    assert closest == pytest.approx([np.cos(0.2), np.cos(0.5), np.cos(0.5)])
    assert task.evaluate(predictions, table, columns)["triplet_accuracy"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("objective", ["contrastive", "cosent", "triplet", "cosine", "margin_mse"])
def test_the_loss_over_widths_is_the_weighted_sum_of_theirs(objective: str) -> None:
    columns = {**TEXTS, "negative": ["g", "h", "i"], "score": SCORES}
    plain, _, _ = fitted(columns, objective=objective)
    task, _, _ = fitted(columns, objective=objective, widths=[6, 2], width_weights=[1.0, 0.5])
    x, found = vectors(9), examples([0, 1, 2] * 3, SCORES)
    options = LossOptions()
    expected = plain.loss(x, found, options) + 0.5 * plain.loss(x[:, :2].contiguous(), found, options)
    # float64 (eps 2.2e-16): the same operations on the same values.
    torch.testing.assert_close(task.loss(x, found, options), expected, rtol=1e-12, atol=0)


def test_wrong_widths() -> None:
    for options, message in (
        ({"widths": []}, r"options.widths is \[\]; expected different numbers of 1 or more"),
        ({"widths": [2, 2]}, "expected different numbers"),
        ({"widths": [2], "width_weights": [1.0, 2.0]}, "a number above 0 for each of options.widths"),
        ({"width_weights": [1.0]}, "a number above 0 for each of options.widths, None"),
    ):
        with pytest.raises(ValueError, match=message):
            make_task("sentence-embedding", options)
    task, _, _ = fitted(TEXTS, widths=[6, 8])
    with pytest.raises(ValueError, match=r"options\.widths has 8; expected at most the vectors' 6"):
        task.loss(vectors(6), examples([0, 1] * 3), LossOptions())


def test_margin_mse_needs_one_negative() -> None:
    columns = {**TEXTS, "negative": ["g", "h", "i"], "negative_2": ["j", "k", "l"], "score": SCORES}
    with pytest.raises(ValueError, match="margin_mse has the columns negative_2; expected one negative for each row"):
        fitted(columns, objective="margin_mse")
