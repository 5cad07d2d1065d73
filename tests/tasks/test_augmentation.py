"""Augmentation: what changes, how much of it, and that it is a function of (seed, epoch, row)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from bert_fast.tasks.augmentation import Augmenter, change_words, read_synonyms
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import AugmentSettings, TextSettings
from bert_fast.tasks.task import make_task

WORDS = [f"w{number}" for number in range(200)]
TEXT = " ".join(WORDS)


def changed(seed: int = 0, text: str = TEXT, **settings: Any) -> list[str]:
    return change_words(text, AugmentSettings(**settings), {}, np.random.default_rng(seed)).split()


def test_deletion_keeps_the_order() -> None:
    words = changed(delete=0.3)
    assert 120 <= len(words) <= 160
    assert words == [word for word in WORDS if word in set(words)]
    assert {len(changed(seed, "one two", delete=0.99)) for seed in range(20)} == {1}


def test_duplicated_words_are_adjacent() -> None:
    words = changed(duplicate=0.3)
    assert 240 <= len(words) <= 280
    assert list(dict.fromkeys(words)) == WORDS
    assert max(Counter(words).values()) == 2


def test_swaps_keep_the_words_and_move_their_share() -> None:
    words = changed(swap=0.2)
    assert sorted(words) == sorted(WORDS)
    assert 20 <= sum(a != b for a, b in zip(words, WORDS, strict=True)) <= 60


def test_synonyms_are_of_the_same_line(tmp_path: Path) -> None:
    (tmp_path / "synonyms.txt").write_text("good, fine, very great\n\nbad,poor\nalone\ngood, nice\n")
    synonyms = read_synonyms(tmp_path / "synonyms.txt")
    assert synonyms == {
        "good": ["fine", "very great", "nice"], "fine": ["good", "very great"], "very great": ["good", "fine"],
        "nice": ["good"], "bad": ["poor"], "poor": ["bad"],
    }  # fmt: skip
    settings = AugmentSettings(synonym=0.5, synonyms="x")
    words = change_words("Good bad it " * 100, settings, synonyms, np.random.default_rng(1)).split()
    counts = Counter(words)
    assert counts["it"] == 100
    assert 30 <= counts["poor"] <= 70
    assert 100 - counts["poor"] == counts["bad"]
    assert min(counts["fine"], counts["nice"], counts["very"], counts["Good"]) > 5
    (tmp_path / "empty.txt").write_text("alone\n")
    with pytest.raises(ValueError, match="has no line with two words"):
        read_synonyms(tmp_path / "empty.txt")


def test_chinese_is_changed_by_characters() -> None:
    text = "今天天气很好我们去公园"
    shorter = change_words(text, AugmentSettings(delete=0.4), {}, np.random.default_rng(0))
    assert 0 < len(shorter) < len(text)
    assert " " not in shorter
    assert change_words("  ", AugmentSettings(delete=0.4), {}, np.random.default_rng(0)) == "  "


@pytest.fixture(scope="module")
def tokenizer(tokenizer_of: Callable[..., Tokenizer]) -> Tokenizer:
    return tokenizer_of(TEXT)


def augmenter(tokenizer: Tokenizer, rows: int = 40, seed: int = 3, **settings: Any) -> Augmenter:
    task = make_task("classification")
    texts = [" ".join(WORDS[row : row + 10]) for row in range(rows)]
    table = Table({"text": texts, "label": [str(row % 2) for row in range(rows)]})
    columns = {"text": "text", "label": "label"}
    task.fit(table, columns)
    return Augmenter(task, table, columns, tokenizer, TextSettings(32), AugmentSettings(**settings), seed)


def ids(examples: Any) -> list[list[int]]:
    return [list(example.input_ids) for example in examples]


def test_a_row_depends_on_seed_epoch_and_row_alone(tokenizer: Tokenizer) -> None:
    settings = {"delete": 0.2, "mask": 0.1}
    first = ids(augmenter(tokenizer, **settings).examples(1))
    assert ids(augmenter(tokenizer, **settings).examples(1)) == first
    assert ids(augmenter(tokenizer, rows=20, **settings).examples(1)) == first[:20]
    assert ids(augmenter(tokenizer, **settings).examples(2)) != first
    assert ids(augmenter(tokenizer, seed=4, **settings).examples(1)) != first


def test_masking_skips_special_tokens(tokenizer: Tokenizer) -> None:
    plain = ids(augmenter(tokenizer).examples(0))
    masked = augmenter(tokenizer, mask=0.5).examples(0)
    mask = tokenizer.token_to_id("[MASK]")
    pairs = [(a, b) for one, other in zip(plain, ids(masked), strict=True) for a, b in zip(one, other, strict=True)]
    assert {b for a, b in pairs if a != b} == {mask}
    assert 0.35 < sum(b == mask for _, b in pairs) / len(pairs) < 0.5  # 10 of 12 tokens are words
    assert all(example.input_ids[0] == 2 and example.input_ids[-1] == 3 for example in masked)
    assert [example.target for example in masked] == [row % 2 for row in range(40)]


def test_only_a_share_of_the_rows_is_changed(tokenizer: Tokenizer) -> None:
    plain = ids(augmenter(tokenizer, rows=190).examples(0))
    rows_augmenter = augmenter(tokenizer, rows=190, delete=0.5)
    rows_augmenter.settings = AugmentSettings(delete=0.5, rows=0.3)
    same = sum(a == b for a, b in zip(plain, ids(rows_augmenter.examples(0)), strict=True))
    assert 110 <= same <= 155


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delete": 1.0}, "augment.delete is 1.0; expected a share in [0, 1)"),
        ({"rows": 0.0}, "augment.rows is 0.0"),
        ({"synonym": 0.1}, "augment.synonym is 0.1 and augment.synonyms is None; set both or neither"),
    ],
)
def test_settings_that_are_refused(settings: Any, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        AugmentSettings(**settings)
    assert message in str(error.value)


def test_words_are_not_changed_if_targets_depend_on_them(tokenizer: Tokenizer) -> None:
    task = make_task("token-classification")
    table, columns = Table({"tokens": [["w1", "w2"]], "tags": [["O", "B-X"]]}), {"tokens": "tokens", "tags": "tags"}
    task.fit(table, columns)
    with pytest.raises(ValueError, match="on which the targets of token-classification depend; expected only mask"):
        Augmenter(task, table, columns, tokenizer, TextSettings(), AugmentSettings(swap=0.1), 0)
    examples = Augmenter(task, table, columns, tokenizer, TextSettings(), AugmentSettings(mask=0.9), 0).examples(0)
    assert tokenizer.token_to_id("[MASK]") in examples[0].input_ids
    assert list(examples[0].target)[1:3] == [task.labels.index("O"), task.labels.index("B-X")]  # type: ignore[attr-defined]
