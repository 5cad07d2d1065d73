"""What a fine-tuning run is told: typed dataclasses, checked once, without importing torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from bert_fast._config import check as _check
from bert_fast._config import check_choices as _check_choices
from bert_fast._config import check_fraction as _check_fraction
from bert_fast.tasks.settings import AugmentSettings, TextSettings


@dataclass(frozen=True)
class TableOptions:
    """Where the rows come from.

    Args:
        train: a file, a folder or `datasets:NAME`; see bert_fast.tasks.io.sources for the formats.
        dev: to judge by while training; held out of train if none.
        test: judged once, at the end, by the best model.
        dev_fraction: share of train that is held out where there is no dev, of each class alike; of questions, whole
            contexts.
        folds: in place of dev_fraction, train is cut into so many parts of the same kind; 0 for none.
        fold: the part that is dev, counted from 0. `bert-fast sweep --folds` goes through them.
        columns: which column plays which role (text, text_pair, label ...); guessed from usual names if none.
        names: the columns of a .csv or .tsv file whose first line is a row.
        empty: rows without text are refused, dropped, or filled.
        fill: the text that is put in with empty=fill.
        max_rows: read at most so many rows of train, to try something out; 0 reads all.
    """

    train: str
    dev: str | None = None
    test: str | None = None
    dev_fraction: float = 0.1
    folds: int = 0
    fold: int = 0
    columns: dict[str, str] = field(default_factory=dict)
    names: list[str] | None = None
    empty: Literal["refuse", "drop", "fill"] = "refuse"
    fill: str = "[UNK]"
    max_rows: int = 0

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(bool(self.train), "data.train is empty; expected a file, a folder or datasets:NAME")
        _check(0.0 < self.dev_fraction < 1.0, f"data.dev_fraction is {self.dev_fraction}; expected between 0 and 1")
        _check(self.folds == 0 or self.folds > 1, f"data.folds is {self.folds}; expected 0 (none), or 2 and more")
        _check(0 <= self.fold <= max(self.folds - 1, 0), f"data.fold is {self.fold} of {self.folds}, counted from 0")
        _check(not (self.folds and self.dev), "data.folds and data.dev came; the folds are parts of data.train")
        _check(self.max_rows >= 0, f"data.max_rows is {self.max_rows}; expected 0 (all) or more")
        _check(self.empty != "fill" or bool(self.fill.strip()), "data.fill is empty; expected a text to put in")


@dataclass(frozen=True)
class BatchOptions:
    """How examples are put together.

    Args:
        rows: examples of a micro-batch.
        tokens: in place of rows, at most so many tokens; there is no padding in them.
        accumulation: micro-batches a step; the loss is the mean over the whole step.
        bucket: examples are shuffled, then sorted by length within so many micro-batches, so that a batch holds like
            lengths; 0 leaves them shuffled. Our own models compute no padding and need none.
        eval_tokens: most tokens of a batch of the evaluation.
    """

    rows: int = 16
    tokens: int | None = None
    accumulation: int = 1
    bucket: int = 0
    eval_tokens: int = 8192

    def __post_init__(self) -> None:
        for name, least in {"rows": 1, "tokens": 1, "accumulation": 1, "bucket": 0, "eval_tokens": 1}.items():
            value = getattr(self, name)
            _check(value is None or value >= least, f"batch.{name} is {value}; expected at least {least}")


@dataclass(frozen=True)
class FinetuneOptimizer:
    """How the weights are updated, by AdamW.

    Args:
        lr: learning rate of the head, at the end of the warm-up.
        warmup_steps: steps over which lr rises linearly from 0; below 1, a fraction of all steps.
        decay: linear or cosine to 0 at the last step; constant stays.
        layer_decay: each layer below the head has the learning rate of the one above times this; 1 for the same.
        weight_decay: decoupled; biases and LayerNorm weights have none.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        max_grad_norm: clip the global gradient norm to this; 0 does not clip.
        freeze_embeddings: leave the embeddings as they are.
        freeze_layers: leave the first so many layers as they are (and the embeddings with them).
        unfreeze_epochs: gradual unfreezing (Howard and Ruder, 2018): only the head learns at first; after each so many
            epochs one more layer does, from the top, the embeddings last. 0 for none.
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
        _check_choices(self)
        _check(self.lr > 0 and math.isfinite(self.lr), f"optimizer.lr is {self.lr}; expected a positive number")
        _check(
            self.warmup_steps >= 0 and (self.warmup_steps < 1 or float(self.warmup_steps).is_integer()),
            f"optimizer.warmup_steps is {self.warmup_steps}; expected whole steps, or a fraction below 1",
        )
        _check(0 < self.layer_decay <= 1, f"optimizer.layer_decay is {self.layer_decay}; expected more than 0, to 1")
        _check(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"optimizer.betas are {self.betas}; expected two numbers from 0 up to 1",
        )
        for name in ("weight_decay", "max_grad_norm", "freeze_layers", "unfreeze_epochs"):
            _check(getattr(self, name) >= 0, f"optimizer.{name} is {getattr(self, name)}; expected 0 or more")
        _check(self.eps > 0, f"optimizer.eps is {self.eps}; expected a positive number")


@dataclass(frozen=True)
class LossSettings:
    """What is done about classes that are rare or too easy.

    Args:
        class_weights: none, balanced (rows / (classes * rows of the class)), or a number for each class, in the order
            of the labels.
        focal_gamma: > 0 for the focal loss: what is predicted well counts less.
        label_smoothing: share of the target that is spread over all classes.
        resample: balanced draws each epoch's rows with replacement, every class as often.
    """

    class_weights: Literal["none", "balanced"] | list[float] = "none"
    focal_gamma: float = 0.0
    label_smoothing: float = 0.0
    resample: Literal["none", "balanced"] = "none"

    def __post_init__(self) -> None:
        if isinstance(self.class_weights, Sequence) and not isinstance(self.class_weights, str):
            good = all(weight > 0 and math.isfinite(weight) for weight in self.class_weights)
            _check(good, f"loss.class_weights are {self.class_weights}; expected positive numbers")
        elif self.class_weights not in ("none", "balanced"):
            raise ValueError(f"loss.class_weights is {self.class_weights!r}; expected none, balanced or a list")
        _check_choices(self)
        _check(self.focal_gamma >= 0, f"loss.focal_gamma is {self.focal_gamma}; expected 0 or more")
        _check_fraction("loss.label_smoothing", self.label_smoothing)


@dataclass(frozen=True)
class FinetuneConfig:
    """A fine-tuning run.

    Args:
        task: classification, multi-label, regression, token-classification, question-answering, multiple-choice or
            sentence-embedding.
        model: folder of a checkpoint to start from, with its tokenizer.
        output_dir: folder of the result; it appears when the run is done, and not before.
        data: the rows.
        text: how texts become tokens.
        augment: how training rows are changed in each epoch; not at all by default.
        options: the task's own settings.
        batch: how examples are put together.
        optimizer: how the weights are updated.
        loss: weights of classes, focal loss, smoothing, resampling.
        epochs: passes over the training rows.
        steps: in place of epochs, optimizer steps.
        eval_steps: steps between two evaluations on dev; 0 evaluates after each epoch.
        patience: stop after so many evaluations without a better metric; 0 never does.
        metric: what drives patience and keep_best; the task's own main metric if none.
        keep_best: the result is the model of the best evaluation, not of the last step.
        dropout: in place of the configuration's hidden_dropout_prob and attention_probs_dropout_prob.
        classifier_dropout: in place of the configuration's, before the head.
        precision: fp32, or bf16 autocast with fp32 weights.
        device: auto takes CUDA where there is one.
        seed: of the head, the dropout, the split and the order of the rows.
        log_interval: steps between two lines of the log.
        progress: show a progress bar.
        report: write report.html too: curves, confusion matrix, calibration, worst mistakes. Needs matplotlib.
        overwrite: replace output_dir where it is there.
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

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(bool(self.output_dir), "output_dir is empty; expected a folder")
        _check(bool(self.model), "model is empty; expected the folder of a checkpoint")
        _check(self.epochs > 0, f"epochs is {self.epochs}; expected more than 0")
        _check(self.steps is None or self.steps > 0, f"steps is {self.steps}; expected more than 0")
        for name, least in {"eval_steps": 0, "patience": 0, "seed": 0, "log_interval": 1}.items():
            value = getattr(self, name)
            _check(value >= least, f"{name} is {value}; expected at least {least}")
        _check_fraction("dropout", self.dropout)
        _check_fraction("classifier_dropout", self.classifier_dropout)
