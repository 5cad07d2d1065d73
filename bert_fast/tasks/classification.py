"""Texts, or pairs of texts, to one class, to any number of classes, or to a number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.tasks.encoding import encode_parts
from bert_fast.tasks.io.columns import LABEL, SCORE, TEXT, TEXT_PAIR, Role, setting_of, texts
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.metrics import classification_metrics, multi_label_metrics, regression_metrics
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Columns, Example, LossOptions, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TextOptions:
    """Settings of the tasks classification, multi-label and regression.

    Args:
        pooling: what the classifier reads: cls, the architecture's own head on the first token, as transformers has it;
            or the mean or the maximum of all tokens, or both side by side. transformers computes only cls: predict with
            bert_fast what is trained with another.
    """

    pooling: Literal["cls", "mean", "max", "mean_max"] = "cls"

    def __post_init__(self) -> None:
        if self.pooling not in ("cls", "mean", "max", "mean_max"):
            raise ValueError(f"pooling is {self.pooling!r}; expected cls, mean, max or mean_max")


class _TextTask(Task):
    """What the three tasks share: the examples, and outputs averaged over the examples of a row."""

    model_class = "BertForSequenceClassification"
    options_class: ClassVar[type] = TextOptions
    words_are_free = True

    def head_config(self) -> dict[str, Any]:
        pooling = self.options.pooling
        return {} if pooling == "cls" else {"classifier_pooling": pooling}

    def targets(self, table: Table, columns: Columns) -> list[Any]:
        """The target of each row."""
        raise NotImplementedError

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        pairs = texts(table, columns["text_pair"]) if "text_pair" in columns else None
        encodings = encode_parts(tokenizer, texts(table, columns["text"]), pairs, text)
        targets = self.targets(table, columns) if self.has_targets(columns) else [None] * len(table)
        return [
            Example(row, encoding.ids, encoding.type_ids, target)
            for row, (parts, target) in enumerate(zip(encodings, targets, strict=True))
            for encoding in parts
        ]

    def has_targets(self, columns: Columns) -> bool:
        return "label" in columns

    def row_logits(self, outputs: Sequence[Array], examples: Sequence[Example], rows: int) -> Array:
        """(rows, C): the mean of the logits of each row's examples; NaN for a row without any."""
        if not rows:
            return np.zeros((0, 1))
        total = np.zeros((rows, len(outputs[0])))
        np.add.at(total, [example.row for example in examples], np.stack(outputs))
        counts = np.bincount([example.row for example in examples], minlength=rows)
        return total / np.where(counts, counts, np.nan)[:, None]


def label_name(value: Any) -> str:
    """The name of a label; whole numbers without a decimal point, so that a file's 1 and a table's 1.0 are one."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def label_order(names: Sequence[str]) -> list[str]:
    """Distinct names, numbers by their value and before words."""
    return sorted(set(names), key=lambda name: (0, int(name), name) if name.lstrip("-").isdecimal() else (1, 0, name))


def unseen_message(table: Table, unseen: Mapping[str, int], labels: Sequence[str]) -> str:
    """What is said about labels that the model has not learnt."""
    listed = ", ".join(f"{label!r} ({count} rows)" for label, count in sorted(unseen.items()))
    known = ", ".join(labels[:20]) + (" ..." if len(labels) > 20 else "")
    return f"{table.source}: labels unseen in training: {listed}; training had {known}"


class Classification(_TextTask):
    """One class for each text, or pair of texts."""

    name = "classification"
    roles = (TEXT, TEXT_PAIR, LABEL)
    main_metric = "accuracy"
    labels: list[str]

    def _names(self, table: Table, columns: Columns) -> list[str]:
        found = []
        for row, value in enumerate(table[columns["label"]]):
            if isinstance(value, (list, dict)):
                kind = type(value).__name__
                raise ValueError(f"{table.where(row)}: the label is a {kind}; lists of labels are the task multi-label")
            name = "" if value is None or value != value else label_name(value)
            if not name:
                raise ValueError(f"{table.where(row)}: no label in {columns['label']!r}; every row needs one")
            found.append(name)
        return found

    def fit(self, table: Table, columns: Columns) -> None:
        names = self._names(table, columns)
        self.labels = label_order(names)
        if len(self.labels) < 2:
            what = f"every row has the label {self.labels[0]!r}" if self.labels else "there are no rows"
            raise ValueError(f"{table.source}: {what}; expected two classes or more")
        if len(self.labels) > max(50, len(names) // 2):
            raise ValueError(
                f"{table.source}: {len(self.labels)} different labels in {len(names)} rows of {columns['label']!r}; "
                f"is it another column, named with {setting_of('label')}, or the task regression?"
            )

    def check(self, table: Table, columns: Columns) -> list[str]:
        counts = Counter(self._names(table, columns))
        if unseen := {name: count for name, count in counts.items() if name not in self.labels}:
            raise ValueError(unseen_message(table, unseen, self.labels))
        absent = [label for label in self.labels if label not in counts]
        return [f"{table.source} has no row of {', '.join(absent)}"] if absent else []

    def settings(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.labels = list(settings["labels"])

    def model_config(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: number for number, label in enumerate(self.labels)},
            "problem_type": "single_label_classification",
        }

    def targets(self, table: Table, columns: Columns) -> list[int]:
        numbers = {label: number for number, label in enumerate(self.labels)}
        return [numbers[name] for name in self._names(table, columns)]

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        targets = torch.tensor([example.target for example in examples], device=logits.device)
        return class_loss(logits, targets, options)

    def weight(self, examples: Sequence[Example], options: LossOptions) -> float:
        if options.class_weights is None:
            return float(len(examples))
        return float(options.class_weights[[example.target for example in examples]].sum())

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        found = []
        for scores in softmax(self.row_logits(outputs, examples, len(table))):
            best = int(scores.argmax())
            named = dict(zip(self.labels, scores.tolist(), strict=True))
            found.append({"label": self.labels[best], "probability": float(scores[best]), "scores": named})
        return found

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        return classification_metrics(self.targets(table, columns), score_matrix(predictions, self.labels), self.labels)

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """1 - the probability of the true class, where another one is predicted."""
        wanted = [self.labels[number] for number in self.targets(table, columns)]
        pairs = zip(predictions, wanted, strict=True)
        return [0.0 if item["label"] == name else 1.0 - item["scores"][name] for item, name in pairs]

    def class_counts(self, examples: Sequence[Example]) -> list[int]:
        counts = Counter(example.target for example in examples)
        return [counts[number] for number in range(len(self.labels))]

    def class_of(self, example: Example) -> int:
        return int(example.target)


def class_loss(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """The sum of the cross entropy, weighted, smoothed and focal as `options` says; targets of -100 are left out.

        w[y] * (1 - p[y])^gamma * (-log p[y])

    Args:
        logits: (M, C).
        targets: (M,) int64.
    """
    weights = None if options.class_weights is None else options.class_weights.to(logits.device)
    smoothing = options.label_smoothing
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = F.cross_entropy(wide, targets, weights, reduction="none", label_smoothing=smoothing)
    if options.focal_gamma:
        log_p = wide.log_softmax(-1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1)
        losses = losses * (-torch.expm1(log_p)).clamp(min=1e-8) ** options.focal_gamma
    return losses.sum()


def softmax(logits: Array) -> Array:
    """Over the last axis, in float64."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = shifted / shifted.sum(-1, keepdims=True)
    return result


def score_matrix(predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Array:
    """(rows, C) from predictions with `scores`."""
    rows = [[prediction["scores"][label] for label in labels] for prediction in predictions]
    return np.array(rows, dtype=np.float64).reshape(len(predictions), len(labels))


@dataclass(frozen=True)
class MultiLabelOptions(TextOptions):
    """Settings of the task multi-label, beside `TextOptions`.

    Args:
        separator: between the labels of a row where they are one text.
        columns: in place of one column with labels, columns that are 1 where the label of their name applies.
        threshold: from this probability on a label is predicted.
    """

    separator: str = ","
    columns: Sequence[str] = ()
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; expected more than 0 and less than 1")
        if not self.separator:
            raise ValueError("separator is empty; expected what stands between two labels, such as ','")


class MultiLabel(_TextTask):
    """Any number of classes for each text, or pair of texts; a row may have none."""

    name = "multi-label"
    roles = (TEXT, TEXT_PAIR, Role("label", LABEL.usual, required=False, target=True))
    options_class = MultiLabelOptions
    main_metric = "micro_f1"
    labels: list[str]

    def has_targets(self, columns: Columns) -> bool:
        return "label" in columns or bool(self.options.columns)

    def _lists(self, table: Table, columns: Columns) -> list[list[str]]:
        if self.options.columns:
            marks = [[label_name(value) for value in table[name]] for name in self.options.columns]
            for name, values in zip(self.options.columns, marks, strict=True):
                for row, value in enumerate(values):
                    if value not in ("0", "1", "True", "False"):
                        raise ValueError(f"{table.where(row)}: {name!r} holds {value!r}; expected 0 or 1")
            return [
                [name for name, mark in zip(self.options.columns, row, strict=True) if mark in ("1", "True")]
                for row in zip(*marks, strict=True)
            ]
        if "label" not in columns:
            raise ValueError(
                f"{table.source}: which column has the labels? It has {', '.join(table.columns)}; name one with "
                f"{setting_of('label')}, or several of 0 and 1 with --options.columns"
            )
        found = []
        for value in table[columns["label"]]:
            text = "" if value is None else str(value)
            parts = value if isinstance(value, list) else text.split(self.options.separator)
            found.append([name for name in map(label_name, parts) if name])
        return found

    def fit(self, table: Table, columns: Columns) -> None:
        lists = self._lists(table, columns)
        self.labels = list(self.options.columns) or label_order([name for names in lists for name in names])
        if not self.labels:
            raise ValueError(f"{table.source}: no row has a label; expected some")
        if all(set(names) == set(lists[0]) for names in lists):
            raise ValueError(f"{table.source}: every row has the same labels ({', '.join(lists[0]) or 'none'})")

    def check(self, table: Table, columns: Columns) -> list[str]:
        counts = Counter(name for names in self._lists(table, columns) for name in set(names))
        if unseen := {name: count for name, count in counts.items() if name not in self.labels}:
            raise ValueError(unseen_message(table, unseen, self.labels))
        absent = [label for label in self.labels if label not in counts]
        return [f"{table.source} has no row of {', '.join(absent)}"] if absent else []

    def settings(self) -> dict[str, Any]:
        return {"labels": self.labels}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.labels = list(settings["labels"])

    def model_config(self) -> dict[str, Any]:
        numbers = {label: number for number, label in enumerate(self.labels)}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": numbers,
            "problem_type": "multi_label_classification",
        }

    def targets(self, table: Table, columns: Columns) -> list[list[float]]:
        lists = self._lists(table, columns)
        return [[float(label in names) for label in self.labels] for names in map(set, lists)]

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        """Binary cross entropy; class weights are the weight of a class where it applies."""
        targets = torch.tensor([example.target for example in examples], device=logits.device)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        weights = None if options.class_weights is None else options.class_weights.to(logits.device)
        smooth = targets * (1 - options.label_smoothing) + options.label_smoothing / 2
        losses = F.binary_cross_entropy_with_logits(wide, smooth.to(wide.dtype), pos_weight=weights, reduction="none")
        if options.focal_gamma:
            p = wide.sigmoid()
            losses = losses * torch.where(targets > 0.5, 1 - p, p).clamp(min=1e-8) ** options.focal_gamma
        return losses.sum()

    def weight(self, examples: Sequence[Example], options: LossOptions) -> float:
        return float(len(examples) * len(self.labels))

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        found = []
        for probabilities in (np.tanh(self.row_logits(outputs, examples, len(table)) / 2) + 1) / 2:  # sigmoid
            scores = dict(zip(self.labels, probabilities.tolist(), strict=True))
            chosen = [label for label, score in scores.items() if score >= self.options.threshold]
            found.append({"labels": chosen, "scores": scores})
        return found

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        true = np.array(self.targets(table, columns)).reshape(len(table), len(self.labels))
        scores = score_matrix(predictions, self.labels)
        return multi_label_metrics(true, scores, self.labels, self.options.threshold)

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """The mean distance of the probabilities from 0 and 1, where a label too many or too few is predicted."""
        true = np.array(self.targets(table, columns)).reshape(len(table), len(self.labels))
        scores = score_matrix(predictions, self.labels)
        wrong = ((scores >= self.options.threshold) != (true > 0.5)).any(1)
        found: list[float] = np.where(wrong, np.abs(scores - true).mean(1), 0.0).tolist()
        return found

    def class_counts(self, examples: Sequence[Example]) -> list[int]:
        return [int(count) for count in np.sum([example.target for example in examples], axis=0)]


class Regression(_TextTask):
    """A number for each text, or pair of texts."""

    name = "regression"
    roles = (TEXT, TEXT_PAIR, SCORE)
    main_metric = "pearson"

    def targets(self, table: Table, columns: Columns) -> list[float]:
        found = []
        for row, value in enumerate(table[columns["label"]]):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise ValueError(f"{table.where(row)}: {columns['label']!r} holds {value!r}; expected a number")
            found.append(number)
        return found

    def fit(self, table: Table, columns: Columns) -> None:
        values = self.targets(table, columns)
        if len(set(values)) < 2:
            what = f"every row has the value {values[0]}" if values else "there are no rows"
            raise ValueError(f"{table.source}: {what}; expected different numbers")

    def check(self, table: Table, columns: Columns) -> list[str]:
        self.targets(table, columns)
        return []

    def settings(self) -> dict[str, Any]:
        return {}

    def restore(self, settings: Mapping[str, Any]) -> None:
        pass

    def model_config(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": "regression"}

    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        targets = torch.tensor([example.target for example in examples], device=logits.device, dtype=wide.dtype)
        return F.mse_loss(wide.squeeze(-1), targets, reduction="sum")

    def decode(
        self, outputs: Sequence[Array], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        return [{"value": float(value)} for value in self.row_logits(outputs, examples, len(table))[:, 0]]

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        return regression_metrics(self.targets(table, columns), [prediction["value"] for prediction in predictions])

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """How far each value is from the true one."""
        return [abs(item["value"] - x) for item, x in zip(predictions, self.targets(table, columns), strict=True)]
