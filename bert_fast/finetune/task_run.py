"""One task of a fine-tuning run: its data, examples, model, loss, metrics and result folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bert_fast._config import did_you_mean
from bert_fast._device import autocast, resolve_device
from bert_fast._io import write_json
from bert_fast.data import copy_tokenizer, load_tokenizer
from bert_fast.data.tokenizer import check_rows
from bert_fast.finetune.cached import cached_backward, parts_by_tokens
from bert_fast.finetune.config import FinetuneConfig
from bert_fast.finetune.data import Batcher, FinetuneData, Split, load_data
from bert_fast.finetune.models import adopt_model, build_model, describe_task
from bert_fast.finetune.report import METRICS, PREDICTIONS, REPORT, SETTINGS, missing_package, write_report
from bert_fast.models.config import longest_input
from bert_fast.models.snapshot import local_folder
from bert_fast.tasks.augmentation import Augmenter
from bert_fast.tasks.diagnostics import encoding_messages
from bert_fast.tasks.io.labels import label_key
from bert_fast.tasks.metrics import LOWER_IS_BETTER
from bert_fast.tasks.prediction import run_examples
from bert_fast.tasks.task import Batch, Example, LossOptions, Task, make_task


class MainMetric(NamedTuple):
    """The metric that selects the best model: its value (None if undefined), and a score for which higher is better."""

    name: str
    value: float | None
    score: float


def main_metric(task: Task, name: str | None, metrics: Mapping[str, Any]) -> MainMetric:
    """The metric `name`, or the task's main metric if it is None.

    Raises:
        ValueError: the task has no such metric; the message lists its metrics.
    """
    name = name or task.main_metric
    value = metrics.get(name)
    if name not in metrics or not isinstance(value, (int, float, type(None))):
        numbers = ", ".join(key for key, number in metrics.items() if isinstance(number, (int, float)))
        raise ValueError(f"metric is {name!r}; expected one of the metrics of {task.name}: {numbers}")
    lower = name in LOWER_IS_BETTER or (name == task.main_metric and not task.higher_is_better)
    if value is None or math.isnan(value):
        return MainMetric(name, None, -math.inf)
    return MainMetric(name, value, -value if lower else value)


class TaskRun:
    """A task within a run: its data, model, loss and evaluation.

    Args:
        config: the settings of the task; those of the optimizer and of the run's length belong to the loop.
        model: used instead of one loaded from `config.model`, which then only provides the tokenizer.
        report: called with each message for the user.
        name: of the task in a multi-task run.
        weight: factor of its loss in a multi-task run.

    Attributes:
        on_batch: called with the number of examples after each batch of an evaluation; may raise to stop it.

    Raises:
        ValueError: settings, rows and model are inconsistent.
        FileNotFoundError: `config.model` is neither a folder nor a hub name that can be reached.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        model: nn.Module | None = None,
        report: Callable[[str], None] = print,
        *,
        name: str = "",
        weight: float = 1.0,
    ) -> None:
        self.config, self.report, self.name, self.weight = config, report, name, weight
        self.device = resolve_device(config.device)
        self.task = make_task(config.task, config.options)
        self.checkpoint = local_folder(config.model, "a folder with config.json and weights")
        self.tokenizer = load_tokenizer(self.checkpoint)
        self.data: FinetuneData = load_data(self.task, config.data, config.seed, report)
        model = build_model(config, self.task, report) if model is None else adopt_model(model, config, self.task)
        settings: Any = model.config
        check_rows(self.tokenizer, settings.vocab_size, config.model)
        longest = longest_input(model.config)
        if config.text.max_length > longest:
            raise ValueError(
                f"text.max_length is {config.text.max_length}; expected at most {longest}, the model's maximum"
            )
        if unsupported := self.task.head_config():
            report(f"{unsupported}: transformers has no such head and computes other outputs; predict with bert_fast")
        self.model = model
        self.on_batch: Callable[[int], None] | None = None
        self.train_examples = self._encode(self.data.train, training=True)
        if not self.train_examples:
            raise ValueError(f"{config.data.train} has no examples to train on")
        for message in encoding_messages(
            self.train_examples, self.tokenizer, config.text, self.data.train.table.source
        ):
            report(message)
        self.dev_examples = self._encode(self.data.dev, training=False)
        self.loss_options = self._loss_options()
        self.batcher = self._make_batcher(self.train_examples)
        self.augmenter: Augmenter | None = None
        if config.augment.any:
            train = self.data.train
            self.augmenter = Augmenter(
                self.task, train.table, train.columns, self.tokenizer, config.text, config.augment, config.seed
            )

    def _encode(self, split: Split, *, training: bool) -> list[Example]:
        return self.task.encode(split.table, split.columns, self.tokenizer, self.config.text, training=training)

    def _loss_options(self) -> LossOptions:
        settings = self.config.loss
        weights: Tensor | None = None
        if settings.class_weights != "none":
            counts = self.task.class_counts(self.train_examples)
            if counts is None:
                raise ValueError(
                    f"loss.class_weights is {settings.class_weights}; expected none: {self.task.name} has no classes"
                )
            if isinstance(settings.class_weights, str):
                total = sum(counts)
                weights = torch.tensor([total / (len(counts) * max(count, 1)) for count in counts])
            elif isinstance(settings.class_weights, dict):
                weights = torch.tensor(self._weights_by_label(settings.class_weights), dtype=torch.float32)
            elif len(settings.class_weights) != len(counts):
                length = len(settings.class_weights)
                raise ValueError(f"loss.class_weights has {length} numbers; expected {len(counts)}, one per label")
            else:
                weights = torch.tensor(settings.class_weights, dtype=torch.float32)
        return LossOptions(weights, settings.focal_gamma, settings.label_smoothing)

    def _weights_by_label(self, weights: Mapping[Any, float]) -> list[float]:
        names: list[str] = self.task.settings()["labels"]
        by_label = {label_key(label): weight for label, weight in weights.items()}
        for label in weights:
            if label_key(label) not in map(label_key, names):
                raise ValueError(
                    f"loss.class_weights has the label {label!r}; expected {', '.join(names)}"
                    f"{did_you_mean(str(label), names)}"
                )
        if missing := [name for name in names if label_key(name) not in by_label]:
            raise ValueError(f"loss.class_weights has no weight of {', '.join(missing)}; expected one of every label")
        return [by_label[label_key(name)] for name in names]

    def _make_batcher(self, examples: Sequence[Example]) -> Batcher:
        resample = self.config.loss.resample == "balanced"
        return Batcher(self.task, examples, self.config.batch, seed=self.config.seed, resample=resample)

    def batches(self, epoch: int) -> list[list[Example]]:
        """The micro-batches of `epoch`, augmented if the settings say so."""
        if self.augmenter is None:
            return self.batcher.epoch(epoch)
        return self._make_batcher(self.augmenter.examples(epoch)).epoch(epoch)

    def backward(self, examples: Sequence[Example], weight: float, share: float) -> Tensor:
        """Accumulate the gradients of a micro-batch's summed loss, divided by `weight` and times `share`.

        Returns:
            The summed loss divided by `weight`, on the device.
        """
        most = self.config.batch.cache_tokens
        parts = [examples] if most is None else parts_by_tokens(examples, most)
        found: list[Tensor] = []

        def loss(logits: Tensor) -> Tensor:
            mean = self.task.loss(logits, examples, self.loss_options) / weight
            found.append(mean.detach())
            return mean * share

        if len(parts) > 1:
            cached_backward(self._forward, loss, parts, self.device)
        else:
            loss(self._forward(examples)).backward()
        return found[0]

    def _forward(self, examples: Sequence[Example]) -> Tensor:
        """The outputs of the model for examples."""
        batch = Batch.of(examples, self.device)
        with autocast(self.device, self.config.precision):
            return self.task.forward(self.model, batch)

    def loss_weight(self, batches: Sequence[Sequence[Example]]) -> float:
        """The divisor that turns the summed loss of `batches` into their mean."""
        return max(sum(self.task.weight(examples, self.loss_options) for examples in batches), 1e-12)

    def evaluate(
        self, split: Split, examples: Sequence[Example], *, tune: bool = False
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics, with the mean loss, and predictions on `split`.

        Args:
            tune: let the task tune its decoding on these metrics, and decode again if it did.
        """
        outputs = run_examples(
            self.model,
            self.task,
            examples,
            batch_tokens=self.config.batch.eval_tokens,
            precision=self.config.precision,
            progress=self.on_batch,
        )
        while True:
            predictions = self.task.decode(outputs.arrays, examples, split.table, split.columns)
            metrics = {"loss": outputs.loss, **self.task.evaluate(predictions, split.table, split.columns)}
            message = self.task.tune(metrics) if tune else ""
            if not message:
                return metrics, predictions
            self.report(message)
            tune = False

    def check_metric(self) -> None:
        """Raise ValueError, before any training, if the task has no metric of the configured name."""
        if self.config.metric is not None:
            dev = self.data.dev
            sample = Split(dev.table.select(range(min(4, len(dev.table)))), dev.columns)
            self.main_metric(self.evaluate(sample, self._encode(sample, training=False))[0])

    def main_metric(self, metrics: Mapping[str, Any]) -> MainMetric:
        """The metric that the settings name, or the task's main metric."""
        return main_metric(self.task, self.config.metric, metrics)

    def write(self, folder: Path, run: Mapping[str, Any]) -> dict[str, Any]:
        """Write model, tokenizer, metrics, predictions, settings and report to `folder`, which holds log.jsonl.

        Args:
            folder: the result folder.
            run: how the run went, as `Finetuner.run` returns it.

        Returns:
            The content of metrics.json.
        """
        dev, predictions = self.evaluate(self.data.dev, self.dev_examples, tune=True)
        if warning := self.task.warning(predictions, self.data.dev.table, self.data.dev.columns):
            self.report(warning)
        describe_task(self.model, self.config, self.task)
        self._write_model(folder)
        test = self.data.test
        rows = {
            "train": len(self.data.train.table),
            "dev": len(self.data.dev.table),
            "test": None if test is None else len(test.table),
        }
        run = {"task": self.task.name, "rows": rows, **run, "main_metric": self.config.metric or self.task.main_metric}
        metrics = {"run": run, "dev": dev}
        if self.data.test is not None:
            examples = self._encode(self.data.test, training=False)
            metrics["test"], _ = self.evaluate(self.data.test, examples)
        write_json(folder / METRICS, metrics)
        write_json(folder / SETTINGS, asdict(self.config))
        self._write_predictions(folder / PREDICTIONS, predictions)
        if self.config.report:
            self._write_report(folder)
        return metrics

    def _write_model(self, folder: Path) -> None:
        model: Any = self.model
        model.save_pretrained(folder)
        length = self.config.text.max_length if self.task.length_in_tokenizer else longest_input(model.config)
        copy_tokenizer(self.checkpoint, folder, model_max_length=length)
        for name, values in self.task.extra_files(self.config.text, model.config.hidden_size).items():
            write_json(folder / name, values)

    def _write_predictions(self, path: Path, predictions: Sequence[Mapping[str, Any]]) -> None:
        """Write a line of JSON for each row of dev: its number, input, prediction and error."""
        table = self.data.dev.table
        errors: Sequence[float | None] | None = self.task.errors(predictions, table, self.data.dev.columns)
        errors = [None] * len(predictions) if errors is None else errors
        with path.open("wb") as file:
            for row, (prediction, error) in enumerate(zip(predictions, errors, strict=True)):
                line = {"row": table.numbers[row], "input": table.row(row), "prediction": prediction, "error": error}
                try:
                    text = json.dumps(line, ensure_ascii=False, default=str).encode()
                except UnicodeEncodeError:  # a lone surrogate, which UTF-8 does not have
                    text = json.dumps(line, default=str).encode()
                file.write(text + b"\n")

    def _write_report(self, folder: Path) -> None:
        """Write the report; a failure is reported, and the trained model is kept."""
        if package := missing_package():
            self.report(f"{REPORT} is skipped: {package} is not installed; pip install 'bert_fast[finetune]'")
            return
        try:
            write_report(folder)
        except Exception as error:
            self.report(f"warning: {REPORT} is not written: {type(error).__name__}: {error}")
