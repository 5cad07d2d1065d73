"""SQuAD 1.1 and 2.0: file format, answers and metrics."""

from __future__ import annotations

import ast
import json
import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from bert_fast.tasks.alignment import is_cjk
from bert_fast.tasks.io.labels import is_missing, plain_value
from bert_fast.tasks.io.table import Table

Comparison = Literal["words", "characters"]
_NEARBY = 1  # characters: a space before the answer, or a start counted from 1
_LONGEST_LITERAL = 100_000  # characters of an answer cell that are parsed
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = set(string.punctuation)


class Answer(NamedTuple):
    """The text of an answer and its start in the context, in characters; None if unknown."""

    text: str
    start: int | None


def is_squad(content: Any) -> bool:
    """Whether the content of a JSON file is in SQuAD's format: articles of paragraphs of questions."""
    articles = content.get("data") if isinstance(content, dict) else None
    return isinstance(articles, list) and all(isinstance(item, dict) and "paragraphs" in item for item in articles)


def squad_table(content: Mapping[str, Any], source: str) -> Table:
    """One row per question: id, title, question, context, answers (a list of {text, answer_start}), is_impossible.

    Raises:
        ValueError: a paragraph or question is incomplete; the message says which.
    """
    columns: dict[str, list[Any]] = {
        name: [] for name in ("id", "title", "question", "context", "answers", "is_impossible")
    }
    for number, article in enumerate(content["data"], start=1):
        if not isinstance(article["paragraphs"], list):
            raise ValueError(f"{source}: article {number} has no list of paragraphs; expected SQuAD's format")
        for part, paragraph in enumerate(article["paragraphs"], start=1):
            where = f"{source}: article {number}, paragraph {part}"
            if not isinstance(paragraph, dict) or not {"context", "qas"} <= set(paragraph):
                raise ValueError(f"{where} lacks context or qas; expected SQuAD's format")
            if not isinstance(paragraph["qas"], list):
                raise ValueError(f"{where} has no list of qas; expected SQuAD's format")
            for item in paragraph["qas"]:
                if not isinstance(item, dict) or "question" not in item:
                    raise ValueError(f"{where} has an entry in qas without question; expected SQuAD's format")
                impossible = bool(item.get("is_impossible", False))
                columns["id"].append(str(item.get("id", len(columns["id"]))))
                columns["title"].append(article.get("title", ""))
                columns["question"].append(item["question"])
                columns["context"].append(paragraph["context"])
                columns["answers"].append([] if impossible else item.get("answers") or [])
                columns["is_impossible"].append(impossible)
    return Table(columns, source, unit="question")


def read_answers(value: Any, start: Any = None) -> list[Answer]:
    """Parse the answers of a cell.

    Args:
        value: a list of {text, answer_start}, {text: [...], answer_start: [...]}, a string or a list of strings, or
            the text of one of these as JSON or Python write it.
        start: where a string starts in the context, if known. Starts may be integers, integral floats or their texts;
            None, NaN, "" and negative numbers are unknown.

    Returns:
        The answers; none for None, an empty list or an empty string.

    Raises:
        ValueError: the value, or a start, has another form.
    """
    value = plain_value(value)
    if isinstance(value, str):
        value = _parsed(value)
    if is_missing(value):
        return []
    if isinstance(value, str):
        return _answers([value], [start])
    if isinstance(value, Mapping):
        texts, starts = (plain_value(value.get(name)) for name in ("text", "answer_start"))
        if isinstance(texts, str):
            texts, starts = [texts], [starts]
        texts = list(texts or [])
        starts = [None] * len(texts) if starts is None else list(starts)
        if len(starts) == len(texts) and all(isinstance(text, str) for text in texts):
            return _answers(texts, starts)
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, Mapping) and isinstance(item.get("text"), str) for item in value):
            return _answers([item["text"] for item in value], [item.get("answer_start") for item in value])
        if all(isinstance(item, str) for item in value):
            return _answers(value, [None] * len(value))
    raise ValueError(f"{value!r} is not an answer; expected a string, or {{text, answer_start}} objects as in SQuAD")


def _answers(texts: Sequence[str], starts: Sequence[Any]) -> list[Answer]:
    """The answers that have a text, without the spaces around it."""
    answers = []
    for text, value in zip(texts, starts, strict=True):
        start = _read_start(value)
        if stripped := text.strip():
            answers.append(Answer(stripped, None if start is None else start + len(text) - len(text.lstrip())))
    return answers


def _parsed(text: str) -> Any:
    """The objects that a text in the notation of JSON or Python holds; `text` itself if it holds none."""
    stripped = text.strip()
    if not stripped.startswith(("{", "[")) or "text" not in stripped or len(stripped) > _LONGEST_LITERAL:
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(stripped)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        objects = value if isinstance(value, list) else [value]
        return value if all(isinstance(item, dict) and "text" in item for item in objects) else text
    return text


def _read_start(value: Any) -> int | None:
    """A start in a context as an integer; None if it is unknown.

    Raises:
        ValueError: it is not a number of characters.
    """
    value = plain_value(value)
    if is_missing(value):
        return None
    try:
        number = float(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if not number.is_integer():
        raise ValueError(f"the start of an answer is {value!r}; expected a number of characters")
    return int(number) if number >= 0 else None


def locate_answer(answer: Answer, context: str, *, nearest: bool = False) -> int | None:
    """Where the answer starts in the context; None if that is not certain.

    An answer that the context does not have at the given start is placed where only one place is meant: at the start
    counted in bytes of UTF-8 or in units of UTF-16, or up to `_NEARBY` characters away; else at its only occurrence.

    Args:
        answer: with its start in the context, if known.
        context: the text that contains it.
        nearest: if that leaves several places, take the nearest to the given start.
    """
    text, start = answer.text, answer.start
    if start is not None and context[start : start + len(text)] == text:
        return start
    starts = [match.start() for match in re.finditer(f"(?={re.escape(text)})", context)]
    if start is None or nearest or len(starts) <= 1:
        return min(starts, key=lambda at: abs(at - (start or 0)), default=None)
    likely = {at for at in starts if abs(at - start) <= _NEARBY}
    likely |= {at for at in starts if start in (_size(context[:at], "utf-8"), _size(context[:at], "utf-16-le") // 2)}
    return likely.pop() if len(likely) == 1 else None


def _size(text: str, encoding: str) -> int:
    return len(text.encode(encoding, errors="surrogatepass"))


def normalized_tokens(text: str, by: Comparison) -> list[str]:
    """The tokens of an answer for comparison: lower case, without punctuation and English articles.

    Args:
        text: the answer.
        by: words splits at white space and removes ASCII punctuation, as in SQuAD's evaluation. characters, for Chinese
            and Japanese as in MLQA's, makes every CJK character a token and removes all Unicode punctuation.
    """
    text = text.lower()
    if by == "characters":
        text = "".join(" " if unicodedata.category(c)[0] == "P" else f" {c} " if is_cjk(c) else c for c in text)
    text = "".join(character for character in text if character not in _ASCII_PUNCTUATION)
    return _ARTICLES.sub(" ", text).split()


def exact_match(predicted: str, gold: str, by: Comparison = "words") -> float:
    """1 if the normalized tokens of both are equal, else 0."""
    return float(normalized_tokens(predicted, by) == normalized_tokens(gold, by))


def answer_f1(predicted: str, gold: str, by: Comparison = "words") -> float:
    """F1 of the normalized tokens; if either has none, 1 if both have none, else 0."""
    predicted_tokens, gold_tokens = normalized_tokens(predicted, by), normalized_tokens(gold, by)
    if not predicted_tokens or not gold_tokens:
        return float(predicted_tokens == gold_tokens)
    common = sum((Counter(predicted_tokens) & Counter(gold_tokens)).values())
    return 2 * common / (len(predicted_tokens) + len(gold_tokens))


def best_match(predicted: str, golds: Sequence[str], by: Comparison) -> tuple[float, float]:
    """The maximum of exact match and of F1 over the gold answers; a question without gold answers has no answer."""
    golds = [gold for gold in golds if normalized_tokens(gold, by)] or [""]
    exact = max(exact_match(predicted, gold, by) for gold in golds)
    return exact, max(answer_f1(predicted, gold, by) for gold in golds)


def best_threshold(
    scores: Sequence[float], answerable: Sequence[bool], differences: Sequence[float]
) -> tuple[float, float]:
    """The threshold on the null difference with the best mean score, and that score.

    No answer is predicted for a question whose difference exceeds the threshold.

    Args:
        scores: the score of each question's best answer; 0 if it has no gold answer.
        answerable: whether each question has an answer.
        differences: per question, the score of no answer minus the score of the best answer.
    """
    gains = np.where(np.asarray(answerable, dtype=bool), np.asarray(scores, dtype=float), -1.0)
    current = len(gains) - float(np.asarray(answerable, dtype=bool).sum())
    order = np.argsort(np.asarray(differences, dtype=float), kind="stable")
    totals = current + np.cumsum(gains[order])
    # A threshold can't separate questions of equal difference.
    sorted_differences = np.asarray(differences, dtype=float)[order]
    ends = np.append(sorted_differences[1:] != sorted_differences[:-1], True)
    totals[~ends] = -np.inf
    best = int(totals.argmax()) if len(totals) else -1
    if best < 0 or totals[best] <= current:
        lowest = float(sorted_differences[0]) - 1.0 if len(order) else 0.0
        return lowest if np.isfinite(lowest) else 0.0, current / max(len(gains), 1)
    return float(sorted_differences[best]), float(totals[best]) / len(gains)
