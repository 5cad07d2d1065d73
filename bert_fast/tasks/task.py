"""The interface of a task: rows to examples, model outputs to a loss, to predictions and to metrics.

The loop calls `fit` on the training rows, `check` on every table and `encode`; in each step `forward`, `loss` and
`weight`; in evaluation `forward`, `decode` and `evaluate`. A task does not depend on optimizers, epochs or result
folders, and must not import bert_fast.finetune.
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

from bert_fast._config import did_you_mean
from bert_fast.models.sentence import TASK_KEY
from bert_fast.tasks.io.columns import Role
from bert_fast.tasks.io.sources import read_table
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import FormatSettings, TextSettings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MANY_ROWS = 10  # equal predictions for fewer rows may be right
CONFIG_KEY = TASK_KEY  # of the entry in config.json, which transformers ignores
# name -> module:class, imported on first use.
TASKS = {
    "classification": "bert_fast.tasks.classification:Classification",
    "multi-label": "bert_fast.tasks.multi_label:MultiLabel",
    "regression": "bert_fast.tasks.classification:Regression",
    "token-classification": "bert_fast.tasks.token_classification:TokenClassification",
    "question-answering": "bert_fast.tasks.question_answering:QuestionAnswering",
    "multiple-choice": "bert_fast.tasks.multiple_choice:MultipleChoice",
    "sentence-embedding": "bert_fast.tasks.sentence_embedding:SentenceEmbedding",
    "rerank": "bert_fast.tasks.rerank:Rerank",
}
Columns = Mapping[str, str]  # role -> column of the table; roles without a column are left out


@dataclass(frozen=True)
class Example:
    """One input sequence. A row of the table may have several: windows, choices, the texts of a pair.

    Args:
        row: index of the row in its table.
        input_ids, token_type_ids: its tokens, including special tokens.
        target: the target of the loss: int, float, list of int (one label per token), (start, end) ..., or None.
        extra: what decoding needs: offsets, word indices, the window ...
        truncated: whether tokens of the row are in none of its examples.
    """

    row: int
    input_ids: Sequence[int]
    token_type_ids: Sequence[int]
    target: Any = None
    extra: Any = None
    truncated: bool = False


@dataclass(frozen=True)
class LossOptions:
    """Options of the loss of tasks with classes.

    Args:
        class_weights: (C,) float, the weight of each class; None weights them equally.
        focal_gamma: exponent of the focal loss (Lin et al., 2017), which scales each loss by (1 - p)^gamma; 0 disables.
        label_smoothing: share of the target probability spread over all classes.
    """

    class_weights: Tensor | None = None
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0


def reject_options(task: str, options: LossOptions, *names: str) -> None:
    """Raise ValueError if one of the options `names`, which `task` does not support, is set."""
    for name in names:
        if value := getattr(options, name):
            raise ValueError(f"loss.{name} is {value}; expected 0: {task} does not support it")


@dataclass(frozen=True)
class Batch:
    """B examples packed into T tokens, without padding.

    Attributes:
        examples: the B examples.
        input_ids, token_type_ids: int64 (T,).
        cu_seqlens: int32 (B+1,), the start of each example, and T.
        max_seqlen: length of the longest example.
    """

    examples: Sequence[Example]
    input_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int

    @classmethod
    def of(cls, examples: Sequence[Example], device: torch.device | str = "cpu") -> Batch:
        """Pack `examples`, each of at least one token."""
        lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
        ends = np.concatenate([[0], lengths.cumsum()])
        tokens = np.concatenate([np.asarray(example.input_ids, dtype=np.int64) for example in examples])
        segments = np.concatenate([np.asarray(example.token_type_ids, dtype=np.int64) for example in examples])
        arrays = (tokens, segments, ends.astype(np.int32))
        ids, types, cu_seqlens = (torch.from_numpy(x).to(device) for x in arrays)
        return cls(examples, ids, types, cu_seqlens, int(lengths.max()))

    def padded(self, pad_id: int = 0) -> dict[str, Tensor]:
        """The padded inputs of a transformers model: input_ids, token_type_ids and attention_mask, int64 (B, S)."""
        starts = self.cu_seqlens[:-1].long()
        lengths = self.cu_seqlens.long().diff()
        column = torch.arange(self.max_seqlen, device=lengths.device)
        mask = column < lengths[:, None]
        indices = torch.where(mask, starts[:, None] + column, 0)
        ids = torch.where(mask, self.input_ids[indices], pad_id)
        types = torch.where(mask, self.token_type_ids[indices], 0)
        return {"input_ids": ids, "token_type_ids": types, "attention_mask": mask.long()}


def run_model(model: nn.Module, batch: Batch, **arguments: Any) -> dict[str, Tensor]:
    """Run a model of bert_fast or transformers on `batch`; per-token outputs are packed.

    Args:
        model: a model of bert_fast gets the packed batch, any other the padded one.
        batch: the examples.
        arguments: further arguments of the model; `num_choices=1` is supported for both kinds.

    Returns:
        The output tensors by name: last_hidden_state (T, E), start_logits and end_logits (T,), logits (T, C) of a token
        classifier or (B, C) of a sequence classifier ...
    """
    from bert_fast.models import BertPreTrainedModel

    # RoBERTa has one token type, and DistilBERT none, but their tokenizers return both.
    has_types = getattr(model.config, "type_vocab_size", 0) > 1
    if any(isinstance(module, BertPreTrainedModel) for module in model.modules()):
        arguments = {"cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen, **arguments}
        types = {"token_type_ids": batch.token_type_ids} if has_types else {}
        out = model(input_ids=batch.input_ids, **types, **arguments)
        return {name: x for name, x in out.items() if isinstance(x, Tensor)}
    inputs = batch.padded(getattr(model.config, "pad_token_id", None) or 0)
    if not has_types:
        del inputs["token_type_ids"]
    mask = inputs["attention_mask"].bool()
    if arguments.pop("num_choices", None) is not None:
        inputs = {name: x.unsqueeze(1) for name, x in inputs.items()}
    out = model(**inputs, **arguments)
    tensors = {name: x for name, x in out.items() if isinstance(x, Tensor)}
    for name, x in tensors.items():
        per_token = name in ("last_hidden_state", "start_logits", "end_logits") or (name == "logits" and x.dim() == 3)
        if per_token:
            tensors[name] = x[mask]
    return tensors


@dataclass(frozen=True)
class NoOptions:
    """The options of a task without options."""


class Task(ABC):
    """A task on the rows of a table.

    Class attributes:
        name: its key in `TASKS`.
        model_class: the name of its class in `bert_fast.models` and in transformers.
        roles: the columns it reads.
        options_class: a frozen dataclass of its options, with defaults.
        text_roles: the roles whose texts must not be empty; data.empty handles rows with an empty one.
        keep_rows_together: whether all examples of a row must be in one batch (choices, the texts of a pair).
        words_may_change: whether augmentation may delete or move words without changing the targets.
        group_role: rows with the same value of this role stay together when dev is held out of train.
        length_in_tokenizer: whether the tokenizer of a result has text.max_length as its model_max_length, by which
            readers of the folder truncate inputs.
        main_metric: the metric for early stopping and for selecting the best model.
        higher_is_better: whether higher values of it are better.
    """

    name: ClassVar[str]
    model_class: ClassVar[str]
    roles: ClassVar[tuple[Role, ...]]
    options_class: ClassVar[type] = NoOptions
    text_roles: ClassVar[tuple[str, ...]] = ("text", "text_pair")
    keep_rows_together: ClassVar[bool] = False
    words_may_change: ClassVar[bool] = False
    group_role: ClassVar[str] = ""
    length_in_tokenizer: ClassVar[bool] = False
    main_metric: str = "loss"
    higher_is_better: bool = True

    def __init__(self, options: Any = None) -> None:
        self.options = self.options_class() if options is None else options

    def read(
        self, source: str | Path, names: Sequence[str] | None = None, settings: FormatSettings | None = None
    ) -> Table:
        """Read the table of a source; see `read_table`."""
        return read_table(source, names, settings)

    @abstractmethod
    def fit(self, table: Table, columns: Columns) -> None:
        """Derive the task's settings, such as its labels, from the training rows.

        Raises:
            ValueError: these rows can't train a model (one class, no rows ...); the message says why.
        """

    def check(self, table: Table, columns: Columns) -> list[str]:
        """Check the targets of `table` against the fitted task; returns warnings for the user.

        Raises:
            ValueError: the targets are invalid: labels unseen in training, answers outside their context ...
        """
        return []

    def describe(self) -> str:
        """What `fit` found in the training rows (labels, tag scheme, separators), for the user; "" for nothing."""
        return ""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The state that `fit` derived, as JSON values; stored in config.json and loaded by `restore`."""

    @abstractmethod
    def restore(self, settings: Mapping[str, Any]) -> None:
        """Load the state that `settings` returned."""

    def model_config(self) -> dict[str, Any]:
        """The entries of `BertConfig` that the head needs, named as in transformers: id2label, problem_type ..."""
        return {}

    def head_config(self) -> dict[str, Any]:
        """The entries of `BertConfig.extra` for heads that transformers does not have."""
        return {}

    def extra_files(self, text: TextSettings, hidden_size: int) -> dict[str, Any]:
        """Path in the result folder -> content of the JSON files by which libraries other than transformers load it."""
        return {}

    @abstractmethod
    def encode(
        self, table: Table, columns: Columns, tokenizer: Tokenizer, text: TextSettings, *, training: bool
    ) -> list[Example]:
        """Encode all rows as examples, in order.

        Args:
            table: the rows.
            columns: role -> column.
            tokenizer: of the model.
            text: how texts are tokenized.
            training: the table has targets, and rows that can't be trained on may be skipped. Otherwise every row is
                encoded, and targets are None if the table has none.
        """

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """The model output for `loss` and `decode`: (B, ...) for a head per sequence, (T, ...) for one per token."""
        return run_model(model, batch)["logits"]

    @abstractmethod
    def loss(self, logits: Tensor, examples: Sequence[Example], options: LossOptions) -> Tensor:
        """The summed loss in fp32; the loop divides it by the `weight` of the whole step.

        Args:
            logits: the output of `forward` for the packed batch of exactly these examples.
            examples: with targets.
            options: class weights, focal loss, label smoothing.

        Raises:
            ValueError: the task does not support one of the options.
        """

    def weight(self, examples: Sequence[Example], options: LossOptions) -> float:
        """The divisor that turns the summed `loss` into a mean: examples, tokens, or the sum of class weights."""
        return float(len(examples))

    def per_example(self, logits: Tensor, batch: Batch) -> list[np.ndarray[Any, Any]]:
        """Split `logits` into one array per example: its row, or the rows of its tokens."""
        array = logits.detach().float().cpu().numpy()
        if len(array) == len(batch.examples):
            return list(array)
        return np.split(array, batch.cu_seqlens[1:-1].tolist())

    @abstractmethod
    def decode(
        self, outputs: Sequence[np.ndarray[Any, Any]], examples: Sequence[Example], table: Table, columns: Columns
    ) -> list[dict[str, Any]]:
        """Decode the outputs of all examples, from `per_example`, to one prediction (JSON values) per row."""

    @abstractmethod
    def evaluate(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> dict[str, Any]:
        """The metrics of `predictions` by name, as JSON values; `main_metric` is among them."""

    def errors(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> list[float] | None:
        """The error of each prediction, 0 if it is correct and larger if it is worse; None if the task defines none."""
        return None

    def inputs(self, table: Table, columns: Columns) -> list[str]:
        """A key of each row's inputs, equal for rows with the same inputs."""
        names = [role.name for role in self.roles if not role.target and role.name in columns]
        return [repr(values) for values in zip(*(table[columns[name]] for name in names), strict=True)]

    def warning(self, predictions: Sequence[Mapping[str, Any]], table: Table, columns: Columns) -> str:
        """A warning if many predictions are all the same and not all correct, as of a model that learnt nothing."""
        outcomes = {self.outcome(prediction) for prediction in predictions}
        if len(predictions) < MANY_ROWS or len(outcomes) > 1 or None in outcomes:
            return ""
        errors = self.errors(predictions, table, columns)
        if errors is not None and not any(errors):
            return ""
        return f"warning: all {len(predictions):,} rows of {table.source} are predicted as {outcomes.pop()}"

    def outcome(self, prediction: Mapping[str, Any]) -> str | None:
        """What `warning` compares of a prediction; None if equal predictions are no fault."""
        return None

    def tune(self, metrics: Mapping[str, Any]) -> str:
        """Tune decoding on dev after training; returns a message for the user, "" if nothing changed.

        Args:
            metrics: of `evaluate` on dev. What is tuned is part of `settings`.
        """
        return ""

    def class_counts(self, examples: Sequence[Example]) -> list[int] | None:
        """How often each class is a target, for balanced class weights; None if the task has no classes."""
        return None

    def class_of(self, example: Example) -> int | None:
        """The class by which examples are resampled; None if the task can't be resampled."""
        return None


def task_class(name: str) -> type[Task]:
    """The class of the task `name`.

    Raises:
        ValueError: there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"task is {name!r}; expected one of {', '.join(TASKS)}{did_you_mean(name, TASKS)}")
    module, _, attribute = TASKS[name].partition(":")
    kind: type[Task] = getattr(import_module(module), attribute)
    return kind


def make_task(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """Create an unfitted task.

    Args:
        name: a key of `TASKS`.
        options: override the defaults of the task's options.

    Raises:
        ValueError: there is no such task or option, or an option is out of range.
    """
    kind = task_class(name)
    known = [item.name for item in fields(kind.options_class)]
    if unknown := sorted(map(str, set(options or {}) - set(known))):
        expected = f"{', '.join(known) or 'none'}{did_you_mean(unknown[0], known)}"
        raise ValueError(f"{name} has no option {', '.join(unknown)}; expected among its options: {expected}")
    return kind(kind.options_class(**(options or {})))


def task_entry(task: Task) -> dict[str, Any]:
    """The entry `CONFIG_KEY` of config.json, from which `task_from_config` restores the task."""
    return {"name": task.name, "options": asdict(task.options), **task.settings()}


def task_from_config(config: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Task:
    """Restore the fitted task of a model.

    Args:
        config: the content of the model's config.json.
        options: override the options of the training.

    Raises:
        ValueError: the model was not fine-tuned by bert_fast, or an option is unknown or out of range.
    """
    entry = config.get(CONFIG_KEY)
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"config.json of the model has no {CONFIG_KEY}; expected a model written by bert-fast finetune"
        )
    task = make_task(entry["name"], {**entry.get("options", {}), **(options or {})})
    task.restore(entry)
    return task
