"""Classification, multi-label classification and regression of texts and pairs of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.tasks.encoding import encode_windows
from bert_fast.tasks.io.columns import LABEL, SCORE, TEXT, TEXT_PAIR, Role, column_option, number_column, text_column
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.metrics import classification_metrics, multi_label_metrics, regression_metrics
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Columns, Example, LossOptions, Task

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TextOptions:
    """Options of the tasks classification, multi-label and regression.

    Args:
        pooling: the input of the classifier: cls, the architecture's standard head on the first token; or the mean, the
            maximum, or both concatenated (mean_max) over all tokens. transformers supports only cls: models with
            another pooling need bert_fast for prediction.
    """

    pooling: Literal["cls", "mean", "max", "mean_max"] = "cls"

    def __post_init__(self) -> None:
        if self.pooling not in ("cls", "mean", "max", "mean_max"):
            raise ValueError(f"pooling is {self.pooling!r}; expected cls, mean, max or mean_max")


class _TextTask(Task):
    """Base class of the three tasks: examples, and logits averaged over the examples of a row."""

    model_class = "BertForSequenceClassification"
    options_class: ClassVar[type] = TextOptions
    words_may_change = True

    def head_config(self) -> dict[str, Any]:
        pooling = self.options.pooling
        return {} if pooling == "cls" else {"classifier_pooling": pooling}

    def targets(self, table: Table, columns: Columns) -> list[Any]:
        """The target of each row."""
        raise NotImplementedError

    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        pairs = text_column(table, columns["text_pair"]) if "text_pair" in columns else None
        encodings = encode_windows(tokenizer, text_column(table, columns["text"]), pairs, text)
        targets = self.targets(table, columns) if self.has_targets(columns) else [None] * len(table)
        return [
            Example(row, encoding.ids, encoding.type_ids, target)
            for row, (windows, target) in enumerate(zip(encodings, targets, strict=True))
            for encoding in windows
        ]

    def has_targets(self, columns: Columns) -> bool:
        return "label" in columns

    def row_logits(self, outputs: Sequence[Array], examples: Sequence[Example], rows: int) -> Array:
        """(rows, C): the mean of the logits of each row's examples; NaN for a row without examples."""
        if not rows:
            return np.zeros((0, 1))
        total = np.zeros((rows, len(outputs[0])))
        np.add.at(total, [example.row for example in examples], np.stack(outputs))
        counts = np.bincount([example.row for example in examples], minlength=rows)
        return total / np.where(counts, counts, np.nan)[:, None]


def label_name(value: Any) -> str:
    """The name of a label; integral floats have no decimal point, so that "1" and 1.0 are equal."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def label_order(names: Sequence[str]) -> list[str]:
    """The distinct names in order: integers by value, then other names."""
    return sorted(set(names), key=lambda name: (0, int(name), name) if name.lstrip("-").isdecimal() else (1, 0, name))


def unseen_labels_message(table: Table, unseen: Mapping[str, int], labels: Sequence[str]) -> str:
    """The error message for labels unseen in training."""
    listed = ", ".join(f"{label!r} ({count} rows)" for label, count in sorted(unseen.items()))
    known = ", ".join(labels[:20]) + (" ..." if len(labels) > 20 else "")
    return f"{table.source}: labels unseen in training: {listed}; expected {known}"


class Classification(_TextTask):
    """Assigns one class to each text or pair of texts.

    A prediction has `label`, `probability` and `scores`, the probability of every label.
    """

    name = "classification"
    roles = (TEXT, TEXT_PAIR, LABEL)
    main_metric = "accuracy"
    labels: list[str]

    def _names(self, table: Table, columns: Columns) -> list[str]:
        names = []
        for row, value in enumerate(table[columns["label"]]):
            if isinstance(value, (list, dict)):
                kind = type(value).__name__
                raise ValueError(f"{table.where(row)}: the label is a {kind}; the task multi-label takes lists")
            name = "" if value is None or value != value else label_name(value)
            if not name:
                raise ValueError(f"{table.where(row)}: no label in {columns['label']!r}; expected one in every row")
            names.append(name)
        return names

    def fit(self, table: Table, columns: Columns) -> None:
        names = self._names(table, columns)
        self.labels = label_order(names)
        if len(self.labels) < 2:
            problem = f"every row has the label {self.labels[0]!r}" if self.labels else "the table is empty"
            raise ValueError(f"{table.source}: {problem}; expected at least two classes")
        if len(self.labels) > max(50, len(names) // 2):
            raise ValueError(
                f"{table.source}: {len(self.labels)} different labels in {len(names)} rows of {columns['label']!r}; "
                f"name another column with {column_option('label')}, or use the task regression"
            )

    def check(self, table: Table, columns: Columns) -> list[str]:
        counts = Counter(self._names(table, columns))
        if unseen := {name: count for name, count in counts.items() if name not in self.labels}:
            raise ValueError(unseen_labels_message(table, unseen, self.labels))
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
        predictions = []
        for scores in softmax(self.row_logits(outputs, examples, len(table))):
            best = int(scores.argmax())
            by_label = dict(zip(self.labels, scores.tolist(), strict=True))
            predictions.append({"label": self.labels[best], "probability": float(scores[best]), "scores": by_label})
        return predictions

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        return classification_metrics(self.targets(table, columns), score_matrix(predictions, self.labels), self.labels)

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """1 - the probability of the true class, if another class is predicted."""
        true_labels = [self.labels[number] for number in self.targets(table, columns)]
        pairs = zip(predictions, true_labels, strict=True)
        return [0.0 if item["label"] == name else 1.0 - item["scores"][name] for item, name in pairs]

    def class_counts(self, examples: Sequence[Example]) -> list[int]:
        counts = Counter(example.target for example in examples)
        return [counts[number] for number in range(len(self.labels))]

    def class_of(self, example: Example) -> int:
        return int(example.target)


def class_loss(logits: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
    """The summed cross entropy with class weights, label smoothing and focal loss; targets of -100 are ignored.

        w[y] * (1 - p[y])^gamma * (-log p[y])

    Args:
        logits: (M, C).
        targets: int64 (M,).
        options: w (C,), gamma and the label smoothing.

    Returns:
        A scalar, fp64 for fp64 logits, else fp32.
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
    """Softmax over the last axis, without changing the dtype."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    result: Array = shifted / shifted.sum(-1, keepdims=True)
    return result


def score_matrix(predictions: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> Array:
    """(rows, C) float64 from the `scores` of predictions."""
    rows = [[prediction["scores"][label] for label in labels] for prediction in predictions]
    return np.array(rows, dtype=np.float64).reshape(len(predictions), len(labels))


@dataclass(frozen=True)
class MultiLabelOptions(TextOptions):
    """Options of the task multi-label, in addition to `TextOptions`.

    Args:
        separator: between the labels of a row if they are one string.
        columns: instead of one column of labels, one column of 0 and 1 per label, named like the label.
        threshold: the minimum probability of a predicted label.
    """

    separator: str = ","
    columns: Sequence[str] = ()
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold is {self.threshold}; expected a number in (0, 1)")
        if not self.separator:
            raise ValueError("separator is empty; expected a string such as ','")


class MultiLabel(_TextTask):
    """Assigns any number of classes, or none, to each text or pair of texts.

    A prediction has `labels` and `scores`, the probability of every label.
    """

    name = "multi-label"
    roles = (TEXT, TEXT_PAIR, Role("label", LABEL.usual_names, required=False, target=True))
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
                f"{table.source}: no column of labels among {', '.join(table.columns)}; name it with "
                f"{column_option('label')}, or columns of 0 and 1 with --options.columns"
            )
        lists = []
        for value in table[columns["label"]]:
            text = "" if value is None else str(value)
            labels = value if isinstance(value, list) else text.split(self.options.separator)
            lists.append([name for name in map(label_name, labels) if name])
        return lists

    def fit(self, table: Table, columns: Columns) -> None:
        lists = self._lists(table, columns)
        self.labels = list(self.options.columns) or label_order([name for names in lists for name in names])
        if not self.labels:
            raise ValueError(f"{table.source}: no row has a label; expected at least one")
        if all(set(names) == set(lists[0]) for names in lists):
            raise ValueError(
                f"{table.source}: every row has the same labels ({', '.join(lists[0]) or 'none'}); expected others too"
            )

    def check(self, table: Table, columns: Columns) -> list[str]:
        counts = Counter(name for names in self._lists(table, columns) for name in set(names))
        if unseen := {name: count for name, count in counts.items() if name not in self.labels}:
            raise ValueError(unseen_labels_message(table, unseen, self.labels))
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
        """Binary cross entropy; class weights scale the loss of positive targets."""
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
        predictions = []
        for probabilities in (np.tanh(self.row_logits(outputs, examples, len(table)) / 2) + 1) / 2:  # sigmoid
            scores = dict(zip(self.labels, probabilities.tolist(), strict=True))
            chosen = [label for label, score in scores.items() if score >= self.options.threshold]
            predictions.append({"labels": chosen, "scores": scores})
        return predictions

    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        true = np.array(self.targets(table, columns)).reshape(len(table), len(self.labels))
        scores = score_matrix(predictions, self.labels)
        return multi_label_metrics(true, scores, self.labels, self.options.threshold)

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float]:
        """The mean absolute error of the probabilities, if the predicted labels are not the true ones."""
        true = np.array(self.targets(table, columns)).reshape(len(table), len(self.labels))
        scores = score_matrix(predictions, self.labels)
        wrong = ((scores >= self.options.threshold) != (true > 0.5)).any(1)
        errors: list[float] = np.where(wrong, np.abs(scores - true).mean(1), 0.0).tolist()
        return errors

    def class_counts(self, examples: Sequence[Example]) -> list[int]:
        return [int(count) for count in np.sum([example.target for example in examples], axis=0)]


class Regression(_TextTask):
    """Predicts a number, `value`, for each text or pair of texts."""

    name = "regression"
    roles = (TEXT, TEXT_PAIR, SCORE)
    main_metric = "pearson"

    def targets(self, table: Table, columns: Columns) -> list[float]:
        return number_column(table, columns["label"])

    def fit(self, table: Table, columns: Columns) -> None:
        values = self.targets(table, columns)
        if len(set(values)) < 2:
            problem = f"every row has the value {values[0]}" if values else "the table is empty"
            raise ValueError(f"{table.source}: {problem}; expected different numbers")

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
        """The absolute error of each value."""
        return [abs(item["value"] - x) for item, x in zip(predictions, self.targets(table, columns), strict=True)]
