"""Classification and regression of texts and pairs of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast._config import convert_fields
from bert_fast.tasks.encoding import encode_windows, is_truncated
from bert_fast.tasks.io.columns import LABEL, SCORE, TEXT, TEXT_PAIR, column_option, number_column, text_column
from bert_fast.tasks.io.labels import Labels, is_missing, label_name, labels_that_look_missing, plain_value
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.metrics import classification_metrics, regression_metrics
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
        convert_fields(self, "options.")


class TextTask(Task):
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
            Example(row, encoding.ids, encoding.type_ids, target, truncated=is_truncated(windows))
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


def unseen_labels_message(table: Table, unseen: Mapping[str, int], labels: Sequence[str]) -> str:
    """The error message for labels unseen in training."""
    listed = ", ".join(f"{label!r} ({count} rows)" for label, count in sorted(unseen.items()))
    known = ", ".join(labels[:20]) + (" ..." if len(labels) > 20 else "")
    return f"{table.source}: labels unseen in training: {listed}; expected {known}"


def describe_labels(labels: Sequence[str]) -> str:
    """The message about the labels that were found."""
    return f"{len(labels)} labels: {', '.join(labels[:20])}{' ...' if len(labels) > 20 else ''}"


def class_messages(table: Table, labels: Sequence[str], counts: Mapping[str, int]) -> list[str]:
    """Warnings about classes without a row, and about labels that look as if a row had none."""
    absent = [label for label in labels if not counts.get(label)]
    messages = [f"{table.source} has no row of {', '.join(absent)}"] if absent else []
    missing = labels_that_look_missing(counts)
    return [*messages, f"{table.source}: {missing}"] if missing else messages


class Classification(TextTask):
    """Assigns one class to each text or pair of texts.

    A prediction has `label`, `probability` and `scores`, the probability of every label.
    """

    name = "classification"
    roles = (TEXT, TEXT_PAIR, LABEL)
    main_metric = "accuracy"
    labels: list[str]

    def _values(self, table: Table, columns: Columns) -> list[Any]:
        """The labels of all rows.

        Raises:
            ValueError: a row has none, or a list; the message says where.
        """
        values = []
        for row, cell in enumerate(table[columns["label"]]):
            value = plain_value(cell)
            if isinstance(value, (list, tuple, set, frozenset, Mapping)):
                kind = type(value).__name__
                raise ValueError(f"{table.where(row)}: the label is a {kind}; the task multi-label takes lists")
            if is_missing(value):
                raise ValueError(
                    f"{table.where(row)}: no label in {columns['label']!r}; expected one in every row, or set no_label "
                    "to drop such rows"
                )
            values.append(value)
        return values

    def fit(self, table: Table, columns: Columns) -> None:
        values = self._values(table, columns)
        self.labels = Labels.fit(values).names
        if len(self.labels) < 2:
            problem = f"every row has the label {self.labels[0]!r}" if self.labels else "the table is empty"
            raise ValueError(f"{table.source}: {problem}; expected at least two classes")
        if len(self.labels) > max(50, len(values) // 2):
            raise ValueError(
                f"{table.source}: {len(self.labels)} different labels in {len(values)} rows of {columns['label']!r}; "
                f"name another column with {column_option('label')}, or use the task regression"
            )

    def check(self, table: Table, columns: Columns) -> list[str]:
        labels = Labels(self.labels)
        values = self._values(table, columns)
        if unseen := Counter(label_name(value) for value in values if labels.index(value) is None):
            raise ValueError(unseen_labels_message(table, unseen, self.labels))
        counts = Counter(self.labels[labels.index(value) or 0] for value in values)
        return class_messages(table, self.labels, counts)

    def describe(self) -> str:
        return describe_labels(self.labels)

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
        labels = Labels(self.labels)
        targets = [labels.index(value) for value in self._values(table, columns)]
        assert None not in targets, "checked"
        return targets  # type: ignore[return-value]

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

    def outcome(self, prediction: Mapping[str, Any]) -> str:
        return repr(prediction["label"])

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


class Regression(TextTask):
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

    def outcome(self, prediction: Mapping[str, Any]) -> str:
        return f"{prediction['value']:.4g}"
