"""Multiple choice: selects one of several continuations of, or answers to, a text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast.tasks.classification import label_name, softmax
from bert_fast.tasks.encoding import encode_texts
from bert_fast.tasks.io.columns import Role, column_option, text_column
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Batch, Columns, Example, LossOptions, Task, reject_options, run_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]

TEXT = Role(
    "text", ("text", "context", "article", "passage", "premise", "sent1", "startphrase", "ctx", "prompt", "question")
)
QUESTION = Role("question", ("question", "query", "sent2"), required=False)
CHOICES = Role("choices", ("choices", "options", "endings", "answers", "candidates"), required=False)
LABEL = Role("label", ("label", "labels", "answer", "answerkey", "correct", "target", "gold"), target=True)
_CHOICE_COLUMN = re.compile(
    r"(?:choice|option|ending|answer|alternative|solution|sol)[_ -]?(?:\d|[a-h])$", re.IGNORECASE
)


@dataclass(frozen=True)
class MultipleChoiceOptions:
    """Options of the task multiple-choice.

    Args:
        columns: the columns of one choice each, if no column holds lists of choices; by default those named choice0,
            ending1, option_a ...
    """

    columns: Sequence[str] = ()


class MultipleChoice(Task):
    """Selects one of several choices for each text; the number of choices may vary between rows.

    The label is the number of the correct choice (from 0, or from 1 if the training rows count from 1), its letter, or
    its text.
    """

    name = "multiple-choice"
    model_class = "BertForMultipleChoice"
    roles = (TEXT, QUESTION, CHOICES, LABEL)
    options_class = MultipleChoiceOptions
    text_roles = ("text",)
    keep_rows_together = True
    main_metric = "accuracy"
    first: int  # the number of the first choice in the data

    def fit(self, table: Table, columns: Columns) -> None:
        if not len(table):
            raise ValueError(f"{table.source}: the table is empty; expected at least one row")
        choices = self.choices(table, columns)
        names = [label_name(value) for value in table[columns["label"]]]
        numbers = [int(name) for name in names if name.isdecimal()]
        from_one = len(numbers) == len(names) and min(numbers) >= 1
        self.first = int(from_one and any(int(n) == len(of_row) for n, of_row in zip(names, choices, strict=True)))
        self.targets(table, columns)

    def check(self, table: Table, columns: Columns) -> list[str]:
        self.targets(table, columns)
        return []

    def settings(self) -> dict[str, Any]:
        return {"first": self.first}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.first = int(settings["first"])

    def choices(self, table: Table, columns: Columns) -> list[list[str]]:
        """The choices of every row.

        Raises:
            ValueError: there is no column of choices, or a row has fewer than two.
        """
        if "choices" in columns and not self.options.columns:
            values = table[columns["choices"]]
        else:
            used = {columns[role] for role in columns if role != "choices"}
            guessed = sorted(name for name in table.columns if _CHOICE_COLUMN.match(name) and name not in used)
            names = list(self.options.columns) or guessed
            if len(names) < 2:
                raise ValueError(
                    f"{table.source}: no column of choices among {', '.join(table.columns)}; name a column of lists "
                    f"with {column_option('choices')}, or one column per choice with --options.columns"
                )
            values = [list(row) for row in zip(*(table[name] for name in names), strict=True)]
        choices = []
        for row, value in enumerate(values):
            if isinstance(value, Mapping):  # as in ARC and CommonsenseQA: {"text": [...], "label": [...]}
                value = value.get("text")
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, (str, int, float)) for item in value):
                raise ValueError(f"{table.where(row)}: the choices are {value!r}; expected a list of texts")
            if len(value) < 2:
                raise ValueError(f"{table.where(row)}: {len(value)} choices; expected at least two")
            choices.append([str(item) for item in value])
        return choices

    def inputs(self, table: Table, columns: Columns) -> list[str]:
        choices = self.choices(table, columns)
        others = super().inputs(table, {role: name for role, name in columns.items() if role != "choices"})
        return [f"{text} {of_row}" for text, of_row in zip(others, choices, strict=True)]

    def targets(self, table: Table, columns: Columns) -> list[int]:
        """The index of the correct choice of every row.

        Raises:
            ValueError: a label is none of the row's choices.
        """
        targets = []
        rows = zip(self.choices(table, columns), table[columns["label"]], strict=True)
        for row, (choices, value) in enumerate(rows):
            name = "" if value is None else label_name(value)
            index = -1
            if name.isdecimal():
                index = int(name) - self.first
            elif len(name) == 1 and name.isascii() and name.isalpha() and name not in choices:
                index = ord(name.upper()) - ord("A")
            elif choices.count(name) == 1:
                index = choices.index(name)
            if not 0 <= index < len(choices):
                last = self.first + len(choices) - 1
                raise ValueError(
                    f"{table.where(row)}: the label is {value!r}; expected a number from {self.first} to {last}, "
                    f"a letter from A to {chr(ord('A') + len(choices) - 1)}, or the text of one choice"
                )
            targets.append(index)
        return targets

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """[CLS] text question [SEP] choice [SEP] for each choice; `extra` is its index."""
        first = text_column(table, columns["text"])
        if "question" in columns:
            questions = text_column(table, columns["question"])
            first = [f"{before} {question}".strip() for before, question in zip(first, questions, strict=True)]
        choices = self.choices(table, columns)
        targets = self.targets(table, columns) if "label" in columns else [None] * len(table)
        indices = [(row, index) for row, of_row in enumerate(choices) for index in range(len(of_row))]
        encodings = encode_texts(
            tokenizer, [first[row] for row, _ in indices], [choices[row][index] for row, index in indices], text
        )
        return [
            Example(row, encoding.ids, encoding.type_ids, targets[row], index)
            for (row, index), encoding in zip(indices, encodings, strict=True)
        ]

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,): the score of each choice."""
        return run_model(model, batch, num_choices=1)["logits"].squeeze(-1)

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        """Cross entropy over the choices of each row."""
        reject_options(self.name, options, "focal_gamma")
        starts = row_starts(examples)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = [
            nn.functional.cross_entropy(
                scores,
                torch.tensor(examples[start].target, device=logits.device),
                label_smoothing=options.label_smoothing,
            )
            for start, scores in zip(starts, wide.tensor_split(starts[1:]), strict=True)
        ]
        return torch.stack(losses).sum()

    def weight(self, examples: Sequence[Example], options: LossOptions) -> float:
        return float(len(row_starts(examples)))

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        """The predicted `choice` of a row (an index from 0), its text as `chosen`, and the `probabilities` of all."""
        choices = self.choices(table, columns)
        scores = [np.zeros(len(of_row)) for of_row in choices]
        for score, example in zip(outputs, examples, strict=True):
            scores[example.row][example.extra] = float(score)
        predictions = []
        for of_row, values in zip(choices, scores, strict=True):
            best = int(values.argmax())
            predictions.append({"choice": best, "chosen": of_row[best], "probabilities": softmax(values).tolist()})
        return predictions

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """accuracy, and as a baseline that of always predicting the most frequent correct choice."""
        if not len(table):
            raise ValueError("the table is empty; expected at least one row to compute metrics")
        targets = np.array(self.targets(table, columns))
        chosen = np.array([prediction["choice"] for prediction in predictions])
        return {
            "accuracy": float((targets == chosen).mean()),
            "most_frequent_accuracy": float(np.bincount(targets).max() / len(targets)),
        }

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """1 - the probability of the correct choice, if another one is predicted."""
        pairs = zip(predictions, self.targets(table, columns), strict=True)
        return [0.0 if item["choice"] == target else 1.0 - item["probabilities"][target] for item, target in pairs]


def row_starts(examples: Sequence[Example]) -> list[int]:
    """The start of each row's choices in a batch; a row that occurs twice counts twice."""
    return [index for index, example in enumerate(examples) if example.extra == 0]
