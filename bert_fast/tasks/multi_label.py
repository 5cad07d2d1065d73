"""Multi-label classification of texts and pairs of texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bert_fast.tasks.classification import (
    Array,
    TextOptions,
    TextTask,
    class_messages,
    describe_labels,
    score_matrix,
    unseen_labels_message,
)
from bert_fast.tasks.io.columns import LABEL, TEXT, TEXT_PAIR, Role, column_option
from bert_fast.tasks.io.labels import (
    Labels,
    is_missing,
    label_key,
    label_name,
    list_from_text,
    mapping_from_text,
    plain_value,
)
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.metrics import multi_label_metrics
from bert_fast.tasks.task import Columns, Example, LossOptions


@dataclass(frozen=True)
class MultiLabelOptions(TextOptions):
    """Options of the task multi-label, in addition to `TextOptions`.

    Args:
        separator: between the labels of a row if they are one string; auto detects comma, semicolon or bar. Lists that
            are written as text ("[a, b]", JSON) need none.
        columns: instead of one column of labels, one column of 0 and 1 per label, named like the label.
        threshold: the minimum probability of a predicted label.
    """

    separator: str = "auto"
    columns: list[str] = field(default_factory=list)
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 1:
            raise ValueError(f"options.threshold is {self.threshold}; expected a number in (0, 1)")
        if not self.separator:
            raise ValueError("options.separator is empty; expected auto, or a string such as ','")


def _cell_labels(value: Any) -> str | list[Any]:
    """The labels in a cell: a list, or a text in which they are separated."""
    value = plain_value(value)
    if isinstance(value, str):
        value = mapping_from_text(value) or value
    if isinstance(value, Mapping):  # label -> 0 or 1
        marks = {name: label_key(mark) for name, mark in value.items()}
        return [name for name in marks if marks[name] == "1"] if set(marks.values()) <= {"0", "1"} else [value]
    if isinstance(value, (list, tuple)):
        return [plain_value(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(label_name, value))
    if is_missing(value):
        return ""
    text = value if isinstance(value, str) else label_name(value)
    listed = list_from_text(text)
    return text if listed is None else listed


def _marks(table: Table, column: str) -> list[bool]:
    """A column of 0 and 1.

    Raises:
        ValueError: a value is neither; the message says where.
    """
    marks = []
    for row, value in enumerate(table[column]):
        if (key := label_key("" if value is None else value)) not in ("0", "1"):
            raise ValueError(f"{table.where(row)}: {column!r} holds {label_name(value)!r}; expected 0 or 1")
        marks.append(key == "1")
    return marks


class MultiLabel(TextTask):
    """Assigns any number of classes, or none, to each text or pair of texts.

    A prediction has `labels` and `scores`, the probability of every label.
    """

    name = "multi-label"
    roles = (TEXT, TEXT_PAIR, Role("label", LABEL.usual_names, required=False, target=True))
    options_class = MultiLabelOptions
    main_metric = "micro_f1"
    labels: list[str]
    separator: str = ","  # between the labels of a text
    multi_hot: int | None = None  # the length of lists that hold 0 or 1 for each label

    def has_targets(self, columns: Columns) -> bool:
        return "label" in columns or bool(self.options.columns)

    def _lists(self, table: Table, columns: Columns) -> list[list[str]]:
        """The labels of each row.

        Raises:
            ValueError: a cell does not hold labels; the message says where.
        """
        if self.options.columns:
            by_label = {name: _marks(table, name) for name in self.options.columns}
            return [[name for name in by_label if by_label[name][row]] for row in range(len(table))]
        if "label" not in columns:
            raise ValueError(
                f"{table.source}: no column of labels among {', '.join(table.columns)}; name it with "
                f"{column_option('label')}, or columns of 0 and 1 with --options.columns"
            )
        cells = [_cell_labels(value) for value in table[columns["label"]]]
        if self.multi_hot is None:
            return [self._names(table, row, cell) for row, cell in enumerate(cells)]
        rows = []
        for row, cell in enumerate(cells):
            marks = None if isinstance(cell, str) else [{"1": True, "0": False}.get(label_key(x)) for x in cell]
            if marks is None or len(marks) != self.multi_hot or None in marks:
                raise ValueError(f"{table.where(row)}: the labels are {cell!r}; expected {self.multi_hot} of 0 and 1")
            rows.append([str(number) for number, mark in enumerate(marks) if mark])
        return rows

    def _names(self, table: Table, row: int, cell: str | list[Any]) -> list[str]:
        """The names of the labels in a cell: a list, or a text with separators."""
        if isinstance(cell, str):
            return [label_name(name) for name in cell.split(self.separator) if name.strip()]
        for name in cell:
            if is_missing(name) or isinstance(name, (list, tuple, Mapping)):
                raise ValueError(f"{table.where(row)}: a label is {name!r}; expected a text or a number")
        return [label_name(name) for name in cell]

    def _detect_format(self, table: Table, columns: Columns) -> None:
        """Settle `separator` and `multi_hot` by the training rows.

        Raises:
            ValueError: the cells have several of the usual separators.
        """
        self.separator, self.multi_hot = self.options.separator, None
        cells = [_cell_labels(value) for value in table[columns["label"]]] if "label" in columns else []
        texts = [cell for cell in cells if isinstance(cell, str)]
        if self.separator == "auto":
            found = [mark for mark in (",", ";", "|") if any(mark in text for text in texts)]
            if len(found) > 1:
                row = next(row for row, cell in enumerate(cells) if isinstance(cell, str) and found[1] in cell)
                raise ValueError(
                    f"{table.where(row)}: the labels are {cells[row]!r}, other rows have {found[0]!r}; set "
                    "options.separator to what separates labels"
                )
            self.separator = found[0] if found else ","
        lists = [cell for cell in cells if not isinstance(cell, str)]
        marks = [[label_key(x) for x in cell] for cell in lists]
        # Lists of label numbers have no label twice: 0 0 1 are marks.
        if lists and not any(texts) and all(set(x) <= {"0", "1"} and len(x) == len(marks[0]) for x in marks):
            self.multi_hot = len(marks[0]) if any(len(set(x)) < len(x) for x in marks) else None

    def fit(self, table: Table, columns: Columns) -> None:
        if not self.options.columns:
            self._detect_format(table, columns)
        lists = self._lists(table, columns)
        if self.multi_hot is not None:
            self.labels = [str(number) for number in range(self.multi_hot)]
        else:
            self.labels = list(self.options.columns) or Labels.fit([name for names in lists for name in names]).names
        if not self.labels:
            raise ValueError(f"{table.source}: no row has a label; expected at least one")
        if all(set(names) == set(lists[0]) for names in lists):
            raise ValueError(
                f"{table.source}: every row has the same labels ({', '.join(lists[0]) or 'none'}); expected others too"
            )

    def check(self, table: Table, columns: Columns) -> list[str]:
        labels, lists = Labels(self.labels), self._lists(table, columns)
        if unseen := Counter(name for names in lists for name in set(names) if labels.index(name) is None):
            raise ValueError(unseen_labels_message(table, unseen, self.labels))
        counts = Counter(self.labels[number] for names in lists for number in {labels.index(x) or 0 for x in names})
        return class_messages(table, self.labels, counts)

    def describe(self) -> str:
        if self.options.columns:
            how = "columns of 0 and 1"
        elif self.multi_hot is not None:
            how = f"lists of {self.multi_hot} times 0 or 1"
        else:
            how = f"separated by {self.separator!r} where they are one text"
        return f"{describe_labels(self.labels)}; {how}"

    def settings(self) -> dict[str, Any]:
        return {"labels": self.labels, "separator": self.separator, "multi_hot": self.multi_hot}

    def restore(self, settings: Mapping[str, Any]) -> None:
        self.labels = list(settings["labels"])
        chosen = self.options.separator
        self.separator = chosen if chosen != "auto" else settings.get("separator", ",")
        self.multi_hot = settings.get("multi_hot")

    def model_config(self) -> dict[str, Any]:
        numbers = {label: number for number, label in enumerate(self.labels)}
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": numbers,
            "problem_type": "multi_label_classification",
        }

    def targets(self, table: Table, columns: Columns) -> list[list[float]]:
        labels = Labels(self.labels)
        rows = [{labels.index(name) for name in names} for names in self._lists(table, columns)]
        return [[float(number in row) for number in range(len(self.labels))] for row in rows]

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

    def outcome(self, prediction: Mapping[str, Any]) -> str:
        return ", ".join(map(repr, prediction["labels"])) or "having no label"

    def class_counts(self, examples: Sequence[Example]) -> list[int]:
        return [int(count) for count in np.sum([example.target for example in examples], axis=0)]
