"""Extractive question answering, with or without unanswerable questions (SQuAD 1.1 and 2.0)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast._config import check, convert_fields
from bert_fast.tasks.alignment import (
    Pieces,
    Span,
    Window,
    character_range,
    is_cjk,
    piece_range,
    special_tokens_of,
    text_pieces,
    windows,
)
from bert_fast.tasks.classification import softmax
from bert_fast.tasks.io.columns import Role, text_column
from bert_fast.tasks.io.squad import Answer, Comparison, best_match, best_threshold, locate_answer, read_answers
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Batch, Columns, Example, LossOptions, Task, reject_options, run_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]

QUESTION = Role("question", ("question", "query"))
CONTEXT = Role("context", ("context", "passage", "paragraph", "text", "document"))
ANSWERS = Role("answers", ("answers", "answer", "answer_text"), target=True)
ANSWER_START = Role("answer_start", ("answer_start", "start"), required=False, target=True)


@dataclass(frozen=True)
class QuestionAnsweringOptions:
    """Options of the task question-answering.

    Args:
        overlap: pieces that consecutive windows of a long context share, at most half a window; transformers calls it
            the stride.
        max_question: questions are truncated to this many pieces, and to half of the input.
        max_answer: maximum pieces of an answer.
        n_best: number of answers in a prediction.
        null_threshold: predict no answer if its score exceeds that of the best answer by more than this; by default
            the value with the best F1 on dev, which is stored in the model's configuration.
        mismatched: what happens to answers that the context does not have at the given start, nor at one other place
            that can be meant (see `locate_answer`): refuse (an error), nearest (use the nearest occurrence) or drop.
        by: compare answers by words, or by characters for Chinese and Japanese; auto detects it from the contexts.
    """

    overlap: int = 128
    max_question: int = 64
    max_answer: int = 30
    n_best: int = 20
    null_threshold: float | None = None
    mismatched: Literal["refuse", "nearest", "drop"] = "refuse"
    by: Literal["auto", "words", "characters"] = "auto"

    def __post_init__(self) -> None:
        convert_fields(self, "options.")
        for name, lowest in (("overlap", 0), ("max_question", 1), ("max_answer", 1), ("n_best", 1)):
            value = getattr(self, name)
            check(value >= lowest, f"options.{name} is {value}; expected {lowest} or more")
        value = self.null_threshold
        check(value is None or math.isfinite(value), f"options.null_threshold is {value}; expected a number")


class Candidate(NamedTuple):
    """A candidate answer: its characters in the context, and the sum of its start and end logits."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class WindowContext:
    """What decoding needs of an example: the context's pieces, the window, and the start of the window in the input."""

    spans: Sequence[Span]
    window: Window
    offset: int


class QuestionAnswering(Task):
    """Finds the span of a context that answers a question.

    A long context is split into overlapping windows. The target of a window that does not contain the whole answer is
    [CLS], which stands for no answer. If the training rows have unanswerable questions (SQuAD 2.0), the score of [CLS]
    is compared with that of the best answer; otherwise an answer is always predicted.
    """

    name = "question-answering"
    model_class = "BertForQuestionAnswering"
    roles = (QUESTION, CONTEXT, ANSWERS, ANSWER_START)
    options_class = QuestionAnsweringOptions
    text_roles = ("question", "context")
    group_role = "context"
    main_metric = "f1"
    without_answer: bool  # whether some training questions have no answer
    by: Comparison
    tuned_threshold: float = 0.0

    @property
    def null_threshold(self) -> float:
        """The threshold of the options, else the one tuned on dev, else 0."""
        threshold: float | None = self.options.null_threshold
        return self.tuned_threshold if threshold is None else threshold

    def fit(self, table: Table, columns: Columns) -> None:
        answers = self.answers(table, columns)
        if not any(answers):
            raise ValueError(f"{table.source}: no question has an answer; expected at least one")
        self._starts(table, columns, answers)
        self.without_answer = not all(answers)
        self.by = self.options.by
        if self.options.by == "auto":
            contexts = text_column(table, columns["context"])
            cjk = sum(is_cjk(character) for context in contexts for character in context)
            self.by = "characters" if cjk * 2 > sum(map(len, contexts)) else "words"

    def check(self, table: Table, columns: Columns) -> list[str]:
        answers = self.answers(table, columns)
        starts = self._starts(table, columns, answers)
        messages = []
        if not self.without_answer and not all(answers):
            count = sum(not of_row for of_row in answers)
            messages.append(f"{table.source}: {count} questions have no answer, but every training question has one")
        moved = sum(answer.start is not None and answer.start != start for of_row in starts for answer, start in of_row)
        if moved:
            messages.append(
                f"{table.source}: {moved} answers are not at their start in the context, but at one other place that "
                "can be meant (bytes, spaces, the only occurrence); they are used there"
            )
        if dropped := [row for row, of_row in enumerate(starts) if answers[row] and not of_row]:
            messages.append(f"{table.source}: {len(dropped)} questions have answers that are not in their context")
        return messages

    def describe(self) -> str:
        some = "some questions have no answer" if self.without_answer else "every question has an answer"
        return f"{some}; answers are compared by {self.by}"

    def settings(self) -> dict[str, Any]:
        return {"without_answer": self.without_answer, "by": self.by, "null_threshold": self.tuned_threshold}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.without_answer, self.by = bool(settings["without_answer"]), settings["by"]
        self.tuned_threshold = float(settings.get("null_threshold", 0.0))

    def outcome(self, prediction: Mapping[str, Any]) -> str:
        return repr(prediction["answer"]) if prediction["answer"] else "no answer"

    def tune(self, metrics: Mapping[str, Any]) -> str:
        best = metrics.get("best_f1_threshold")
        if self.options.null_threshold is not None or best is None:
            return ""
        self.tuned_threshold = float(best)
        return f"null_threshold is set to {best:.4f}, with the best F1 on dev, {metrics['best_f1']:.4f}"

    def model_config(self) -> dict[str, Any]:
        return {"num_labels": 2}

    def answers(self, table: Table, columns: Columns) -> list[list[Answer]]:
        """The gold answers of every row.

        Raises:
            ValueError: a cell has none of the forms of `read_answers`.
        """
        starts = table[columns["answer_start"]] if "answer_start" in columns else [None] * len(table)
        answers = []
        for row, (value, start) in enumerate(zip(table[columns["answers"]], starts, strict=True)):
            try:
                answers.append(read_answers(value, start))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{table.where(row)}: {error}") from error
        return answers

    def _starts(
        self, table: Table, columns: Columns, answers: Sequence[Sequence[Answer]]
    ) -> list[list[tuple[Answer, int]]]:
        """The answers of every row that are in the context, with their starts.

        Raises:
            ValueError: an answer is not in its context, unless options.mismatched is drop.
        """
        contexts = text_column(table, columns["context"])
        nearest = self.options.mismatched == "nearest"
        rows: list[list[tuple[Answer, int]]] = []
        mismatches: list[str] = []
        for row, (context, of_row) in enumerate(zip(contexts, answers, strict=True)):
            located = [(answer, locate_answer(answer, context, nearest=nearest)) for answer in of_row]
            rows.append([(answer, start) for answer, start in located if start is not None])
            missing = [answer for answer, start in located if start is None]
            if missing and self.options.mismatched != "drop":
                actual = context[missing[0].start or 0 :][: len(missing[0].text)]
                mismatches.append(f"{table.where(row)}: {missing[0].text!r} at {missing[0].start} is {actual!r}")
        if mismatches:
            hint = "set options.mismatched to nearest to use the nearest occurrence, or to drop to drop such answers"
            more = f"; and {len(mismatches) - 5} more" if len(mismatches) > 5 else ""
            raise ValueError(f"answers are not in their context: {'; '.join(mismatches[:5])}{more}; {hint}")
        return rows

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """Windows [CLS] question [SEP] context [SEP], with the first and last token of the first answer as target."""
        special = special_tokens_of(tokenizer, 2)
        length = text.max_length - special.size
        options: QuestionAnsweringOptions = self.options
        contexts = text_column(table, columns["context"])
        questions = text_pieces(tokenizer, text_column(table, columns["question"]))
        pieces = _unique_pieces(tokenizer, contexts)
        answers = self.answers(table, columns) if "answers" in columns else None
        starts = None if answers is None else self._starts(table, columns, answers)
        examples = []
        for row, (question, context) in enumerate(zip(questions, contexts, strict=True)):
            if starts is not None and answers is not None and answers[row] and not starts[row] and training:
                continue  # its answers are not in the context, and options.mismatched is drop
            of_context = pieces[context]
            question_ids = question.ids[: min(options.max_question, length // 2)]
            cut = len(question_ids) < len(question.ids)
            size = length - len(question_ids)
            answer = None
            if starts is not None and starts[row]:
                first, start = starts[row][0]
                answer = piece_range(of_context.spans, start, start + len(first.text))
            for window in windows(len(of_context), size, min(options.overlap, size // 2)):
                ids, types, (_, shift) = special.wrap(question_ids, of_context.ids[window.start : window.end])
                target = None
                if starts is not None:
                    target = (0, 0)
                    if answer is not None and window.start <= answer[0] and answer[1] <= window.end:
                        target = (answer[0] - window.start + shift, answer[1] - 1 - window.start + shift)
                extra = WindowContext(of_context.spans, window, shift)
                examples.append(Example(row, ids, types, target, extra, cut))
        return examples

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(T, 2): the start and end logits."""
        out = run_model(model, batch)
        return torch.stack([out["start_logits"], out["end_logits"]], dim=-1)

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        """The mean of the cross entropies of start and end, each over the tokens of an example."""
        reject_options(self.name, options, "focal_gamma", "label_smoothing")
        lengths = torch.tensor([len(example.input_ids) for example in examples], device=logits.device)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        columns = torch.arange(int(lengths.max()), device=logits.device)
        mask = columns < lengths[:, None]
        padded = wide.new_full((*mask.shape, 2), -torch.inf)
        padded[mask] = wide  # (B, S, 2)
        targets = torch.tensor([example.target for example in examples], device=logits.device)  # (B, 2)
        return nn.functional.cross_entropy(padded, targets, reduction="sum") / 2

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        """The `answer` of a row ("" for none), its `start` and `end` in the context, `n_best`, and the row's id if any.

        `null_difference` is the score of no answer minus that of the best answer.
        """
        contexts = text_column(table, columns["context"])
        candidates: list[list[Candidate]] = [[] for _ in contexts]
        null = [np.inf] * len(contexts)
        for scores, example in zip(outputs, examples, strict=True):
            null[example.row] = min(null[example.row], float(scores[0].sum()))
            candidates[example.row] += window_answers(scores, example.extra, contexts[example.row], self.options)
        predictions = [self._prediction(*row) for row in zip(contexts, candidates, null, strict=True)]
        if "id" in table.columns:  # the key of SQuAD's evaluation script
            predictions = [{"id": name, **item} for name, item in zip(table["id"], predictions, strict=True)]
        return predictions

    def _prediction(self, context: str, candidates: Sequence[Candidate], null: float) -> dict[str, Any]:
        by_span: dict[Span, Candidate] = {}
        for candidate in sorted(candidates, key=lambda candidate: -candidate.score):
            by_span.setdefault((candidate.start, candidate.end), candidate)
        best = list(by_span.values())[: self.options.n_best]
        difference = null - best[0].score if best else None
        listed: list[dict[str, Any]] = [
            {"answer": context[start:end], "start": start, "end": end, "score": score} for start, end, score in best
        ]
        if self.without_answer or not listed:
            listed.append({"answer": "", "start": None, "end": None, "score": null if np.isfinite(null) else 0.0})
            listed.sort(key=lambda item: -item["score"])
        scores = softmax(np.array([item["score"] for item in listed]))
        listed = [{**item, "probability": float(p)} for item, p in zip(listed, scores, strict=True)]
        no_answer = difference is None or (self.without_answer and difference > self.null_threshold)
        chosen = next(item for item in listed if (item["start"] is None) == no_answer)
        return {**chosen, "null_difference": difference, "n_best": listed}

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """exact_match and f1 in [0, 1] as defined by SQuAD; with unanswerable questions also both per kind of question,
        and the best threshold for these rows."""
        if not len(table):
            raise ValueError("the table is empty; expected at least one row to compute metrics")
        golds = [[answer.text for answer in answers] for answers in self.answers(table, columns)]
        pairs = [best_match(item["answer"], gold, self.by) for item, gold in zip(predictions, golds, strict=True)]
        exact, f1 = np.array(pairs).T
        metrics: dict[str, Any] = {"exact_match": float(exact.mean()), "f1": float(f1.mean()), "compared_by": self.by}
        answerable = np.array([bool(gold) for gold in golds])
        if answerable.all():
            return metrics
        for name, mask in (("answerable", answerable), ("unanswerable", ~answerable)):
            metrics[f"{name}_questions"] = int(mask.sum())
            if mask.any():
                metrics |= {f"{name}_exact_match": float(exact[mask].mean()), f"{name}_f1": float(f1[mask].mean())}
        if self.without_answer:
            best_answers = [
                next((i["answer"] for i in item["n_best"] if i["start"] is not None), "") for item in predictions
            ]
            scores = [best_match(text, gold, self.by) for text, gold in zip(best_answers, golds, strict=True)]
            gaps = [np.inf if item["null_difference"] is None else item["null_difference"] for item in predictions]
            for number, name in enumerate(("exact_match", "f1")):
                threshold, score = best_threshold([pair[number] for pair in scores], answerable.tolist(), gaps)
                metrics |= {f"best_{name}": score, f"best_{name}_threshold": threshold}
            metrics["null_threshold"] = self.null_threshold
        return metrics

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """1 - F1 of each prediction."""
        pairs = zip(predictions, self.answers(table, columns), strict=True)
        return [1.0 - best_match(item["answer"], [gold.text for gold in golds], self.by)[1] for item, golds in pairs]


def _unique_pieces(tokenizer: Tokenizer, contexts: Sequence[str]) -> dict[str, Pieces]:
    """The pieces of each distinct context, which several questions share."""
    distinct = list(dict.fromkeys(contexts))
    return dict(zip(distinct, text_pieces(tokenizer, distinct), strict=True))


def window_answers(
    scores: Array, window_context: WindowContext, context: str, options: QuestionAnsweringOptions
) -> list[Candidate]:
    """The n_best best answers of one window, best first.

    Args:
        scores: (L, 2), the start and end logits of the input.
        window_context: the window and its pieces.
        context: the text.
        options: n_best and max_answer.
    """
    spans, window, offset = window_context.spans, window_context.window, window_context.offset
    count = window.end - window.start
    if not count:
        return []
    inside = scores[offset : offset + count].astype(np.float64)
    longest = min(options.max_answer, count)
    ends = np.full(count + longest - 1, -np.inf)
    ends[:count] = inside[:, 1]
    reached = np.lib.stride_tricks.sliding_window_view(ends, longest)
    # The n best spans start at the n pieces with the best span each: only these are tried with every end.
    firsts = _largest(inside[:, 0] + reached.max(1), options.n_best)
    total = (inside[firsts, :1] + reached[firsts]).ravel()  # from each of them, 1 to `longest` pieces
    candidates = []
    for index in _largest(total, options.n_best).tolist():
        if np.isfinite(total[index]):
            first = window.start + int(firsts[index // longest])
            start, end = character_range(context, spans, first, first + index % longest + 1)
            candidates.append(Candidate(start, end, float(total[index])))
    return candidates


def _largest(values: Array, count: int) -> Array:
    """The indices of the `count` largest values, largest first."""
    best: Array = np.argpartition(-values, min(count, len(values)) - 1)[:count]
    return best[np.argsort(-values[best], kind="stable")]
