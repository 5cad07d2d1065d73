"""SQuAD: its files (versions 1.1 and 2.0) as tables, its answers, and its metrics."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from bert_fast.tasks.alignment import is_cjk
from bert_fast.tasks.io.table import Table

By = Literal["words", "characters"]
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = set(string.punctuation)


class Answer(NamedTuple):
    """An answer's text, and where it starts in the context; None where the data does not say."""

    text: str
    start: int | None


def is_squad(found: Any) -> bool:
    """Whether what a JSON file holds is SQuAD's: articles of paragraphs of questions."""
    articles = found.get("data") if isinstance(found, dict) else None
    return isinstance(articles, list) and all(isinstance(item, dict) and "paragraphs" in item for item in articles)


def squad_table(found: Mapping[str, Any], source: str) -> Table:
    """A row a question: id, title, question, context, answers (a list of {text, answer_start}), is_impossible.

    Raises:
        ValueError: an article, paragraph or question lacks what it needs; the message says which.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("id", "title", "question", "context", "answers", "is_impossible")
    }
    for number, article in enumerate(found["data"], start=1):
        for part, paragraph in enumerate(article["paragraphs"], start=1):
            where = f"{source}: article {number}, paragraph {part}"
            if not isinstance(paragraph, dict) or not {"context", "qas"} <= set(paragraph):
                raise ValueError(f"{where} has no context or no qas; expected SQuAD's format")
            for item in paragraph["qas"]:
                if not isinstance(item, dict) or "question" not in item:
                    raise ValueError(f"{where} has an entry without a question; expected SQuAD's format")
                impossible = bool(item.get("is_impossible", False))
                columns["id"].append(str(item.get("id", len(columns["id"]))))
                columns["title"].append(article.get("title", ""))
                columns["question"].append(item["question"])
                columns["context"].append(paragraph["context"])
                columns["answers"].append([] if impossible else list(item.get("answers", [])))
                columns["is_impossible"].append(impossible)
    return Table(columns, source, counted="question")


def read_answers(value: Any, start: Any = None) -> list[Answer]:
    """The answers of a cell: a list of {text, answer_start}, {text: [...], answer_start: [...]}, or a text.

    Args:
        start: where a plain text starts, if the table says.

    Returns:
        No answer for None, an empty list and an empty text.

    Raises:
        ValueError: it is none of these.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        return [Answer(value, None if start is None or start == "" else int(start))]
    if isinstance(value, Mapping):
        texts, starts = value.get("text"), value.get("answer_start")
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        texts = list(texts or [])
        starts = [None] * len(texts) if starts is None else list(starts)
        if len(starts) == len(texts):
            return [Answer(str(text), place) for text, place in zip(texts, starts, strict=True) if text]
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, Mapping) and "text" in item for item in value):
            return [Answer(str(item["text"]), item.get("answer_start")) for item in value if item["text"]]
        if all(isinstance(item, str) for item in value):
            return [Answer(item, None) for item in value if item]
    raise ValueError(f"{value!r} is no answer; expected a text, or {{text, answer_start}} objects as in SQuAD")


def place_answer(answer: Answer, context: str, *, nearest: bool = False) -> int | None:
    """Where the answer starts in the context; None where it is not there.

    Args:
        nearest: where the context has something else at the given place, take the occurrence nearest to it.
    """
    if answer.start is not None and context[answer.start : answer.start + len(answer.text)] == answer.text:
        return answer.start
    if answer.start is not None and not nearest:
        return None
    places = [match.start() for match in re.finditer(f"(?={re.escape(answer.text)})", context)]
    return min(places, key=lambda place: abs(place - (answer.start or 0)), default=None)


def answer_words(text: str, by: By) -> list[str]:
    """An answer as it is compared: lower case, without punctuation and English articles, as words.

    Args:
        by: words as SQuAD's own evaluation, parted by white space, without ASCII punctuation. characters for Chinese
            and Japanese, as MLQA's: every CJK character is a word, and all of Unicode's punctuation is left out.
    """
    text = text.lower()
    if by == "characters":
        text = "".join(" " if unicodedata.category(c)[0] == "P" else f" {c} " if is_cjk(c) else c for c in text)
    text = "".join(character for character in text if character not in _ASCII_PUNCTUATION)
    return _ARTICLES.sub(" ", text).split()


def exact_match(predicted: str, gold: str, by: By = "words") -> float:
    """1 if both are the same as `answer_words`, else 0."""
    return float(answer_words(predicted, by) == answer_words(gold, by))


def answer_f1(predicted: str, gold: str, by: By = "words") -> float:
    """F1 of the words that both have; where either has none, 1 if both have none."""
    found, wanted = answer_words(predicted, by), answer_words(gold, by)
    if not found or not wanted:
        return float(found == wanted)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted))


def best_scores(predicted: str, golds: Sequence[str], by: By) -> tuple[float, float]:
    """Exact match and F1 against the best of several right answers; none of them means that there is no answer."""
    wanted = [gold for gold in golds if answer_words(gold, by)] or [""]
    return max(exact_match(predicted, gold, by) for gold in wanted), max(
        answer_f1(predicted, gold, by) for gold in wanted
    )


def best_threshold(
    scores: Sequence[float], answerable: Sequence[bool], differences: Sequence[float]
) -> tuple[float, float]:
    """The threshold on the null difference that gives the best mean score, and that score.

    A question with a difference over the threshold is left without answer.

    Args:
        scores: what each question's best answer is worth: 0 where there is none to find.
        answerable: whether each question has an answer.
        differences: score of no answer less score of the best answer, for each question.
    """
    gains = np.where(np.asarray(answerable, dtype=bool), np.asarray(scores, dtype=float), -1.0)
    current = len(gains) - float(np.asarray(answerable, dtype=bool).sum())
    order = np.argsort(np.asarray(differences, dtype=float), kind="stable")
    totals = current + np.cumsum(gains[order])
    # Questions of equal difference are answered together.
    sorted_differences = np.asarray(differences, dtype=float)[order]
    ends = np.append(sorted_differences[1:] != sorted_differences[:-1], True)
    totals[~ends] = -np.inf
    best = int(totals.argmax()) if len(totals) else -1
    if best < 0 or totals[best] <= current:
        lowest = float(sorted_differences[0]) - 1.0 if len(order) else 0.0
        return lowest if np.isfinite(lowest) else 0.0, current / max(len(gains), 1)
    return float(sorted_differences[best]), float(totals[best]) / len(gains)
