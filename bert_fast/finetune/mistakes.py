"""The worst predictions of a run, for its report: spans marked in their text, a scatter plot of values, or a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

from bert_fast._html import panels_of, svg, table
from bert_fast.tasks.io.columns import choose_columns, number_column, text_column
from bert_fast.tasks.io.squad import locate_answer
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.io.tag_schemes import written_entities
from bert_fast.tasks.task import Task, make_task

MAX_MISTAKES = 25
_CONTEXT = 100  # characters before the first and after the last marked span
_MAX_TEXT = 1000
_BLUE = "#1b6ca8"
Prediction = Mapping[str, Any]


class Span(NamedTuple):
    """Characters [start, end) of a text, and what they are."""

    start: int
    end: int
    name: str


class Rows(NamedTuple):
    """The task of a run, its dev rows and their columns, as far as the files of the run tell."""

    task: Task
    table: Table
    columns: dict[str, str]


def read_rows(name: str, settings: Mapping[str, Any], predictions: Sequence[Prediction]) -> Rows:
    """The dev rows of a run from its predictions.

    Raises:
        ValueError: the rows lack the columns of the task.
    """
    task = make_task(name, settings.get("options"))
    names = list(predictions[0]["input"]) if predictions else []
    inputs = {column: [line["input"].get(column) for line in predictions] for column in names}
    rows = Table(inputs, "predictions", [line["row"] for line in predictions])
    named = settings["data"].get("columns")
    return Rows(task, rows, choose_columns(rows, task.roles, named, training=False) if predictions else {})


def mistakes(rows: Rows, predictions: Sequence[Prediction]) -> list[str]:
    """HTML of the predictions with the largest errors, worst first; nothing for a task without errors.

    For token-classification and question-answering the true and the predicted spans are marked in the text.
    """
    if not predictions or predictions[0].get("error") is None:
        return []
    wrong = [number for number, line in enumerate(predictions) if line["error"]]
    what = "predictions differ from the true value" if rows.task.name == "regression" else "predictions are wrong"
    title = f"<h2>Worst mistakes on dev</h2><p>{len(wrong):,} of {len(predictions):,} {what}.</p>"
    worst = sorted(wrong, key=lambda number: -predictions[number]["error"])[:MAX_MISTAKES]
    if not worst:
        return [title]
    lines = [predictions[number] for number in worst]
    selected = Rows(rows.task, rows.table.select(worst), rows.columns)
    if rows.task.name == "token-classification" and "tags" in rows.columns:
        return [title, _legend(), *_tag_mistakes(selected, lines)]
    if rows.task.name == "question-answering" and "answers" in rows.columns:
        return [title, _legend(), *_answer_mistakes(selected, lines)]
    return [title, _table(lines)]


def scatter(rows: Rows, predictions: Sequence[Prediction]) -> list[str]:
    """HTML of the predicted against the true values of a regression; nothing for another task."""
    if rows.task.name != "regression" or "label" not in rows.columns or not predictions:
        return []
    true = number_column(rows.table, rows.columns["label"])
    predicted = [line["prediction"]["value"] for line in predictions]
    figure, (axes,) = panels_of(4.5, 4.2)
    low, high = min([*true, *predicted]), max([*true, *predicted])
    axes.plot([low, high], [low, high], color="#999", lw=1, ls=":")
    axes.scatter(true, predicted, s=12, color=_BLUE, alpha=0.5, linewidths=0, clip_on=False)
    axes.set(xlabel="true value", ylabel="predicted value")
    return ["<h2>Predicted against true on dev</h2><p>On the dotted line both are equal.</p>", svg(figure)]


def _legend() -> str:
    return (
        '<p class="quiet">Marked: <mark class="true">true</mark> and <mark class="predicted">predicted</mark> spans.'
        "</p>"
    )


def _tag_mistakes(rows: Rows, lines: Sequence[Prediction]) -> list[str]:
    task: Any = rows.task
    sentences = task.sentences(rows.table, rows.columns)
    parts: list[str] = []
    for sentence, tags, line in zip(sentences, task._raw_tags(rows.table, rows.columns), lines, strict=True):
        text, words = _text_and_words(sentence, rows, len(parts))
        predicted = line["prediction"]["tags"]
        if "entities" in line["prediction"]:
            pairs = [[Span(words[a][0], words[b - 1][1], kind) for kind, a, b in written_entities(of)]
                     for of in (tags, predicted)]  # fmt: skip
        else:  # plain tags: the words whose tags differ
            different = [word for word, (a, b) in enumerate(zip(tags, predicted, strict=True)) if a != b]
            pairs = [[Span(*words[word], of[word]) for word in different] for of in (tags, predicted)]
        parts.append(_example(line, text, *pairs))
    return parts


def _text_and_words(sentence: Any, rows: Rows, row: int) -> tuple[str, list[tuple[int, int]]]:
    """The text of a row and the characters of its words; a list of words is joined by spaces."""
    if sentence.spans is not None:
        return text_column(rows.table, rows.columns["tokens"])[row], list(sentence.spans)
    words, start = [], 0
    for word in sentence.words:
        words.append((start, start + len(word)))
        start += len(word) + 1
    return " ".join(sentence.words), words


def _answer_mistakes(rows: Rows, lines: Sequence[Prediction]) -> list[str]:
    task: Any = rows.task
    contexts = text_column(rows.table, rows.columns["context"])
    questions = text_column(rows.table, rows.columns["question"])
    parts = []
    for context, question, answers, line in zip(
        contexts, questions, task.answers(rows.table, rows.columns), lines, strict=True
    ):
        located = [(locate_answer(answer, context, nearest=True), answer.text) for answer in answers]
        true = [Span(start, start + len(text), "") for start, text in located if start is not None]
        start, end = line["prediction"].get("start"), line["prediction"].get("end")
        predicted = [] if start is None else [Span(start, end, "")]
        parts.append(_example(line, context, true, predicted, heading=question))
    return parts


def _example(line: Prediction, text: str, true: Sequence[Span], predicted: Sequence[Span], *, heading: str = "") -> str:
    """One mistake: the text twice, with the true and with the predicted spans, cut to what is around them."""
    different = [span for span in [*true, *predicted] if (span in true) != (span in predicted)]
    spans = different or [*true, *predicted]
    start = max(min((span.start for span in spans), default=0) - _CONTEXT, 0)
    end = min(max((span.end for span in spans), default=0) + _CONTEXT, start + _MAX_TEXT)
    shown = [
        f"<p>{name}: {_marked(text, of, name, start, end) if of else '<i>none</i>'}</p>"
        for name, of in (("true", true), ("predicted", predicted))
    ]
    about = f'<p class="quiet">row {line["row"]}, error {line["error"]:.4f}</p>'
    question = f"<p><b>{escape(heading)}</b></p>" if heading else ""
    return f'<div class="example">{about}{question}{"".join(shown)}</div>'


def _marked(text: str, spans: Sequence[Span], kind: str, start: int, end: int) -> str:
    """The characters [start, end) of a text as HTML, with the spans marked; of overlapping ones the first."""
    html, done = "… " if start else "", start
    for span in sorted(set(spans)):
        if span.start < done or span.end > end:
            continue
        name = f"<small>{escape(span.name)}</small>" if span.name else ""
        html += escape(text[done : span.start])
        html += f'<mark class="{kind}">{escape(text[span.start : span.end])}{name}</mark>'
        done = span.end
    return html + escape(text[done:end]) + (" …" if end < len(text) else "")


def _table(lines: Sequence[Prediction]) -> str:
    inputs = list(lines[0]["input"])
    outputs = [name for name, value in lines[0]["prediction"].items() if _is_short(value)]
    rows = [
        [line["row"], line["error"], *map(line["prediction"].get, outputs), *map(line["input"].get, inputs)]
        for line in lines
    ]
    return table([["row", "error", *(f"predicted {name}" for name in outputs), *inputs], *rows])


def _is_short(value: Any) -> bool:
    """Whether a value of a prediction is listed: a string, a float or a list of strings, not scores or candidates."""
    if isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, (str, float)) and not isinstance(value, bool)
