"""The data of a fine-tuning run: reading, checking, splitting and batching."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bert_fast.finetune.config import BatchOptions, TableOptions
from bert_fast.tasks.io.columns import choose_columns, describe_columns, handle_empty_texts
from bert_fast.tasks.io.labels import drop_unlabelled, label_key
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.prediction import example_groups
from bert_fast.tasks.task import Columns, Example, Task

_SHUFFLE, _RESAMPLE, _SPLIT = 1, 2, 3  # independent random streams


@dataclass(frozen=True)
class Split:
    """A table with its chosen columns, and without empty texts."""

    table: Table
    columns: Columns


@dataclass(frozen=True)
class FinetuneData:
    """The splits of a run; `task` is fitted on `train`."""

    train: Split
    dev: Split
    test: Split | None


def load_split(task: Task, source: str, options: TableOptions, report: Callable[[str], None]) -> Split:
    """Read a source, choose its columns and handle rows without text or label as `options` says; reports them."""
    table = task.read(source, options.names, options.format)
    if not len(table):
        raise ValueError(f"{table.source} has no rows")
    columns = choose_columns(table, task.roles, options.columns)
    report(describe_columns(table, columns))
    text_columns = [columns[role] for role in task.text_roles if role in columns]
    table, message = handle_empty_texts(table, text_columns, options.empty, options.fill)
    if message:
        report(message)
    if "label" in columns:
        table, message = drop_unlabelled(table, columns["label"], options.no_label)
        if message:
            report(message)
    elif options.no_label is not None:
        raise ValueError(f"data.no_label is {options.no_label}; expected none, since no column of labels is read")
    if not len(table):
        raise ValueError(f"{table.source}: every row was dropped, since none has a text and a label")
    return Split(table, columns)


def load_data(task: Task, options: TableOptions, seed: int, report: Callable[[str], None]) -> FinetuneData:
    """Read every split, fit `task` on the training rows and check the others against it.

    Raises:
        ValueError: a source, a column or a row is invalid, or a split has labels unseen in training; the message says
            where.
    """
    train = load_split(task, options.train, options, report)
    if options.max_rows and len(train.table) > options.max_rows:
        rows = np.random.default_rng([seed, _SPLIT]).permutation(len(train.table))[: options.max_rows]
        train = Split(train.table.select(sorted(rows.tolist())), train.columns)
    if options.dev is not None:
        dev = load_split(task, options.dev, options, report)
    else:
        group = train.columns.get(task.group_role, "")
        if options.folds:
            train, dev = take_fold(train, options.folds, options.fold, seed, group)
        else:
            train, dev = hold_out(train, options.dev_fraction, seed, group)
        report(
            f"held out for dev: {len(dev.table):,} rows of {options.train}; {len(train.table):,} remain for training"
        )
    test = load_split(task, options.test, options, report) if options.test is not None else None
    task.fit(train.table, train.columns)
    if description := task.describe():
        report(f"{train.table.source}: {description}")
    for split in (train, dev, test):
        if split is not None:
            for message in task.check(split.table, split.columns):
                report(message)
    for split in (dev, test):
        if split is not None:
            for message in duplicates(task, train, split):
                report(message)
    return FinetuneData(train, dev, test)


def hold_out(split: Split, fraction: float, seed: int, group: str = "") -> tuple[Split, Split]:
    """Split off a fraction of the rows, stratified by class if the labels are classes.

    Args:
        split: the rows. A class of one row is not held out.
        fraction: of the rows to hold out.
        seed: of the random choice.
        group: a column; rows with the same value in it stay together, unless all rows have the same value.

    Returns:
        The remaining rows and the held-out rows, both in their order.

    Raises:
        ValueError: there are fewer than two rows.
    """
    table, count = split.table, len(split.table)
    if count < 2:
        raise ValueError(
            f"{table.source} has {count} rows; expected 2 or more to hold some out; otherwise set data.dev"
        )
    random = np.random.default_rng([seed, _SPLIT, 1])
    held: list[int] = []
    groups = _rows_by_group(split, group)
    if 1 < len(groups) < count:
        for number in random.permutation(len(groups))[:-1]:
            held += groups[number] if len(held) < fraction * count else []
        return _divide(split, held)
    for rows in _rows_by_class(split):
        shuffled = random.permutation(rows)
        held += shuffled[: min(round(fraction * len(rows)), len(rows) - 1)].tolist()
    return _divide(split, held or [int(random.integers(count))])


def take_fold(split: Split, folds: int, fold: int, seed: int, group: str = "") -> tuple[Split, Split]:
    """Split off fold `fold` of `folds`, stratified by class, or by whole groups as in `hold_out`.

    Returns:
        The remaining rows and the rows of the fold, both in their order.

    Raises:
        ValueError: there are fewer rows, or groups, than folds.
    """
    random = np.random.default_rng([seed, _SPLIT, 2])
    groups = _rows_by_group(split, group)
    if not group:
        # Class by class and in turn: the folds differ by at most one row, in all and per class.
        groups = [[row] for rows in _rows_by_class(split) for row in random.permutation(rows).tolist()]
    if len(groups) < folds:
        units = f"different values of {group!r}" if group else "rows"
        raise ValueError(f"{split.table.source} has {len(groups)} {units}; expected at least data.folds, {folds}")
    fold_rows: list[list[int]] = [[] for _ in range(folds)]
    order = random.permutation(len(groups)).tolist() if group else range(len(groups))
    for number in order:
        min(fold_rows, key=len).extend(groups[number])
    return _divide(split, fold_rows[fold])


def _rows_by_group(split: Split, column: str) -> list[list[int]]:
    """The rows of each value of a column; empty without a column."""
    groups: dict[str, list[int]] = {}
    for row, value in enumerate(split.table[column] if column else []):
        groups.setdefault(repr(value), []).append(row)
    return list(groups.values())


def _rows_by_class(split: Split) -> list[list[int]]:
    """The rows of each class if the labels are classes, else one list of all rows."""
    count = len(split.table)
    labels = split.table[split.columns["label"]] if "label" in split.columns else [None] * count
    classes = [label_key(value) if _is_class(value) else None for value in labels]
    if len(set(classes)) > count // 2:
        classes = [None] * count
    return [[row for row, value in enumerate(classes) if value == name] for name in dict.fromkeys(classes)]


def _is_class(value: Any) -> bool:
    """Whether a value may be the label of a class: a text or an integer, also as a float."""
    return isinstance(value, (str, int)) or (isinstance(value, float) and value.is_integer())


def _divide(split: Split, held: Sequence[int]) -> tuple[Split, Split]:
    held_set = set(held)
    rest = [row for row in range(len(split.table)) if row not in held_set]
    first, second = (Split(split.table.select(rows), split.columns) for rows in (rest, sorted(held)))
    return first, second


def duplicates(task: Task, train: Split, other: Split) -> list[str]:
    """A warning if rows of `other` have the same inputs as rows of `train`; else an empty list."""
    train_inputs = set(task.inputs(train.table, train.columns))
    rows = [row for row, key in enumerate(task.inputs(other.table, other.columns)) if key in train_inputs]
    if not rows:
        return []
    where = ", ".join(str(other.table.numbers[row]) for row in rows[:5]) + (" ..." if len(rows) > 5 else "")
    return [
        f"{len(rows)} of {len(other.table)} rows of {other.table.source} are also in {train.table.source} "
        f"({other.table.unit} {where}): the metrics overestimate the model"
    ]


class Batcher:
    """The micro-batches of each epoch: a pure function of (seed, epoch).

    Args:
        task: determines which examples stay in one batch.
        examples: of the training rows.
        options: rows or tokens per batch, and bucketing.
        seed: of the order.
        resample: draw the examples of each epoch with replacement, every class equally often.

    Raises:
        ValueError: `resample` is set and the task has no classes.
    """

    def __init__(
        self, task: Task, examples: Sequence[Example], options: BatchOptions, *, seed: int, resample: bool = False
    ) -> None:
        self.examples, self.options, self.seed = examples, options, seed
        self.groups = example_groups(task, examples)
        self.lengths = [sum(len(examples[index].input_ids) for index in group) for group in self.groups]
        self.probabilities = _balanced(task, examples, self.groups) if resample else None

    def epoch(self, epoch: int) -> list[list[Example]]:
        """The micro-batches of `epoch`, in order."""
        order = np.random.default_rng([self.seed, _SHUFFLE, epoch]).permutation(len(self.groups))
        if self.probabilities is not None:
            random = np.random.default_rng([self.seed, _RESAMPLE, epoch])
            order = random.choice(len(self.groups), size=len(self.groups), p=self.probabilities)
        batches = self._batches(order.tolist())
        if self.options.bucket:
            shuffled = np.random.default_rng([self.seed, _SHUFFLE, epoch, 1]).permutation(len(batches))
            batches = [batches[number] for number in shuffled]
        return [[self.examples[index] for number in batch for index in self.groups[number]] for batch in batches]

    def _batches(self, order: list[int]) -> list[list[int]]:
        if self.options.bucket:
            size = self._groups_per_batch() * self.options.bucket
            windows = [order[start : start + size] for start in range(0, len(order), size)]
            order = [number for window in windows for number in sorted(window, key=lambda i: (self.lengths[i], i))]
        batches: list[list[int]] = []
        rows = tokens = 0
        for number in order:
            added = len(self.groups[number])
            full = tokens + self.lengths[number] > self.options.tokens if self.options.tokens else False
            if not batches or full or (not self.options.tokens and rows + added > self.options.rows):
                batches.append([])
                rows = tokens = 0
            batches[-1].append(number)
            rows, tokens = rows + added, tokens + self.lengths[number]
        return batches

    def _groups_per_batch(self) -> int:
        if self.options.tokens:
            return max(1, round(self.options.tokens / float(np.mean(self.lengths))))
        return max(1, self.options.rows // max(map(len, self.groups)))


def _balanced(task: Task, examples: Sequence[Example], groups: Sequence[Sequence[int]]) -> np.ndarray:
    """The probability of each group such that every class has the same."""
    classes = [task.class_of(examples[group[0]]) for group in groups]
    if None in classes:
        raise ValueError(f"loss.resample is balanced; expected none: {task.name} has no classes")
    counts = Counter(classes)
    weights = np.array([1.0 / counts[number] for number in classes])
    return weights / weights.sum()
