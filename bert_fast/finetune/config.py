"""The settings of fine-tuning, on one task or several: typed dataclasses, checked once, without importing torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from bert_fast._config import check, check_fraction, convert_fields
from bert_fast.tasks.settings import AugmentSettings, FormatSettings, TextSettings

TEMPERATURES = {"proportional": 1.0, "square-root": 2.0, "uniform": float("inf")}
_NAME = re.compile(r"\w[\w-]*")


@dataclass(frozen=True)
class TableOptions:
    """The data of a run and its splits.

    Args:
        train: a file, a folder or `datasets:NAME`; see bert_fast.tasks.io.sources for the formats.
        dev: evaluated during training; held out of train if None.
        test: evaluated once, at the end, with the best model.
        dev_fraction: share of train held out if dev is None, stratified by class; for questions, whole contexts.
        folds: split train into this many folds in place of dev_fraction; 0 disables it.
        fold: the fold used as dev, counted from 0. `bert-fast sweep --folds` runs them all.
        columns: role (text, text_pair, label ...) -> column; guessed from common column names if empty.
        names: the column names of a .csv or .tsv file without a header.
        format: delimiter, quoting and encoding of text files; detected by default.
        empty: what happens to rows without text: refuse (an error), drop or fill.
        fill: the text that replaces an empty one with empty=fill.
        no_label: labels that mean none, such as "-" or -1: rows with one, or with an empty cell, are dropped. By
            default an empty cell is an error, and every other label a class.
        max_rows: use at most this many rows of train; 0 uses all.
    """

    train: str
    dev: str | None = None
    test: str | None = None
    dev_fraction: float = 0.1
    folds: int = 0
    fold: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    names: list[str] | None = None
    format: FormatSettings = field(default_factory=FormatSettings)
    empty: Literal["refuse", "drop", "fill"] = "refuse"
    fill: str = "[UNK]"
    no_label: list[str | int] | None = None
    max_rows: int = 0

    def __post_init__(self) -> None:
        convert_fields(self, "data.")
        check(bool(self.train), "data.train is empty; expected a file, a folder or datasets:NAME")
        check(0.0 < self.dev_fraction < 1.0, f"data.dev_fraction is {self.dev_fraction}; expected between 0 and 1")
        check(self.folds == 0 or self.folds > 1, f"data.folds is {self.folds}; expected 0 (none), or 2 or more")
        check(
            0 <= self.fold <= max(self.folds - 1, 0),
            f"data.fold is {self.fold}; expected 0 to data.folds - 1, {self.folds - 1}",
        )
        check(
            not (self.folds and self.dev),
            "data.folds and data.dev are both set; leave data.dev out: the folds split data.train",
        )
        check(self.max_rows >= 0, f"data.max_rows is {self.max_rows}; expected 0 (all) or more")
        check(
            self.empty != "fill" or bool(self.fill.strip()),
            "data.fill is empty; expected a text, since data.empty is fill",
        )


@dataclass(frozen=True)
class BatchOptions:
    """How examples are batched.

    Args:
        rows: examples per micro-batch.
        tokens: limit micro-batches by tokens, in place of rows; they contain no padding.
        accumulation: micro-batches per optimizer step; the loss is the mean over the step.
        bucket: shuffle, then sort by length within windows of this many micro-batches, so that batches hold examples
            of similar length; 0 only shuffles. bert_fast's models compute no padding and don't need it.
        eval_tokens: maximum tokens of an evaluation batch.
        cache_tokens: maximum tokens of a forward pass within a micro-batch, whose gradient is then computed by a second
            forward pass (GradCache, Gao et al., 2021): the memory is that of this many tokens, however many negatives
            the rows of a micro-batch of sentence-embedding are for each other. None computes micro-batches at once.
    """

    rows: int = 16
    tokens: int | None = None
    accumulation: int = 1
    bucket: int = 0
    eval_tokens: int = 8192
    cache_tokens: int | None = None

    def __post_init__(self) -> None:
        convert_fields(self, "batch.")
        for name, least in {
            "rows": 1, "tokens": 1, "accumulation": 1, "bucket": 0, "eval_tokens": 1, "cache_tokens": 1,
        }.items():  # fmt: skip
            value = getattr(self, name)
            check(value is None or value >= least, f"batch.{name} is {value}; expected at least {least}")


@dataclass(frozen=True)
class FinetuneOptimizer:
    """AdamW and its learning-rate schedule.

    Args:
        lr: peak learning rate of the head.
        warmup_steps: steps of linear warm-up from 0; a value below 1 is a fraction of all steps.
        decay: linear or cosine decay to 0 at the last step, or constant.
        layer_decay: the learning rate of each layer is that of the layer above times this; 1 uses one rate.
        weight_decay: decoupled weight decay; biases and LayerNorm weights have none.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        max_grad_norm: clip the global gradient norm to this; 0 does not clip.
        freeze_embeddings: do not train the embeddings.
        freeze_layers: do not train the first this many layers and the embeddings.
        unfreeze_epochs: gradual unfreezing (Howard and Ruder, 2018): train only the head at first, and unfreeze one
            more layer every this many epochs, from the top, the embeddings last; 0 disables it.
    """

    lr: float = 3e-5
    warmup_steps: float = 0.1
    decay: Literal["linear", "cosine", "constant"] = "linear"
    layer_decay: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    freeze_embeddings: bool = False
    freeze_layers: int = 0
    unfreeze_epochs: float = 0.0

    def __post_init__(self) -> None:
        convert_fields(self, "optimizer.")
        check(self.lr > 0 and math.isfinite(self.lr), f"optimizer.lr is {self.lr}; expected a positive number")
        check(
            self.warmup_steps >= 0 and (self.warmup_steps < 1 or float(self.warmup_steps).is_integer()),
            f"optimizer.warmup_steps is {self.warmup_steps}; expected an integer, or a fraction below 1",
        )
        check(
            0 < self.layer_decay <= 1,
            f"optimizer.layer_decay is {self.layer_decay}; expected more than 0 and at most 1",
        )
        check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas are {self.betas}; expected two numbers in [0, 1)",
        )
        for name in ("weight_decay", "max_grad_norm", "freeze_layers", "unfreeze_epochs"):
            value = getattr(self, name)
            check(
                value >= 0 and math.isfinite(value), f"optimizer.{name} is {value}; expected a finite number, 0 or more"
            )
        check(self.eps > 0 and math.isfinite(self.eps), f"optimizer.eps is {self.eps}; expected a positive number")


@dataclass(frozen=True)
class LossSettings:
    """Class weights, focal loss, label smoothing and resampling.

    Args:
        class_weights: none, balanced (rows / (classes * rows of the class)), or one number per class, in the order of
            the labels or by label.
        focal_gamma: exponent of the focal loss, which weights well-classified examples less; 0 disables it.
        label_smoothing: share of the target probability spread over all classes.
        resample: balanced draws the rows of each epoch with replacement, every class equally often.
    """

    class_weights: Literal["none", "balanced"] | list[float] | dict[str, float] = "none"
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    resample: Literal["none", "balanced"] = "none"

    def __post_init__(self) -> None:
        convert_fields(self, "loss.")
        weights = self.class_weights
        if not isinstance(weights, str):
            numbers = list(weights.values() if isinstance(weights, dict) else weights)
            positive = bool(numbers) and all(number > 0 and math.isfinite(number) for number in numbers)
            check(positive, f"loss.class_weights is {weights}; expected positive numbers")
        check(
            self.focal_gamma >= 0 and math.isfinite(self.focal_gamma),
            f"loss.focal_gamma is {self.focal_gamma}; expected a finite number, 0 or more",
        )
        check_fraction("loss.label_smoothing", self.label_smoothing)


@dataclass(frozen=True)
class FinetuneConfig:
    """The settings of a fine-tuning run.

    Args:
        task: classification, multi-label, regression, token-classification, question-answering, multiple-choice,
            sentence-embedding or rerank.
        model: folder of the pretrained checkpoint and its tokenizer, or a hub name.
        output_dir: folder of the result; it is written atomically at the end of the run.
        data: the data and its splits.
        text: how texts are tokenized.
        augment: data augmentation of the training rows; off by default.
        options: the task's own settings.
        batch: how examples are batched.
        optimizer: AdamW and its schedule.
        loss: class weights, focal loss, label smoothing, resampling.
        epochs: passes over the training rows.
        steps: optimizer steps, in place of epochs.
        eval_steps: steps between evaluations on dev; 0 evaluates after each epoch.
        patience: stop after this many evaluations without improvement; 0 never stops early.
        metric: the metric that patience and keep_best use; the task's main metric if None.
        keep_best: return the model of the best evaluation instead of the last step.
        dropout: overrides hidden_dropout_prob and attention_probs_dropout_prob of the checkpoint.
        classifier_dropout: overrides the dropout before the head.
        precision: fp32, or bf16 autocast with fp32 weights.
        device: auto selects CUDA if it is available.
        seed: seeds the head, dropout, the split and the order of the rows.
        log_interval: steps between log lines.
        progress: show a progress bar.
        report: write report.html: curves, confusion matrix, calibration, worst mistakes. Requires matplotlib.
        overwrite: replace output_dir if it holds a result; the old one is kept until the new one is complete.
        checkpoint_interval: steps between two checkpoints, in `<output_dir>.unfinished`; 0 disables these.
        checkpoint_minutes: minutes between two checkpoints; 0 disables these. A signal always writes one.
        keep_last: number of checkpoints to keep; 0 keeps all.
        resume: auto resumes from the newest valid checkpoint of an unfinished run of output_dir if there is one, never
            raises an error if there is one, and a path names the checkpoint to resume from.
    """

    task: str
    model: str
    output_dir: str
    data: TableOptions
    text: TextSettings = field(default_factory=TextSettings)
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    options: dict[str, Any] = field(default_factory=dict)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: FinetuneOptimizer = field(default_factory=FinetuneOptimizer)
    loss: LossSettings = field(default_factory=LossSettings)
    epochs: float = 3.0
    steps: int | None = None
    eval_steps: int = 0
    patience: int = 0
    metric: str | None = None
    keep_best: bool = True
    dropout: float | None = None
    classifier_dropout: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    seed: int = 0
    log_interval: int = 10
    progress: bool = True
    report: bool = True
    overwrite: bool = False
    checkpoint_interval: int = 0
    checkpoint_minutes: float = 10.0
    keep_last: int = 2
    resume: str = "auto"

    def __post_init__(self) -> None:
        convert_fields(self)
        check(bool(self.output_dir), "output_dir is empty; expected a folder")
        check(bool(self.model), "model is empty; expected the folder of a checkpoint")
        check(self.epochs > 0 and math.isfinite(self.epochs), f"epochs is {self.epochs}; expected more than 0")
        check(self.steps is None or self.steps > 0, f"steps is {self.steps}; expected more than 0")
        for name, least in {
            "eval_steps": 0, "patience": 0, "seed": 0, "log_interval": 1, "checkpoint_interval": 0, "keep_last": 0,
        }.items():  # fmt: skip
            value = getattr(self, name)
            check(value >= least, f"{name} is {value}; expected at least {least}")
        check(
            self.checkpoint_minutes >= 0 and math.isfinite(self.checkpoint_minutes),
            f"checkpoint_minutes is {self.checkpoint_minutes}; expected a finite number, 0 or more",
        )
        check(bool(self.resume), "resume is empty; expected auto, never or the folder of a checkpoint")
        check_fraction("dropout", self.dropout)
        check_fraction("classifier_dropout", self.classifier_dropout)


@dataclass(frozen=True)
class TaskSettings:
    """The settings of one task of a multi-task run; `bert-fast finetune --help` explains each.

    Args:
        task: classification, token-classification ...; several tasks may be of the same kind.
        data: its data and splits.
        options: the task's own settings.
        text: overrides the run's.
        augment: data augmentation of its training rows.
        loss: class weights, focal loss, label smoothing, resampling.
        metric: its metric in the mean over tasks; the task's main metric if None.
        rows: examples per micro-batch; overrides the run's batch.rows.
        weight: factor of its loss.
    """

    task: str
    data: TableOptions
    options: dict[str, Any] = field(default_factory=dict)
    text: TextSettings | None = None
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    metric: str | None = None
    rows: int | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        convert_fields(self)
        check(self.rows is None or self.rows >= 1, f"rows is {self.rows}; expected at least 1")
        check(
            self.weight > 0 and math.isfinite(self.weight), f"weight is {self.weight}; expected a finite number above 0"
        )


@dataclass(frozen=True)
class MultitaskConfig:
    """The settings of a fine-tuning run on several tasks that share the embeddings and layers of one encoder.

    Args:
        tasks: name -> settings. The result of each task is a folder of that name.
        model: folder of the pretrained checkpoint and its tokenizer, or a hub name.
        output_dir: folder of the results; it is written atomically at the end of the run.
        sampling: how often each task is sampled: in proportion to its number of batches (an epoch is then one pass
            over the rows of all tasks), to the square root of that number, or uniformly.
        temperature: overrides sampling: in proportion to the number of batches to the power of 1 / temperature.
        text: how texts are tokenized, unless the task overrides it.
        batch: how examples are batched; a micro-batch belongs to one task, the micro-batches of a step to any.
        optimizer: AdamW and its schedule.
        epochs: an epoch has as many batches as all tasks have in total.
        steps: optimizer steps, in place of epochs.
        eval_steps: steps between evaluations on dev; 0 evaluates after each epoch.
        patience: stop after this many evaluations without a better mean of the tasks' metrics; 0 never stops early.
        keep_best: return the model of the best evaluation instead of the last step.
        dropout: overrides hidden_dropout_prob and attention_probs_dropout_prob of the checkpoint.
        classifier_dropout: overrides the dropout before the heads.
        precision: fp32, or bf16 autocast with fp32 weights.
        device: auto selects CUDA if it is available.
        seed: seeds the heads, dropout, the splits and the order of tasks and rows.
        log_interval: steps between log lines.
        progress: show a progress bar.
        report: write report.html for the run and each task. Requires matplotlib.
        overwrite: replace output_dir if it holds a result; the old one is kept until the new one is complete.
        checkpoint_interval: steps between two checkpoints, in `<output_dir>.unfinished`; 0 disables these.
        checkpoint_minutes: minutes between two checkpoints; 0 disables these. A signal always writes one.
        keep_last: number of checkpoints to keep; 0 keeps all.
        resume: auto resumes from the newest valid checkpoint of an unfinished run of output_dir if there is one, never
            raises an error if there is one, and a path names the checkpoint to resume from.
    """

    tasks: dict[str, TaskSettings]
    model: str
    output_dir: str
    sampling: Literal["proportional", "square-root", "uniform"] = "proportional"
    temperature: float | None = None
    text: TextSettings = field(default_factory=TextSettings)
    batch: BatchOptions = field(default_factory=BatchOptions)
    optimizer: FinetuneOptimizer = field(default_factory=FinetuneOptimizer)
    epochs: float = 3.0
    steps: int | None = None
    eval_steps: int = 0
    patience: int = 0
    keep_best: bool = True
    dropout: float | None = None
    classifier_dropout: float | None = None
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str = "auto"
    seed: int = 0
    log_interval: int = 10
    progress: bool = True
    report: bool = True
    overwrite: bool = False
    checkpoint_interval: int = 0
    checkpoint_minutes: float = 10.0
    keep_last: int = 2
    resume: str = "auto"

    def __post_init__(self) -> None:
        convert_fields(self)
        check(bool(self.tasks), "tasks is empty; expected a name and settings for each task")
        for name in self.tasks:
            valid = _NAME.fullmatch(name) is not None
            check(valid, f"tasks has the name {name!r}; expected letters, digits, _ and -, since it names a folder")
        temperature = self.temperature
        check(temperature is None or temperature > 0, f"temperature is {temperature}; expected more than 0")
        self.task_configs()

    def task_configs(self) -> dict[str, FinetuneConfig]:
        """The settings of each task as a run on that task alone has them."""
        task_fields = {item.name for item in fields(TaskSettings)} - {"rows", "weight", "text"}
        run_fields = {item.name for item in fields(FinetuneConfig)} & {item.name for item in fields(self)} - task_fields
        shared = {name: getattr(self, name) for name in run_fields}
        configs = {}
        for name, task in self.tasks.items():
            settings = {**shared, **{key: getattr(task, key) for key in task_fields}}
            settings["output_dir"] = f"{self.output_dir}/{name}"
            settings["text"] = task.text or self.text
            if task.rows is not None:
                settings["batch"] = replace(self.batch, rows=task.rows)
            configs[name] = FinetuneConfig(**settings)
        return configs

    def sampling_temperature(self) -> float:
        """`temperature` if it is set, else that of `sampling`."""
        return TEMPERATURES[self.sampling] if self.temperature is None else self.temperature
