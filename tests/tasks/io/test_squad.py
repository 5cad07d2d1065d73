"""SQuAD: file format, answers and metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bert_fast.tasks.io.sources import read_table
from bert_fast.tasks.io.squad import (
    Answer,
    answer_f1,
    best_match,
    best_threshold,
    exact_match,
    is_squad,
    locate_answer,
    read_answers,
    squad_table,
)

CONTEXT = "Ada met Charles in 1833."


def squad(*questions: dict[str, Any]) -> dict[str, Any]:
    return {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": CONTEXT, "qas": list(questions)}]}]}


def test_one_row_per_question(tmp_path: Path) -> None:
    answers = [{"text": "1833", "answer_start": 19}]
    content = squad(
        {"id": "a", "question": "When?", "answers": answers},
        {"id": 7, "question": "Where?", "answers": [], "is_impossible": True, "plausible_answers": answers},
    )
    assert is_squad(content)
    table = squad_table(content, "file.json")
    assert table.columns == {
        "id": ["a", "7"],
        "title": ["T", "T"],
        "question": ["When?", "Where?"],
        "context": [CONTEXT, CONTEXT],
        "answers": [answers, []],
        "is_impossible": [False, True],
    }
    assert table.where(1) == "file.json, question 2"
    (tmp_path / "dev.json").write_text(json.dumps(content))
    assert read_table(tmp_path / "dev.json").columns == table.columns
    assert not is_squad({"data": [1, 2]})
    assert not is_squad([{"paragraphs": []}])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"paragraphs": [{"qas": []}]}], "article 1, paragraph 1 lacks context or qas"),
        ([{"paragraphs": [{"context": "c", "qas": [{"id": 1}]}]}], "paragraph 1 has an entry in qas without question"),
        ([{"paragraphs": [{"context": "c", "qas": 1}]}], "paragraph 1 has no list of qas"),
        ([{"paragraphs": 1}], "article 1 has no list of paragraphs"),
    ],
    ids=["no context", "no question", "no questions", "no paragraphs"],
)
def test_malformed_files(data: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"x.json: .*{message}"):
        squad_table({"data": data}, "x.json")


@pytest.mark.parametrize(
    ("value", "start", "expected"),
    [
        ([{"text": "a", "answer_start": 3}, {"text": "b"}], None, [Answer("a", 3), Answer("b", None)]),
        ({"text": ["a", "b"], "answer_start": [3, 4]}, None, [Answer("a", 3), Answer("b", 4)]),
        ({"text": [], "answer_start": []}, None, []),
        ({"text": "a", "answer_start": 3}, None, [Answer("a", 3)]),
        ("a", "3", [Answer("a", 3)]),
        ("a", None, [Answer("a", None)]),
        (["a", ""], None, [Answer("a", None)]),
        (None, None, []),
        ("", 5, []),
        (" a ", 3.0, [Answer("a", 4)]),
        ("a", "3.0", [Answer("a", 3)]),
        ("a", float("nan"), [Answer("a", None)]),
        ("a", -1, [Answer("a", None)]),
        ([{"text": "a", "answer_start": "3"}], None, [Answer("a", 3)]),
        ({"text": np.array(["a"]), "answer_start": np.array([3])}, None, [Answer("a", 3)]),
        ("{'text': ['a'], 'answer_start': [3]}", None, [Answer("a", 3)]),
        ('[{"text": "a", "answer_start": 3}]', None, [Answer("a", 3)]),
        ("[1]", 0, [Answer("[1]", 0)]),
        ("{text", 0, [Answer("{text", 0)]),
    ],
    ids=str,
)
def test_forms_of_answers(value: Any, start: Any, expected: list[Answer]) -> None:
    assert read_answers(value, start) == expected


@pytest.mark.parametrize("prefix", ["", "é", "中文 ", "🙂 ", "a🙂é中"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-32-le"])
def test_starts_in_bytes_and_in_units_of_utf_16_are_placed(prefix: str, encoding: str) -> None:
    """The answer occurs twice; Python, Java or JavaScript, and a program on bytes counted where it starts."""
    for first in (prefix + "Ada ", prefix + "Ada " * 2):
        context = first + "Ada."
        start = len(first.encode(encoding)) // {"utf-8": 1, "utf-16-le": 2, "utf-32-le": 4}[encoding]
        assert locate_answer(Answer("Ada", start), context) == len(first)


@pytest.mark.parametrize("start", ["x", 1.5, True, [1], "1e999"], ids=str)
def test_starts_that_are_not_numbers_of_characters(start: Any) -> None:
    with pytest.raises(ValueError, match=r"the start of an answer is .*; expected a number of characters"):
        read_answers("a", start)


@pytest.mark.parametrize("value", [7, [7], {"text": ["a"], "answer_start": []}, [{"text": 5}]], ids=str)
def test_values_that_are_not_answers(value: Any) -> None:
    with pytest.raises(ValueError, match="is not an answer; expected a string"):
        read_answers(value)


def test_answers_are_located_in_the_context() -> None:
    context = "aba, aba"
    assert locate_answer(Answer("aba", 5), context) == 5
    assert locate_answer(Answer("aba", None), context) == 0
    assert locate_answer(Answer("aba", 3), context) is None
    assert locate_answer(Answer("aba", 3), context, nearest=True) == 5
    assert locate_answer(Answer("aba", 4), context) == 5, "one character away"
    assert locate_answer(Answer("aba", 999), context) is None, "two places may be meant"
    assert locate_answer(Answer(", ", 999), context) == 3, "the only occurrence"
    assert locate_answer(Answer("a", 1), context, nearest=True) in (0, 2)
    assert locate_answer(Answer("c", 1), context, nearest=True) is None


@pytest.mark.parametrize(
    ("predicted", "gold", "exact", "f1"),
    [
        ("The Cat!", "cat", 1.0, 1.0),
        ("a cat sat", "cat", 0.0, 2 / 3),
        ("cat cat", "cat", 0.0, 2 / 3),
        ("cat sat", "sat cat", 0.0, 1.0),
        ("U.S.", "us", 1.0, 1.0),
        ("dog", "cat", 0.0, 0.0),
        ("the", "", 1.0, 1.0),
        ("", "cat", 0.0, 0.0),
    ],
)
def test_answers_are_compared_as_squad_does(predicted: str, gold: str, exact: float, f1: float) -> None:
    assert exact_match(predicted, gold) == exact
    assert answer_f1(predicted, gold) == pytest.approx(f1)


@pytest.mark.parametrize(
    ("predicted", "gold", "exact", "f1"),
    [
        ("歐洲", "歐洲。", 1.0, 1.0),
        ("在歐洲", "歐洲", 0.0, 4 / 5),
        ("1833年", "1833", 0.0, 2 / 3),
        ("IBM公司", "ibm 公司", 1.0, 1.0),
        ("《史記》", "史記", 1.0, 1.0),
    ],
)
def test_chinese_is_compared_by_characters(predicted: str, gold: str, exact: float, f1: float) -> None:
    assert exact_match(predicted, gold, "characters") == exact
    assert answer_f1(predicted, gold, "characters") == pytest.approx(f1)


def test_the_best_of_several_gold_answers_counts() -> None:
    assert best_match("in 1833", ["1833", "in 1833.", "33"], "words") == (1.0, 1.0)
    assert best_match("", [], "words") == (1.0, 1.0)
    assert best_match("1833", [], "words") == (0.0, 0.0)
    assert best_match("", ["1833"], "words") == (0.0, 0.0)
    assert best_match("", ["the", "1833"], "words") == (0.0, 0.0), "an empty gold answer is ignored"


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.booleans(), st.integers(-3, 3)), min_size=1, max_size=8))
def test_the_best_threshold_is_optimal(questions: list[tuple[float, bool, int]]) -> None:
    scores, answerable, differences = (list(part) for part in zip(*questions, strict=True))

    def mean(threshold: float) -> float:
        total = sum(
            (score if has else 0.0) if difference <= threshold else float(not has)
            for score, has, difference in questions
        )
        return total / len(questions)

    threshold, score = best_threshold(scores, answerable, differences)
    assert mean(threshold) == pytest.approx(score)
    assert score == pytest.approx(max(mean(candidate) for candidate in range(-4, 4)))
