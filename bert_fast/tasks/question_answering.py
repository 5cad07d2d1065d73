"""Extractive question answering: the span of a context that answers a question, or none (SQuAD 1.1 and 2.0)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast.tasks.alignment import (
    Pieces,
    Span,
    Window,
    character_range,
    frame_of,
    is_cjk,
    piece_range,
    text_pieces,
    windows,
)
from bert_fast.tasks.classification import softmax
from bert_fast.tasks.io.columns import Role, texts
from bert_fast.tasks.io.squad import Answer, By, best_scores, best_threshold, place_answer, read_answers
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Batch, Columns, Example, LossOptions, Task, refuse_options, run_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]

QUESTION = Role("question", ("question", "query"))
CONTEXT = Role("context", ("context", "passage", "paragraph", "text", "document"))
ANSWERS = Role("answers", ("answers", "answer", "answer_text"), target=True)
ANSWER_START = Role("answer_start", ("answer_start", "start"), required=False, target=True)


@dataclass(frozen=True)
class QuestionAnsweringOptions:
    """Settings of the task question-answering.

    Args:
        overlap: pieces that the windows of a long context share, at most half of what fits beside the question;
            transformers calls it the stride.
        max_question: questions are cut to so many pieces, and to half of the input.
        max_answer: most pieces of an answer.
        n_best: answers that a prediction lists.
        null_threshold: no answer is given where its score is higher than the best answer's by more than this; by
            default what is best for F1 on the dev rows, which the model's configuration keeps.
        mismatched: answers that are not where the data says: refuse, take the nearest occurrence, or drop them.
        by: how answers are compared: characters for Chinese and Japanese; auto finds out from the contexts.
    """

    overlap: int = 128
    max_question: int = 64
    max_answer: int = 30
    n_best: int = 20
    null_threshold: float | None = None
    mismatched: Literal["refuse", "nearest", "drop"] = "refuse"
    by: Literal["auto", "words", "characters"] = "auto"

    def __post_init__(self) -> None:
        for name, lowest in (("overlap", 0), ("max_question", 1), ("max_answer", 1), ("n_best", 1)):
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; expected {lowest} or more")


class Candidate(NamedTuple):
    """An answer: characters of the context, and the sum of the logits of its first and last piece."""

    start: int
    end: int
    score: float


@dataclass(frozen=True)
class Place:
    """What decoding needs of an example: the context's pieces, their window, and where that starts in the input."""

    spans: Sequence[Span]
    window: Window
    offset: int


class QuestionAnswering(Task):
    """The span of a context that answers a question.

    A long context is cut into overlapping windows. Where a window does not hold the whole answer, its target is [CLS],
    which stands for no answer. With questions that have none among the training rows (SQuAD 2.0), [CLS]'s score decides
    against the best answer's; without, some answer is always given.
    """

    name = "question-answering"
    model_class = "BertForQuestionAnswering"
    roles = (QUESTION, CONTEXT, ANSWERS, ANSWER_START)
    options_class = QuestionAnsweringOptions
    text_roles = ("question", "context")
    group_role = "context"
    main_metric = "f1"
    without_answer: bool  # whether some questions have none
    by: By
    tuned_threshold: float = 0.0

    @property
    def null_threshold(self) -> float:
        """The threshold that decides: that of the options, else the one found on dev, else 0."""
        given: float | None = self.options.null_threshold
        return self.tuned_threshold if given is None else given

    def fit(self, table: Table, columns: Columns) -> None:
        answers = self.answers(table, columns)
        if not any(answers):
            raise ValueError(f"{table.source}: no question has an answer; expected some")
        self._starts(table, columns, answers)
        self.without_answer = not all(answers)
        self.by = self.options.by
        if self.options.by == "auto":
            contexts = texts(table, columns["context"])
            cjk = sum(is_cjk(character) for context in contexts for character in context)
            self.by = "characters" if cjk * 2 > sum(map(len, contexts)) else "words"

    def check(self, table: Table, columns: Columns) -> list[str]:
        answers = self.answers(table, columns)
        starts = self._starts(table, columns, answers)
        said = []
        if not self.without_answer and not all(answers):
            count = sum(not found for found in answers)
            said.append(f"{table.source}: {count} questions have no answer, and none was so in training")
        if lost := [row for row, found in enumerate(starts) if answers[row] and not found]:
            said.append(f"{table.source}: {len(lost)} questions whose answers are not in the context: not learnt")
        return said

    def settings(self) -> dict[str, Any]:
        return {"without_answer": self.without_answer, "by": self.by, "null_threshold": self.tuned_threshold}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.without_answer, self.by = bool(settings["without_answer"]), settings["by"]
        self.tuned_threshold = float(settings.get("null_threshold", 0.0))

    def tune(self, metrics: Mapping[str, Any]) -> str:
        best = metrics.get("best_f1_threshold")
        if self.options.null_threshold is not None or best is None:
            return ""
        self.tuned_threshold = float(best)
        return f"null_threshold is {best:.4f} from now on: with it F1 on dev is {metrics['best_f1']:.4f}, the best"

    def model_config(self) -> dict[str, Any]:
        return {"num_labels": 2}

    def answers(self, table: Table, columns: Columns) -> list[list[Answer]]:
        """The right answers of every row. ValueError where a cell holds none of the known forms."""
        starts = table[columns["answer_start"]] if "answer_start" in columns else [None] * len(table)
        found = []
        for row, (value, start) in enumerate(zip(table[columns["answers"]], starts, strict=True)):
            try:
                found.append(read_answers(value, start))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{table.where(row)}: {error}") from error
        return found

    def _starts(
        self, table: Table, columns: Columns, answers: Sequence[Sequence[Answer]]
    ) -> list[list[tuple[Answer, int]]]:
        """Every row's answers with where they start. ValueError where they are not there, unless that is dropped."""
        contexts = texts(table, columns["context"])
        nearest = self.options.mismatched == "nearest"
        found: list[list[tuple[Answer, int]]] = []
        wrong: list[str] = []
        for row, (context, given) in enumerate(zip(contexts, answers, strict=True)):
            placed = [(answer, place_answer(answer, context, nearest=nearest)) for answer in given]
            found.append([(answer, start) for answer, start in placed if start is not None])
            missed = [answer for answer, start in placed if start is None]
            if missed and self.options.mismatched != "drop":
                there = context[missed[0].start or 0 :][: len(missed[0].text)]
                wrong.append(f"{table.where(row)}: {missed[0].text!r} at {missed[0].start}, where {there!r} is")
        if wrong:
            hint = "options.mismatched: nearest takes the nearest place that has it, drop leaves it out"
            more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise ValueError(f"answers that are not in their context: {'; '.join(wrong[:5])}{more}. {hint}")
        return found

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """Windows [CLS] question [SEP] context [SEP], and the first answer's first and last place in each."""
        frame = frame_of(tokenizer, 2)
        room = text.max_length - frame.size
        options: QuestionAnsweringOptions = self.options
        contexts = texts(table, columns["context"])
        questions = text_pieces(tokenizer, texts(table, columns["question"]))
        pieces = _once(tokenizer, contexts)
        answers = self.answers(table, columns) if "answers" in columns else None
        starts = None if answers is None else self._starts(table, columns, answers)
        found = []
        for row, (question, context) in enumerate(zip(questions, contexts, strict=True)):
            if starts is not None and answers is not None and answers[row] and not starts[row] and training:
                continue  # its answers are not in the context, and options.mismatched says to drop it
            parts = pieces[context]
            asked = question.ids[: min(options.max_question, room // 2)]
            size = room - len(asked)
            answer = None
            if starts is not None and starts[row]:
                first, start = starts[row][0]
                answer = piece_range(parts.spans, start, start + len(first.text))
            for window in windows(len(parts), size, min(options.overlap, size // 2)):
                ids, types, (_, shift) = frame.around(asked, parts.ids[window.start : window.end])
                target = None
                if starts is not None:
                    target = (0, 0)
                    if answer is not None and window.start <= answer[0] and answer[1] <= window.end:
                        target = (answer[0] - window.start + shift, answer[1] - 1 - window.start + shift)
                found.append(Example(row, ids, types, target, Place(parts.spans, window, shift)))
        return found

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(T, 2): the scores of being the first and the last piece of the answer."""
        out = run_model(model, batch)
        return torch.stack([out["start_logits"], out["end_logits"]], dim=-1)

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        """Half of the cross entropy of the start and of the end, each over the tokens of an example."""
        refuse_options(self.name, options, "focal_gamma", "label_smoothing")
        lengths = torch.tensor([len(example.input_ids) for example in examples], device=logits.device)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        columns = torch.arange(int(lengths.max()), device=logits.device)
        real = columns < lengths[:, None]
        table = wide.new_full((*real.shape, 2), -torch.inf)
        table[real] = wide  # (B, S, 2)
        targets = torch.tensor([example.target for example in examples], device=logits.device)  # (B, 2)
        return nn.functional.cross_entropy(table, targets, reduction="sum") / 2

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        """A row's answer ("" for none), its characters, `n_best`, and the row's id where it has one.

        null_difference is the score of no answer less that of the best answer.
        """
        contexts = texts(table, columns["context"])
        candidates: list[list[Candidate]] = [[] for _ in contexts]
        null = [np.inf] * len(contexts)
        for scores, example in zip(outputs, examples, strict=True):
            null[example.row] = min(null[example.row], float(scores[0].sum()))
            best = window_answers(scores, example.extra, contexts[example.row], self.options)
            candidates[example.row] += best
        found = [self._prediction(*parts) for parts in zip(contexts, candidates, null, strict=True)]
        if "id" in table.columns:  # by which SQuAD's own evaluation finds the question
            found = [{"id": name, **item} for name, item in zip(table["id"], found, strict=True)]
        return found

    def _prediction(self, context: str, candidates: Sequence[Candidate], null: float) -> dict[str, Any]:
        by_place: dict[Span, Candidate] = {}
        for candidate in sorted(candidates, key=lambda found: -found.score):
            by_place.setdefault((candidate.start, candidate.end), candidate)
        best = list(by_place.values())[: self.options.n_best]
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
        """exact_match and f1 in [0, 1], as SQuAD defines them; where some questions have no answer, also of each kind,
        and the threshold that would be best for these rows."""
        if not len(table):
            raise ValueError("no row came; expected at least one to compute metrics of")
        golds = [[answer.text for answer in answers] for answers in self.answers(table, columns)]
        pairs = [best_scores(item["answer"], gold, self.by) for item, gold in zip(predictions, golds, strict=True)]
        exact, f1 = np.array(pairs).T
        found: dict[str, Any] = {"exact_match": float(exact.mean()), "f1": float(f1.mean()), "compared_by": self.by}
        answerable = np.array([bool(gold) for gold in golds])
        if answerable.all():
            return found
        for name, chosen in (("answerable", answerable), ("unanswerable", ~answerable)):
            found[f"{name}_questions"] = int(chosen.sum())
            if chosen.any():
                found |= {f"{name}_exact_match": float(exact[chosen].mean()), f"{name}_f1": float(f1[chosen].mean())}
        if self.without_answer:
            answered = [
                next((i["answer"] for i in item["n_best"] if i["start"] is not None), "") for item in predictions
            ]
            worth = [best_scores(text, gold, self.by) for text, gold in zip(answered, golds, strict=True)]
            gaps = [np.inf if item["null_difference"] is None else item["null_difference"] for item in predictions]
            for number, name in enumerate(("exact_match", "f1")):
                threshold, score = best_threshold([pair[number] for pair in worth], answerable.tolist(), gaps)
                found |= {f"best_{name}": score, f"best_{name}_threshold": threshold}
            found["null_threshold"] = self.null_threshold
        return found

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """1 - F1 of each answer."""
        pairs = zip(predictions, self.answers(table, columns), strict=True)
        return [1.0 - best_scores(item["answer"], [gold.text for gold in golds], self.by)[1] for item, golds in pairs]


def _once(tokenizer: Tokenizer, contexts: Sequence[str]) -> dict[str, Pieces]:
    """The pieces of every context; several questions share one."""
    distinct = list(dict.fromkeys(contexts))
    return dict(zip(distinct, text_pieces(tokenizer, distinct), strict=True))


def window_answers(scores: Array, place: Place, context: str, options: QuestionAnsweringOptions) -> list[Candidate]:
    """The best answers of one window, at most n_best.

    Args:
        scores: (L, 2), of the whole input.
    """
    count = place.window.end - place.window.start
    if not count:
        return []
    inside = scores[place.offset : place.offset + count].astype(np.float64)
    longest = min(options.max_answer, count)
    ends = np.full(count + longest - 1, -np.inf)
    ends[:count] = inside[:, 1]
    reached = np.lib.stride_tricks.sliding_window_view(ends, longest)
    # The n best spans start at the n pieces whose own best spans are the best: only these are tried with every end.
    firsts = _largest(inside[:, 0] + reached.max(1), options.n_best)
    total = (inside[firsts, :1] + reached[firsts]).ravel()  # from each of them, 1 to `longest` pieces
    found = []
    for index in _largest(total, options.n_best).tolist():
        if np.isfinite(total[index]):
            first = place.window.start + int(firsts[index // longest])
            start, end = character_range(context, place.spans, first, first + index % longest + 1)
            found.append(Candidate(start, end, float(total[index])))
    return found


def _largest(values: Array, count: int) -> Array:
    """Where the `count` largest values are, the largest first."""
    best: Array = np.argpartition(-values, min(count, len(values)) - 1)[:count]
    return best[np.argsort(-values[best], kind="stable")]
