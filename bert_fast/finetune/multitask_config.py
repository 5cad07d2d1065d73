"""What a run over several tasks is told, without importing torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from bert_fast._config import check as _check
from bert_fast._config import check_choices as _check_choices
from bert_fast.finetune.config import (
    BatchOptions,
    FinetuneConfig,
    FinetuneOptimizer,
    LossSettings,
    TableOptions,
)
from bert_fast.tasks.settings import AugmentSettings, TextSettings

TEMPERATURES = {"proportional": 1.0, "square-root": 2.0, "uniform": float("inf")}
_NAME = re.compile(r"\w[\w-]*")


@dataclass(frozen=True)
class TaskSettings:
    """One of the tasks: what is its own; `bert-fast finetune --help` explains each.

    Args:
        task: classification, token-classification ...; two may be the same, with other rows.
        data: its rows, columns and splits.
        options: of the task.
        text: in place of the run's.
        augment: how its training rows are changed.
        loss: class weights, focal loss, smoothing, resampling.
        metric: what counts for it; the task's own main metric if none.
        rows: examples of a micro-batch, in place of the run's batch.rows.
        weight: by which its loss is multiplied.
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
        _check(self.rows is None or self.rows >= 1, f"rows is {self.rows}; expected at least 1")
        _check(self.weight > 0, f"weight is {self.weight}; expected more than 0")


@dataclass(frozen=True)
class MultitaskConfig:
    """A fine-tuning run over several tasks, which share the embeddings and the layers of one encoder.

    Args:
        tasks: name -> settings. The result of each is a folder of that name.
        model: folder of a checkpoint to start from, with its tokenizer.
        output_dir: folder of the results; it appears when the run is done, and not before.
        sampling: how often a task's batches come: proportional to how many it has (each epoch then goes through all
            rows of all tasks), to the square root of that, or uniform.
        temperature: in place of sampling: in proportion to the number to the power of 1 / temperature.
        text: how texts become tokens, where a task does not say.
        batch: how examples are put together; a micro-batch is of one task, a step of `accumulation` micro-batches of
            any.
        optimizer: how the weights are updated.
        epochs: each has as many batches as all tasks together have.
        steps: in place of epochs, optimizer steps.
        eval_steps: steps between two evaluations on dev; 0 evaluates after each epoch.
        patience: stop after so many evaluations without a better mean of the tasks' metrics; 0 never does.
        keep_best: the result is the model of the best evaluation, not of the last step.
        dropout: in place of the configuration's hidden_dropout_prob and attention_probs_dropout_prob.
        classifier_dropout: in place of the configuration's, before the heads.
        precision: fp32, or bf16 autocast with fp32 weights.
        device: auto takes CUDA where there is one.
        seed: of the heads, the dropout, the splits and the order of tasks and rows.
        log_interval: steps between two lines of the logs.
        progress: show a progress bar.
        report: write report.html for the run and each task. Needs matplotlib.
        overwrite: replace output_dir where it is there.
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

    def __post_init__(self) -> None:
        _check_choices(self)
        _check(bool(self.tasks), "tasks is empty; expected a name and settings for each task")
        for name in self.tasks:
            good = _NAME.fullmatch(name)
            _check(bool(good), f"a task is called {name!r}; expected letters, digits, _ and -: a folder has that name")
        temperature = self.temperature
        _check(temperature is None or temperature > 0, f"temperature is {temperature}; expected more than 0")
        self.runs()

    def runs(self) -> dict[str, FinetuneConfig]:
        """The settings of each task as those of a run of its own."""
        own = {item.name for item in fields(TaskSettings)} - {"rows", "weight", "text"}
        common = {item.name for item in fields(FinetuneConfig)} & {item.name for item in fields(self)} - own
        shared = {name: getattr(self, name) for name in common}
        found = {}
        for name, task in self.tasks.items():
            settings = {**shared, **{key: getattr(task, key) for key in own}}
            settings["output_dir"] = f"{self.output_dir}/{name}"
            settings["text"] = task.text or self.text
            if task.rows is not None:
                settings["batch"] = replace(self.batch, rows=task.rows)
            found[name] = FinetuneConfig(**settings)
        return found

    def power(self) -> float:
        """The temperature of the sampling."""
        return TEMPERATURES[self.sampling] if self.temperature is None else self.temperature
