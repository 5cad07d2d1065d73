"""What a task is to the loop: how rows become examples, logits a loss, and logits predictions and metrics.

The loop calls, in this order: `fit` on the training rows, `check` on every table, `encode`, then a step at a time
`forward`, `loss` and `weight`; for evaluation `forward`, `decode`, `evaluate`. A task knows nothing of optimizers,
epochs and files; it must not import bert_fast.training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast.tasks.io.columns import Role
from bert_fast.tasks.io.sources import read_table
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG_KEY = "bert_fast_task"  # in config.json, beside what transformers reads
# name: module and class. A task is imported once it is asked for.
TASKS = {
    "classification": "bert_fast.tasks.classification:Classification",
    "multi-label": "bert_fast.tasks.classification:MultiLabel",
    "regression": "bert_fast.tasks.classification:Regression",
    "token-classification": "bert_fast.tasks.token_classification:TokenClassification",
    "question-answering": "bert_fast.tasks.question_answering:QuestionAnswering",
    "multiple-choice": "bert_fast.tasks.multiple_choice:MultipleChoice",
    "sentence-embedding": "bert_fast.tasks.sentence_embedding:SentenceEmbedding",
}
Columns = Mapping[str, str]  # role -> column of the table; roles that are not there have none


@dataclass(frozen=True)
class Example:
    """One input of the model. A row of the table can have several: windows, choices, the texts of a pair.

    Args:
        row: index of the row in its table.
        input_ids, token_type_ids: its tokens, special ones included.
        target: what the loss compares with: int, float, list of int (a label a token), (start, end) ...; None without.
        extra: what decoding needs: offsets, word ids, the number of the window ...
    """

    row: int
    input_ids: Sequence[int]
    token_type_ids: Sequence[int]
    target: Any = None
    extra: Any = None


@dataclass(frozen=True)
class LossOptions:
    """What changes the loss of every task that has classes.

    Args:
        class_weights: (C,) float, the weight of each class; None for 1.
        focal_gamma: > 0 for the focal loss (Lin et al., 2017): each loss times (1 - p)^gamma.
        label_smoothing: share of the target that is spread over all classes.
    """

    class_weights: Tensor | None = None
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0


def refuse_options(task: str, options: LossOptions, *names: str) -> None:
    """ValueError where one of the options that `task` has no use for is set."""
    if found := [name for name in names if getattr(options, name)]:
        raise ValueError(f"loss.{found[0]} is {getattr(options, found[0])}, which {task} has no use for; leave it at 0")


@dataclass(frozen=True)
class Batch:
    """B examples and their T tokens, one after the other, without padding.

    Attributes:
        examples: the B examples.
        input_ids, token_type_ids: int64 (T,).
        cu_seqlens: int32 (B+1,), where each example starts, and T.
        max_seqlen: tokens of the longest.
    """

    examples: Sequence[Example]
    input_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
        """The batch of `examples`, none of which is without tokens."""
        lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
        ends = np.concatenate([[0], lengths.cumsum()])
        tokens = np.concatenate([np.asarray(example.input_ids, dtype=np.int64) for example in examples])
        segments = np.concatenate([np.asarray(example.token_type_ids, dtype=np.int64) for example in examples])
        arrays = (tokens, segments, ends.astype(np.int32))
        ids, types, cu_seqlens = (torch.from_numpy(x).to(device) for x in arrays)
        return cls(examples, ids, types, cu_seqlens, int(lengths.max()))

    def padded(self, pad_id: int = 0) -> dict[str, Tensor]:
        """The same, padded, as transformers takes it: input_ids, token_type_ids, attention_mask int64 (B, S)."""
        starts = self.cu_seqlens[:-1].long()
        lengths = self.cu_seqlens.long().diff()
        column = torch.arange(self.max_seqlen, device=lengths.device)
        mask = column < lengths[:, None]
        places = torch.where(mask, starts[:, None] + column, 0)
        ids = torch.where(mask, self.input_ids[places], pad_id)
        types = torch.where(mask, self.token_type_ids[places], 0)
        return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.long()}


def run_model(model: nn.Module, batch: Batch, **arguments: Any) -> dict[str, Tensor]:
    """The output of one of our models, or of a transformers model, for `batch`; what is per token comes packed.

    Args:
        model: ours takes the batch as it is, any other one padded. `num_choices=1` in `arguments` works for both.

    Returns:
        The tensors of the output by name: last_hidden_state (T, E), start_logits and end_logits (T,), logits (T, C) of
        a token classifier, (B, C) of a sequence classifier ...
    """
    from bert_fast.models import BertPreTrainedModel

    # RoBERTa has one token type, and DistilBERT none, whatever the tokenizer says.
    typed = getattr(model.config, "type_vocab_size", 0) > 1
    if any(isinstance(module, BertPreTrainedModel) for module in model.modules()):
        arguments = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen, **arguments}
        types = {"token_type_ids": batch.token_type_ids} if typed else {}
        out = model(input_ids=batch.input_ids, **types, **arguments)
        return {name: x for name, x in out.items() if isinstance(x, Tensor)}
    inputs = batch.padded(getattr(model.config, "pad_token_id", None) or 0)
    if not typed:
        del inputs["token_type_ids"]
    real = inputs["attention_mask"].bool()
    if arguments.pop("num_choices", None) is not None:
        inputs = {name: x.unsqueeze(1) for name, x in inputs.items()}
    out = model(**inputs, **arguments)
    found = {name: x for name, x in out.items() if isinstance(x, Tensor)}
    for name, x in found.items():
        per_token = name in ("last_hidden_state", "start_logits", "end_logits") or (name == "logits" and x.dim() == 3)
        if per_token:
            found[name] = x[real]
    return found


@dataclass(frozen=True)
class NoOptions:
    """The options of a task that has none."""


class Task(ABC):
    """A task over the rows of a table.

    Class attributes:
        name: its key in `TASKS`.
        model_class: of `bert_fast.models` (and, by the same name, of transformers).
        roles: the columns it reads.
        options_class: a frozen dataclass of its own settings, with defaults.
        text_roles: those roles that may not be empty (data.empty says what happens to rows where one is).
        rows_together: whether all examples of a row have to be in one batch (choices, pairs of an embedding).
        words_are_free: whether words can be left out or moved without a change of the targets (augmentation).
        group_role: rows with the same value of this role are kept together where dev is held out of train.
        main_metric: the metric that drives early stopping and the choice of the best model.
        higher_is_better: whether more of it is better.
    """

    name: ClassVar[str]
    model_class: ClassVar[str]
    roles: ClassVar[tuple[Role, ...]]
    options_class: ClassVar[type] = NoOptions
    text_roles: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    rows_together: ClassVar[bool] = False
    words_are_free: ClassVar[bool] = False
    group_role: ClassVar[str] = ""
    main_metric: str = "loss"
    higher_is_better: bool = True

    def __init__(self, options: Any = None) -> None:
        self.options = self.options_class() if options is None else options

    def read(self, source: str | Path, names: Sequence[str] | None = None) -> Table:
        """The table of a source; for tasks with a file format of their own, that too."""
        return read_table(source, names)

    @abstractmethod
    def fit(self, table: Table, columns: Columns) -> None:
        """Learn from the training rows what the task needs to know (its labels).

        Raises:
            ValueError: nothing can be learnt from these rows (one class, no rows ...); the message says why.
        """

    def check(self, table: Table, columns: Columns) -> list[str]:
        """Whether the targets of `table` fit what was learnt; returns sentences that a user should read.

        Raises:
            ValueError: labels unseen in training (with counts), spans that don't match ...; with `table.where(row)`.
        """
        return []

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What `fit` learnt, as JSON data: goes into config.json and comes back in `restore`."""

    @abstractmethod
    def restore(self, settings: Mapping[str, Any]) -> None:
        """Take over what `settings` gave."""

    def model_config(self) -> dict[str, Any]:
        """Settings of `BertConfig` that the head needs, as transformers names them: id2label, problem_type ..."""
        return {}

    def head_config(self) -> dict[str, Any]:
        """Settings of our heads that transformers does not have; they go into config.json and `BertConfig.extra`."""
        return {}

    def files_for_others(self, text: TextSettings, hidden_size: int) -> dict[str, Any]:
        """JSON files, by their path in the result folder, by which a library that is not transformers loads it."""
        return {}

    @abstractmethod
    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """The examples of all rows, in the rows' order, those of a row next to each other.

        Args:
            training: targets are wanted, and what only costs time in training can be left out. Otherwise targets are
                set where the table has them (for the loss of the evaluation) and None where not.
        """

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """What the loss and `decode` work on: (B, ...) where the head is per sequence, (T, ...) where per token."""
        return run_model(model, batch)["logits"]

    @abstractmethod
    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        """The SUM of the losses over what counts, fp32; the loop divides by the `weight` of the whole step.

        Args:
            logits: of `forward`, for the packed batch of exactly these examples.
        """

    def weight(self, examples: Sequence[Example], options: LossOptions) -> float:
        """By what the sum of `loss` is divided to be a mean: examples here, else tokens, or the sum of weights."""
        return float(len(examples))

    def split(self, logits: Tensor, batch: Batch) -> list[np.ndarray[Any, Any]]:
        """`logits` as one array an example, for `decode`: a row each, or a row each token."""
        array = logits.detach().float().cpu().numpy()
        if len(array) == len(batch.examples):
            return list(array)
        return np.split(array, batch.cu_seqlens[1:-1].tolist())

    @abstractmethod
    def decode(
        self, outputs: Sequence[np.ndarray[Any, Any]], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        """A prediction, JSON data, for each row of `table`, from what `split` gave for each of `examples`."""

    @abstractmethod
    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """The metrics of `predictions` by name, JSON data; `main_metric` is one of them."""

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float] | None:
        """How wrong each prediction is: 0 where it is right, the more the worse; None for a task that can't say."""
        return None

    def inputs(self, table: Table, columns: Columns) -> list[str]:
        """What the model reads of each row, so that equal rows can be told."""
        names = [role.name for role in self.roles if not role.target and role.name in columns]
        return [repr(values) for values in zip(*(table[columns[name]] for name in names), strict=True)]

    def tune(self, metrics: Mapping[str, Any]) -> str:
        """Take over what the dev rows say about decoding, after the training; a sentence about it, "" for nothing.

        Args:
            metrics: of `evaluate`, on dev. What is taken over is among `settings`.
        """
        return ""

    def class_counts(self, examples: Sequence[Example]) -> list[int] | None:
        """How often each class is a target, for balanced class weights; None for a task without classes."""
        return None

    def class_of(self, example: Example) -> int | None:
        """The class by which examples are resampled; None for a task that can't be."""
        return None


def task_class(name: str) -> type[Task]:
    """The class of the task `name`."""
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; expected one of {', '.join(TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    found: type[Task] = getattr(import_module(module), attribute)
    return found


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task `name`, not yet fitted, with `options` in place of its options' defaults."""
    kind = task_class(name)
    known = [item.name for item in fields(kind.options_class)]
    if unknown := sorted(set(options or {}) - set(known)):
        listed = ", ".join(known) or "none"
        raise ValueError(f"{name} has no option {', '.join(unknown)}; its options: {listed}")
    return kind(kind.options_class(**(options or {})))


def task_entry(task: Task) -> dict[str, Any]:
    """What config.json holds under `CONFIG_KEY`, to make the task again."""
    return {"name": task.name, "options": asdict(task.options), **task.settings()}


def task_from_config(config: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Task:
    """The fitted task of a model, from the content of its config.json, with `options` in place of those it has.

    Raises:
        ValueError: the model was not fine-tuned by bert_fast.
    """
    entry = config.get(CONFIG_KEY)
    if not isinstance(entry, Mapping):
        raise ValueError(f"the model's config.json has no {CONFIG_KEY}; expected a model written by bert-fast finetune")
    task = make_task(entry["name"], {**entry.get("options", {}), **(options or {})})
    task.restore(entry)
    return task
