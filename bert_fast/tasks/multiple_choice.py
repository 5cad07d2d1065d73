"""Multiple choice: selects one of several continuations of, or answers to, a text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast._config import convert_fields
from bert_fast.tasks.classification import softmax
from bert_fast.tasks.encoding import encode_texts, is_truncated
from bert_fast.tasks.io.columns import Role, column_option, text_column
from bert_fast.tasks.io.labels import is_missing, label_name, list_from_text, plain_value
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import FormatSettings, TextSettings
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
    r"(?:(?:choice|option|ending|answer|alternative|solution|sol)[_ -]?)?(?:\d|[a-h])$", re.IGNORECASE
)
_LETTER = re.compile(r"\(?([A-Za-z])[.):]?")
KEYS = ("from0", "from1", "texts")


@dataclass(frozen=True)
class MultipleChoiceOptions:
    """Options of the task multiple-choice.

    Args:
        columns: the columns of one choice each, if no column holds lists of choices; by default those named choice0,
            ending1, option_a, A ...
        keys: how labels name the correct choice, where the rows have no labels of their own for the choices: from0 and
            from1 are numbers counted from 0 or 1, letters, and texts; texts are texts of choices only; auto detects it.
    """

    columns: list[str] = field(default_factory=list)
    keys: Literal["auto", "from0", "from1", "texts"] = "auto"

    def __post_init__(self) -> None:
        convert_fields(self, "options.")


class Choices(NamedTuple):
    """The choices of a row: their texts, and their own labels or column names, if any."""

    texts: list[str]
    labels: list[str]


class MultipleChoice(Task):
    """Selects one of several choices for each text; the number of choices may vary between rows.

    The label is one of the labels that the file gives to the choices (A to E, 1 to 4, names of columns); else the
    number of the correct choice (from 0 or 1), its letter, or its text.
    """

    name = "multiple-choice"
    model_class = "BertForMultipleChoice"
    roles = (TEXT, QUESTION, CHOICES, LABEL)
    options_class = MultipleChoiceOptions
    text_roles = ("text",)
    keep_rows_together = True
    main_metric = "accuracy"
    keys: str  # one of KEYS

    def read(
        self, source: str | Path, names: Sequence[str] | None = None, settings: FormatSettings | None = None
    ) -> Table:
        """Read the table of a source; a question with its choices, as in the files of ARC, becomes two columns."""
        table = super().read(source, names, settings)
        questions = table.columns.get("question", [])
        if questions and all(isinstance(item, Mapping) and {"stem", "choices"} <= set(item) for item in questions):
            table = table.with_column("choices", [item["choices"] for item in questions])
            table = table.with_column("question", [item["stem"] for item in questions])
        return table

    def fit(self, table: Table, columns: Columns) -> None:
        if not len(table):
            raise ValueError(f"{table.source}: the table is empty; expected at least one row")
        self.keys = self.options.keys if self.options.keys != "auto" else self._detect_keys(table, columns)
        self.targets(table, columns)

    def _detect_keys(self, table: Table, columns: Columns) -> str:
        """The reading of labels that fits every row.

        Raises:
            ValueError: several fit, and some row has another correct choice in each; the message names the row.
        """
        rows = list(zip(self._choices(table, columns), table[columns["label"]], strict=True))
        readings = {keys: [correct_choice(choices, label, keys) for choices, label in rows] for keys in KEYS}
        fitting = {keys: targets for keys, targets in readings.items() if None not in targets}
        if not fitting:  # `targets` names the row
            return "from0" if readings["from0"].count(None) <= readings["from1"].count(None) else "from1"
        first, *others = fitting
        for other in others:
            for row, (one, two) in enumerate(zip(fitting[first], fitting[other], strict=True)):
                if one != two:
                    raise ValueError(
                        f"{table.where(row)}: the label {rows[row][1]!r} is {rows[row][0].texts[one or 0]!r} with "
                        f"options.keys {first}, {rows[row][0].texts[two or 0]!r} with {other}, and all rows fit both; "
                        "set options.keys"
                    )
        return first

    def check(self, table: Table, columns: Columns) -> list[str]:
        self.targets(table, columns)
        return []

    def describe(self) -> str:
        known = {"from0": "numbers from 0, letters or texts", "from1": "numbers from 1, letters or texts"}
        return f"labels are those of the choices, or {known.get(self.keys, 'texts')}"

    def settings(self) -> dict[str, Any]:
        return {"keys": self.keys}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.keys = settings["keys"] if "keys" in settings else KEYS[int(settings["first"])]

    def choices(self, table: Table, columns: Columns) -> list[list[str]]:
        """The texts of the choices of every row.

        Raises:
            ValueError: there is no column of choices, or a row has fewer than two.
        """
        return [choices.texts for choices in self._choices(table, columns)]

    def _choices(self, table: Table, columns: Columns) -> list[Choices]:
        if "choices" in columns and not self.options.columns:
            values = table[columns["choices"]]
            names: list[str] = []
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
        rows = []
        for row, value in enumerate(values):
            choices = read_choices(value)
            if choices is None:
                raise ValueError(f"{table.where(row)}: the choices are {value!r}; expected a list of texts")
            if len(choices.texts) < 2:
                raise ValueError(f"{table.where(row)}: {len(choices.texts)} choices; expected at least two")
            rows.append(choices._replace(labels=names) if names else choices)
        return rows

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
        rows = zip(self._choices(table, columns), table[columns["label"]], strict=True)
        for row, (choices, value) in enumerate(rows):
            index = correct_choice(choices, value, self.keys)
            if index is None:
                raise ValueError(f"{table.where(row)}: the label is {value!r}; {self._expected(choices)}")
            targets.append(index)
        return targets

    def _expected(self, choices: Choices) -> str:
        """The labels that a row may have, for a message."""
        if choices.labels and not self.options.columns:
            return f"expected one of {', '.join(choices.labels)}, or the text of one choice"
        if self.keys == "texts":
            return "expected the text of one choice"
        first = KEYS.index(self.keys)
        return (
            f"expected a number from {first} to {first + len(choices.texts) - 1}, a letter from A to "
            f"{chr(ord('A') + len(choices.texts) - 1)}, or the text of one choice"
        )

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
            Example(row, encoding.ids, encoding.type_ids, targets[row], index, is_truncated([encoding]))
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

    def outcome(self, prediction: Mapping[str, Any]) -> str:
        return f"choice {prediction['choice']}"

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """1 - the probability of the correct choice, if another one is predicted."""
        pairs = zip(predictions, self.targets(table, columns), strict=True)
        return [0.0 if item["choice"] == target else 1.0 - item["probabilities"][target] for item, target in pairs]


def row_starts(examples: Sequence[Example]) -> list[int]:
    """The start of each row's choices in a batch; a row that occurs twice counts twice."""
    return [index for index, example in enumerate(examples) if example.extra == 0]


def read_choices(value: Any) -> Choices | None:
    """The choices in a cell: a list of texts, or of {text, label} as in CommonsenseQA; {text: [...], label: [...]} as
    in ARC; label -> text as in MedQA; or the text of such a list. None if the value is something else."""
    value = plain_value(value)
    if isinstance(value, str):
        value = list_from_text(value)
    if isinstance(value, Mapping):
        if "text" in value:
            value, labels = plain_value(value["text"]), plain_value(value.get("label"))
        else:
            value, labels = list(value.values()), list(value)
    elif isinstance(value, (list, tuple)) and value and all(isinstance(x, Mapping) and "text" in x for x in value):
        value, labels = [x["text"] for x in value], [x.get("label") for x in value]
    else:
        labels = None
    if not isinstance(value, (list, tuple)):
        return None
    value = [plain_value(item) for item in value]
    if not all(isinstance(item, (str, int, float)) and not (is_missing(item) and item != "") for item in value):
        return None
    texts = [item if isinstance(item, str) else label_name(item) for item in value]
    complete = isinstance(labels, (list, tuple)) and len(labels) == len(texts) and not any(map(is_missing, labels))
    return Choices(texts, [label_name(label) for label in labels or ()] if complete else [])


def correct_choice(choices: Choices, label: Any, keys: str) -> int | None:
    """The index of the choice that `label` names; None if it names none, or more than one.

    A label of the choices' own comes first, whatever its case. Then `keys`, one of `KEYS`, says what numbers count
    from; "texts" takes no numbers and letters.
    """
    label = plain_value(label)
    if is_missing(label) or isinstance(label, (list, tuple, Mapping)):
        return None
    name = label_name(label)
    own = [choice.lower() for choice in choices.labels]
    if own.count(name.lower()) == 1:
        return own.index(name.lower())
    index = -1
    if keys != "texts" and name.isdecimal() and name.isascii():
        index = int(name) - KEYS.index(keys) if len(name) < 10 else -1
    elif keys != "texts" and (letter := _LETTER.fullmatch(name)):
        index = ord(letter[1].upper()) - ord("A")
    elif (texts := [text.strip() for text in choices.texts]).count(name) == 1:
        index = texts.index(name)
    return index if 0 <= index < len(choices.texts) else None
