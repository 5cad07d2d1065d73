"""Multiple choice: which of several continuations or answers fits a text."""

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
from bert_fast.tasks.io.columns import Role, setting_of, texts
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Batch, Columns, Example, LossOptions, Task, refuse_options, run_model

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
    """Settings of the task multiple-choice.

    Args:
        columns: where there is no column with a list of choices, the columns that hold one each; by default those
            called choice0, ending1, option_a, ...
    """

    columns: Sequence[str] = ()


class MultipleChoice(Task):
    """One of several choices for each text; rows may have different numbers of them.

    The right one is given by its number (from 0, or from 1 where the training rows count so), its letter, or its text.
    """

    name = "multiple-choice"
    model_class = "BertForMultipleChoice"
    roles = (TEXT, QUESTION, CHOICES, LABEL)
    options_class = MultipleChoiceOptions
    text_roles = ("text",)
    rows_together = True
    main_metric = "accuracy"
    first: int  # the number of the first choice in the data

    def fit(self, table: Table, columns: Columns) -> None:
        if not len(table):
            raise ValueError(f"{table.source}: there are no rows")
        choices = self.choices(table, columns)
        names = [label_name(value) for value in table[columns["label"]]]
        numbers = [int(name) for name in names if name.isdecimal()]
        from_one = len(numbers) == len(names) and min(numbers) >= 1
        self.first = int(from_one and any(int(n) == len(own) for n, own in zip(names, choices, strict=True)))
        self.targets(table, columns)

    def check(self, table: Table, columns: Columns) -> list[str]:
        self.targets(table, columns)
        return []

    def settings(self) -> dict[str, Any]:
        return {"first": self.first}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.first = int(settings["first"])

    def choices(self, table: Table, columns: Columns) -> list[list[str]]:
        """The choices of every row. ValueError where a row has fewer than two, or no column has any."""
        if "choices" in columns and not self.options.columns:
            values = table[columns["choices"]]
        else:
            taken = {columns[role] for role in columns if role != "choices"}
            guessed = sorted(name for name in table.columns if _CHOICE_COLUMN.match(name) and name not in taken)
            names = list(self.options.columns) or guessed
            if len(names) < 2:
                raise ValueError(
                    f"{table.source}: which columns are the choices? It has {', '.join(table.columns)}; name a column "
                    f"of lists with {setting_of('choices')}, or a column for each with --options.columns"
                )
            values = [list(row) for row in zip(*(table[name] for name in names), strict=True)]
        found = []
        for row, value in enumerate(values):
            if isinstance(value, Mapping):  # the choices of ARC and CommonsenseQA: {"text": [...], "label": [...]}
                value = value.get("text")
            if not isinstance(value, (list, tuple)) or not all(isinstance(item, (str, int, float)) for item in value):
                raise ValueError(f"{table.where(row)}: the choices are {value!r}; expected a list of texts")
            if len(value) < 2:
                raise ValueError(f"{table.where(row)}: {len(value)} choices; expected two or more")
            found.append([str(item) for item in value])
        return found

    def inputs(self, table: Table, columns: Columns) -> list[str]:
        choices = self.choices(table, columns)
        read = super().inputs(table, {role: name for role, name in columns.items() if role != "choices"})
        return [f"{text} {own}" for text, own in zip(read, choices, strict=True)]

    def targets(self, table: Table, columns: Columns) -> list[int]:
        """The index of the right choice of every row. ValueError where a label is none of the row's choices."""
        found = []
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
            found.append(index)
        return found

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """[CLS] text and question [SEP] choice [SEP], for each choice; `extra` is its index."""
        first = texts(table, columns["text"])
        if "question" in columns:
            asked = texts(table, columns["question"])
            first = [f"{before} {question}".strip() for before, question in zip(first, asked, strict=True)]
        choices = self.choices(table, columns)
        targets = self.targets(table, columns) if "label" in columns else [None] * len(table)
        places = [(row, index) for row, own in enumerate(choices) for index in range(len(own))]
        encodings = encode_texts(
            tokenizer, [first[row] for row, _ in places], [choices[row][index] for row, index in places], text
        )
        return [
            Example(row, encoding.ids, encoding.type_ids, targets[row], index)
            for (row, index), encoding in zip(places, encodings, strict=True)
        ]

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """(B,): the score of every choice."""
        return run_model(model, batch, num_choices=1)["logits"].squeeze(-1)

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        """Cross entropy over the choices of each row."""
        refuse_options(self.name, options, "focal_gamma")
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
        """A row's `choice` (its index from 0), that one's text as `chosen`, and the `probabilities` of all."""
        choices = self.choices(table, columns)
        scores = [np.zeros(len(own)) for own in choices]
        for score, example in zip(outputs, examples, strict=True):
            scores[example.row][example.extra] = float(score)
        found = []
        for own, values in zip(choices, scores, strict=True):
            best = int(values.argmax())
            found.append({"choice": best, "chosen": own[best], "probabilities": softmax(values).tolist()})
        return found

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """accuracy, and that of always taking the choice which is right most often."""
        if not len(table):
            raise ValueError("no row came; expected at least one to compute metrics of")
        targets = np.array(self.targets(table, columns))
        chosen = np.array([prediction["choice"] for prediction in predictions])
        return {
            "accuracy": float((targets == chosen).mean()),
            "most_frequent_accuracy": float(np.bincount(targets).max() / len(targets)),
        }

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """1 - the probability of the right choice, where another one is taken."""
        pairs = zip(predictions, self.targets(table, columns), strict=True)
        return [0.0 if item["choice"] == right else 1.0 - item["probabilities"][right] for item, right in pairs]


def row_starts(examples: Sequence[Example]) -> list[int]:
    """Where each row's choices start in a batch; a row that is in it twice counts twice."""
    return [index for index, example in enumerate(examples) if example.extra == 0]
