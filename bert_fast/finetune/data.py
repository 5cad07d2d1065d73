"""The rows of a fine-tuning run: read, checked, split, and put into batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bert_fast.finetune.config import BatchOptions, TableOptions
from bert_fast.tasks.io.columns import choose_columns, describe, settle_empty
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.prediction import groups_of
from bert_fast.tasks.task import Columns, Example, Task

_SHUFFLE, _RESAMPLE, _SPLIT = 1, 2, 3  # streams of random numbers, so that one does not depend on another


@dataclass(frozen=True)
class Split:
    """A table whose columns are chosen and whose empty texts are settled."""

    table: Table
    columns: Columns


@dataclass(frozen=True)
class FinetuneData:
    """The splits of a run; `task` is fitted on `train`."""

    train: Split
    dev: Split
    test: Split | None


def open_split(task: Task, source: str, options: TableOptions, report: Callable[[str], None]) -> Split:
    """Read a source, choose its columns and settle its empty texts; says what it chose."""
    table = task.read(source, options.names)
    if not len(table):
        raise ValueError(f"{table.source} has no rows")
    columns = choose_columns(table, task.roles, options.columns)
    report(describe(table, columns))
    return Split(settled(task, table, columns, options, report), columns)


def settled(task: Task, table: Table, columns: Columns, options: TableOptions, report: Callable[[str], None]) -> Table:
    """`table` with its empty texts settled as `options` says."""
    texts = [columns[role] for role in task.text_roles if role in columns]
    table, _, said = settle_empty(table, texts, options.empty, options.fill)
    if said:
        report(said)
    if not len(table):
        raise ValueError(f"{table.source}: no row is left")
    return table


def open_data(task: Task, options: TableOptions, seed: int, report: Callable[[str], None]) -> FinetuneData:
    """Read every split, fit `task` on the training rows and check the others against it.

    Raises:
        ValueError: a source, a column or a row is wrong, or the splits don't fit each other; the message says where.
    """
    train = open_split(task, options.train, options, report)
    if options.max_rows and len(train.table) > options.max_rows:
        rows = np.random.default_rng([seed, _SPLIT]).permutation(len(train.table))[: options.max_rows]
        train = Split(train.table.select(sorted(rows.tolist())), train.columns)
    if options.dev is not None:
        dev = open_split(task, options.dev, options, report)
    else:
        group = train.columns.get(task.group_role, "")
        if options.folds:
            train, dev = take_fold(train, options.folds, options.fold, seed, group)
        else:
            train, dev = hold_out(train, options.dev_fraction, seed, group)
        report(f"held out for dev: {len(dev.table):,} rows of {options.train}; {len(train.table):,} are left to train")
    test = open_split(task, options.test, options, report) if options.test is not None else None
    task.fit(train.table, train.columns)
    for split in (dev, test):
        if split is not None:
            for sentence in task.check(split.table, split.columns):
                report(sentence)
            for sentence in duplicates(task, train, split):
                report(sentence)
    return FinetuneData(train, dev, test)


def hold_out(split: Split, fraction: float, seed: int, group: str = "") -> tuple[Split, Split]:
    """Two parts of the rows, of each class (where the labels are classes) alike; classes of one row stay in the first.

    Args:
        group: a column; rows with the same value in it are in the same part, unless all have the same.

    Raises:
        ValueError: there are fewer than two rows.
    """
    table, count = split.table, len(split.table)
    if count < 2:
        raise ValueError(f"{table.source} has {count} rows; expected two or more to hold some out, or give data.dev")
    random = np.random.default_rng([seed, _SPLIT, 1])
    held: list[int] = []
    groups = _groups(split, group)
    if 1 < len(groups) < count:
        for number in random.permutation(len(groups))[:-1]:
            held += groups[number] if len(held) < fraction * count else []
        return _parted(split, held)
    for rows in _kinds(split):
        shuffled = random.permutation(rows)
        held += shuffled[: min(round(fraction * len(rows)), len(rows) - 1)].tolist()
    return _parted(split, held or [int(random.integers(count))])


def take_fold(split: Split, folds: int, fold: int, seed: int, group: str = "") -> tuple[Split, Split]:
    """All rows but those of part `fold` of `folds`, and these; of each class alike, or whole groups as in `hold_out`.

    Raises:
        ValueError: there are fewer rows, or groups, than folds.
    """
    random = np.random.default_rng([seed, _SPLIT, 2])
    groups = _groups(split, group)
    if not group:
        # Class by class and in turn, so that the parts differ by one row, in all and of each class.
        groups = [[row] for rows in _kinds(split) for row in random.permutation(rows).tolist()]
    if len(groups) < folds:
        what = f"different values of {group!r}" if group else "rows"
        raise ValueError(f"{split.table.source} has {len(groups)} {what}; expected at least data.folds, {folds}")
    parts: list[list[int]] = [[] for _ in range(folds)]
    order = random.permutation(len(groups)).tolist() if group else range(len(groups))
    for number in order:
        min(parts, key=len).extend(groups[number])
    return _parted(split, parts[fold])


def _groups(split: Split, column: str) -> list[list[int]]:
    """The rows of each value of a column; none without a column."""
    found: dict[str, list[int]] = {}
    for row, value in enumerate(split.table[column] if column else []):
        found.setdefault(repr(value), []).append(row)
    return list(found.values())


def _kinds(split: Split) -> list[list[int]]:
    """The rows of each class, where the labels are classes; else all rows."""
    count = len(split.table)
    labels = split.table[split.columns["label"]] if "label" in split.columns else [None] * count
    kinds = [value if isinstance(value, (str, int, bool)) else None for value in labels]
    if len(set(kinds)) > count // 2:
        kinds = [None] * count
    return [[row for row, value in enumerate(kinds) if value == kind] for kind in dict.fromkeys(kinds)]


def _parted(split: Split, held: Sequence[int]) -> tuple[Split, Split]:
    chosen = set(held)
    rest = [row for row in range(len(split.table)) if row not in chosen]
    first, second = (Split(split.table.select(rows), split.columns) for rows in (rest, sorted(held)))
    return first, second


def duplicates(task: Task, train: Split, other: Split) -> list[str]:
    """A sentence where rows of `other` have the same inputs as rows of `train`."""
    known = set(task.inputs(train.table, train.columns))
    rows = [row for row, key in enumerate(task.inputs(other.table, other.columns)) if key in known]
    if not rows:
        return []
    where = ", ".join(str(other.table.numbers[row]) for row in rows[:5]) + (" ..." if len(rows) > 5 else "")
    return [
        f"{len(rows)} of {len(other.table)} rows of {other.table.source} are in {train.table.source} too "
        f"({other.table.counted} {where}): metrics on them flatter the model"
    ]


class Batcher:
    """The micro-batches of each epoch: a pure function of (seed, epoch).

    Args:
        task: says which examples have to stay together.
        examples: of the training rows.
        resample: draw each epoch's examples with replacement, every class as often.
    """

    def __init__(
        self, task: Task, examples: Sequence[Example], options: BatchOptions, *, seed: int, resample: bool = False
    ) -> None:
        self.examples, self.options, self.seed = examples, options, seed
        self.groups = groups_of(task, examples)
        self.lengths = [sum(len(examples[index].input_ids) for index in group) for group in self.groups]
        self.chances = _chances(task, examples, self.groups) if resample else None

    def epoch(self, epoch: int) -> list[list[Example]]:
        """The micro-batches of `epoch`, in order."""
        order = np.random.default_rng([self.seed, _SHUFFLE, epoch]).permutation(len(self.groups))
        if self.chances is not None:
            random = np.random.default_rng([self.seed, _RESAMPLE, epoch])
            order = random.choice(len(self.groups), size=len(self.groups), p=self.chances)
        batches = self._cut(order.tolist())
        if self.options.bucket:
            shuffled = np.random.default_rng([self.seed, _SHUFFLE, epoch, 1]).permutation(len(batches))
            batches = [batches[number] for number in shuffled]
        return [[self.examples[index] for number in batch for index in self.groups[number]] for batch in batches]

    def _cut(self, order: list[int]) -> list[list[int]]:
        if self.options.bucket:
            size = self._per_batch() * self.options.bucket
            windows = [order[start : start + size] for start in range(0, len(order), size)]
            order = [number for window in windows for number in sorted(window, key=lambda i: (self.lengths[i], i))]
        batches: list[list[int]] = []
        rows = tokens = 0
        for number in order:
            more = len(self.groups[number])
            full = tokens + self.lengths[number] > self.options.tokens if self.options.tokens else False
            if not batches or full or (not self.options.tokens and rows + more > self.options.rows):
                batches.append([])
                rows = tokens = 0
            batches[-1].append(number)
            rows, tokens = rows + more, tokens + self.lengths[number]
        return batches

    def _per_batch(self) -> int:
        if self.options.tokens:
            return max(1, round(self.options.tokens / float(np.mean(self.lengths))))
        return max(1, self.options.rows // max(map(len, self.groups)))


def _chances(task: Task, examples: Sequence[Example], groups: Sequence[Sequence[int]]) -> np.ndarray:
    classes = [task.class_of(examples[group[0]]) for group in groups]
    if None in classes:
        raise ValueError(f"loss.resample is balanced, which {task.name} has no classes for; expected none")
    counts = Counter(classes)
    weights = np.array([1.0 / counts[number] for number in classes])
    return weights / weights.sum()
