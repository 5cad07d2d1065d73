"""The fine-tuning loop: from rows and a pretrained model to a folder that transformers loads.

On the CPU the same settings give the same losses, bit for bit: the order of the rows is a function of (seed, epoch),
and head and dropout follow torch's generator.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.data import load_tokenizer
from bert_fast.data.tokenizer import TOKENIZER_FILES
from bert_fast.models import BertConfig
from bert_fast.models.config import longest_input
from bert_fast.tasks.augmentation import Augmenter
from bert_fast.tasks.metrics import LOWER_IS_BETTER
from bert_fast.tasks.prediction import run_examples
from bert_fast.tasks.task import CONFIG_KEY, Batch, Example, LossOptions, Task, make_task, task_entry
from bert_fast.training.finetune_config import FinetuneConfig
from bert_fast.training.finetune_data import Batcher, FinetuneData, Split, open_data
from bert_fast.training.finetune_report import METRICS, PREDICTIONS, REPORT, SETTINGS, missing_package, write_report
from bert_fast.training.guard import TrainingDivergedError
from bert_fast.training.layers import Unfreezing, freeze, layered_groups
from bert_fast.training.log import RunLog
from bert_fast.training.params import clipped_step
from bert_fast.training.parts import resolve_device
from bert_fast.training.passes import autocast
from bert_fast.training.progress import Progress
from bert_fast.training.schedule import lr_factor


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended.

    Args:
        metrics: {"dev": metrics of the model in `folder`, "test": the same or absent, "run": steps, seconds ...}.
        folder: the model in transformers' format, tokenizer, metrics, predictions and log.
        model: in eval mode.
        task: fitted.
    """

    metrics: dict[str, Any]
    folder: str
    model: nn.Module
    task: Task


def config_entry(config: FinetuneConfig, task: Task) -> dict[str, Any]:
    """What config.json says about the task: enough to predict."""
    return {**task_entry(task), "text": asdict(config.text)}


_HEAD_DROPOUTS = ("qa_dropout", "seq_classif_dropout", "summary_last_dropout")


def build_model(config: FinetuneConfig, task: Task) -> nn.Module:
    """The model of the task's class from the checkpoint `config.model`; a head of other labels is made anew.

    Raises:
        ValueError: the checkpoint is damaged, or has fewer positions than text.max_length.
    """
    import bert_fast.models

    kind: Any = getattr(bert_fast.models, task.model_class)
    settings: Any = BertConfig.from_pretrained(config.model)
    kept = {name: value for name, value in settings.extra.items() if name != "classifier_pooling"}
    changes: dict[str, Any] = {
        **task.model_config(),
        "extra": {**kept, **task.head_config(), CONFIG_KEY: config_entry(config, task)},
    }
    if config.dropout is not None:
        changes |= dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), config.dropout)
    if config.classifier_dropout is not None:
        if task.model_class == "BertForTokenClassification" and "classifier_dropout" in settings.architecture.fixed:
            raise ValueError(f"classifier_dropout came, and {settings.model_type} has none for tokens; set dropout")
        # DistilBERT and ELECTRA have settings of their own for some heads.
        own = [name for name in _HEAD_DROPOUTS if name in settings.architecture.defaults]
        changes["extra"] |= dict.fromkeys(own, config.classifier_dropout)
        changes["classifier_dropout"] = config.classifier_dropout
    settings = settings.replace(**changes)
    model: nn.Module = kind.from_pretrained(config.model, config=settings, ignore_mismatched_sizes=True)
    return model


def adopt_model(model: nn.Module, config: FinetuneConfig, task: Task) -> nn.Module:
    """Write the task into the configuration of a model that the user made (transformers', fused or not).

    Raises:
        ValueError: its head has another number of labels than the data.
    """
    settings: Any = model.config
    wanted = task.model_config()
    count = wanted.get("num_labels")
    if count is not None and count != settings.num_labels:
        raise ValueError(
            f"the model has {settings.num_labels} labels and the training rows have {count}; make it with {count}"
        )
    for name, value in wanted.items():
        if name != "num_labels":  # transformers derives it from id2label
            setattr(settings, name, value)
    if unknown := task.head_config():
        raise ValueError(f"a model came that does not have {unknown}; leave it out, or let finetune make the model")
    if isinstance(settings, BertConfig):
        settings.extra = {**settings.extra, CONFIG_KEY: config_entry(config, task)}
    else:
        setattr(settings, CONFIG_KEY, config_entry(config, task))
    return model


def score(task: Task, wanted: str | None, metrics: Mapping[str, Any]) -> tuple[str, float | None, float]:
    """The metric that counts, `wanted` or the task's own: its name, its value, and a number that is higher the better.

    Raises:
        ValueError: there is no such metric; the message lists those that there are.
    """
    name = wanted or task.main_metric
    value = metrics.get(name)
    if name not in metrics or not isinstance(value, (int, float, type(None))):
        numbers = ", ".join(key for key, found in metrics.items() if isinstance(found, (int, float)))
        raise ValueError(f"metric is {name!r}; the metrics of {task.name} are {numbers}")
    lower = name in LOWER_IS_BETTER or (name == task.main_metric and not task.higher_is_better)
    if value is None or math.isnan(value):
        return name, None, -math.inf
    return name, value, -value if lower else value


@contextmanager
def result_folder(target: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name where the block ends well, and is removed where not.

    Raises:
        FileExistsError: `target` is there and `overwrite` is False.
    """
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} is there already; choose another output_dir, or give --overwrite true")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".writing-{target.name}"
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir()
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary)
        raise
    if target.is_dir():
        shutil.rmtree(target)
    elif target.exists():
        target.unlink()
    temporary.rename(target)


class Finetuner:
    """A fine-tuning run: everything that `finetune` holds between two steps.

    Args:
        config: the run.
        model: in place of one loaded from `config.model`, which then only names the tokenizer.
        report: takes the sentences that a user should read.
    """

    def __init__(
        self, config: FinetuneConfig, model: nn.Module | None = None, report: Callable[[str], None] = print
    ) -> None:
        self.config, self.report = config, report
        self.device = resolve_device(config.device)
        self.task = make_task(config.task, config.options)
        if not Path(config.model).is_dir():
            raise FileNotFoundError(
                f"model is {config.model}, which is no folder; expected one with config.json and weights"
            )
        self.tokenizer = load_tokenizer(config.model)
        self.data: FinetuneData = open_data(self.task, config.data, config.seed, report)
        torch.manual_seed(config.seed)
        model = build_model(config, self.task) if model is None else adopt_model(model, config, self.task)
        longest = longest_input(model.config)
        if config.text.max_length > longest:
            raise ValueError(f"text.max_length is {config.text.max_length}; the model takes at most {longest} tokens")
        if changed := self.task.head_config():
            report(f"{changed}: transformers has no such head and would compute something else; predict with bert_fast")
        self.model = model.to(self.device).train()
        self.train_examples = self._encode(self.data.train, training=True)
        if not self.train_examples:
            raise ValueError(f"{config.data.train} gave no examples to train on")
        self.dev_examples = self._encode(self.data.dev, training=False)
        self.loss_options = self._loss_options()
        self.batcher = self._make_batcher(self.train_examples)
        train, text = self.data.train, config.text
        self.augmenter: Augmenter | None = None
        if config.augment.any:
            self.augmenter = Augmenter(
                self.task, train.table, train.columns, self.tokenizer, text, config.augment, config.seed
            )
        self.optimizer = self._make_optimizer()
        self.unfreezing = Unfreezing(self.model, config.optimizer.unfreeze_epochs)
        self.unfreezing.advance(0.0)
        self.total_steps, self.warmup = self._lengths()
        self._check_metric()
        self.step, self.tokens = 0, 0
        self.best: dict[str, Any] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.waited = 0

    def _encode(self, split: Split, *, training: bool) -> list[Example]:
        return self.task.encode(split.table, split.columns, self.tokenizer, self.config.text, training=training)

    def _loss_options(self) -> LossOptions:
        settings = self.config.loss
        weights: Tensor | None = None
        if settings.class_weights != "none":
            counts = self.task.class_counts(self.train_examples)
            if counts is None:
                raise ValueError(f"loss.class_weights is {settings.class_weights}, and {self.task.name} has no classes")
            if isinstance(settings.class_weights, str):
                total = sum(counts)
                weights = torch.tensor([total / (len(counts) * max(count, 1)) for count in counts])
            elif len(settings.class_weights) != len(counts):
                given = len(settings.class_weights)
                raise ValueError(f"loss.class_weights has {given} numbers; expected {len(counts)}, one for each label")
            else:
                weights = torch.tensor(settings.class_weights)
        return LossOptions(weights, settings.focal_gamma, settings.label_smoothing)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = self.config.optimizer
        freeze(self.model, embeddings=options.freeze_embeddings, layers=options.freeze_layers)
        groups = layered_groups(self.model, options.weight_decay, options.layer_decay)
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)

    def _make_batcher(self, examples: Sequence[Example]) -> Batcher:
        resample = self.config.loss.resample == "balanced"
        return Batcher(self.task, examples, self.config.batch, seed=self.config.seed, resample=resample)

    def _lengths(self) -> tuple[int, int]:
        """Steps of the run, and of its warm-up; where rows are augmented, epochs of the rows as they are."""
        config = self.config
        if config.steps is not None:
            total = config.steps
        else:
            whole = math.ceil(config.epochs)
            counts = [math.ceil(len(self.batcher.epoch(epoch)) / config.batch.accumulation) for epoch in range(whole)]
            total = max(1, sum(counts[:-1]) + round(counts[-1] * (config.epochs - (whole - 1))))
        given = config.optimizer.warmup_steps
        warmup = round(given * total) if given < 1 else int(given)
        if warmup >= total > 1:
            raise ValueError(f"optimizer.warmup_steps is {warmup} of {total} steps; expected fewer than all of them")
        return total, min(warmup, total - 1)

    def steps(self) -> Iterator[tuple[float, list[list[Example]]]]:
        """The micro-batches of each step, and the epochs that are done after it."""
        size, epoch = self.config.batch.accumulation, 0
        while True:
            batcher = self.batcher
            if self.augmenter is not None:
                batcher = self._make_batcher(self.augmenter.examples(epoch))
            batches = batcher.epoch(epoch)
            for start in range(0, len(batches), size):
                yield epoch + min(start + size, len(batches)) / len(batches), batches[start : start + size]
            epoch += 1

    def train_step(self, batches: Sequence[Sequence[Example]]) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns the mean loss and the gradient's norm before clipping, on the device."""
        # Divided by the weight of the whole step: micro-batches give the gradient of one large batch.
        weight = max(sum(self.task.weight(examples, self.loss_options) for examples in batches), 1e-12)
        total = torch.zeros((), device=self.device)
        for examples in batches:
            batch = Batch.of(examples, self.device)
            with autocast(self.device, self.config.precision):
                logits = self.task.forward(self.model, batch)
            loss = self.task.loss(logits, examples, self.loss_options) / weight
            loss.backward()
            total += loss.detach()
            self.tokens += len(batch.input_ids)
        self.step += 1
        options = self.config.optimizer
        factor = lr_factor(self.step, self.warmup, self.total_steps, options.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * factor * group["lr_factor"]
        norm = clipped_step(self.optimizer, options.max_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return total, norm

    def evaluate(self, split: Split, examples: Sequence[Example]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics (with the mean loss) and predictions on `split`."""
        outputs = run_examples(
            self.model,
            self.task,
            examples,
            tokens_per_batch=self.config.batch.eval_tokens,
            precision=self.config.precision,
        )
        predictions = self.task.decode(outputs.arrays, examples, split.table, split.columns)
        return {"loss": outputs.loss, **self.task.evaluate(predictions, split.table, split.columns)}, predictions

    def _check_metric(self) -> None:
        """ValueError before the training, and not after it, where there is no such metric."""
        if self.config.metric is not None:
            dev = self.data.dev
            few = Split(dev.table.select(range(min(4, len(dev.table)))), dev.columns)
            score(self.task, self.config.metric, self.evaluate(few, self._encode(few, training=False))[0])

    def judge(self, log: RunLog, progress: Progress) -> bool:
        """Evaluate on dev and remember the best model; returns whether patience has run out."""
        metrics, _ = self.evaluate(self.data.dev, self.dev_examples)
        name, value, worth = score(self.task, self.config.metric, metrics)
        log.write("eval", self.step, {key: x for key, x in metrics.items() if isinstance(x, (int, float))})
        shown = "not defined" if value is None else f"{value:.4f}"
        loss = "" if metrics["loss"] is None else f", loss {metrics['loss']:.4f}"
        progress.say(f"step {self.step}: dev {name} {shown}{loss}")
        if self.best is None or worth > self.best["score"]:
            self.best = {"score": worth, "step": self.step}
            self.waited = 0
            if self.config.keep_best:
                state = self.model.state_dict()
                self.best_weights = {key: x.detach().to("cpu", copy=True) for key, x in state.items()}
        else:
            self.waited += 1
        return bool(self.config.patience) and self.waited >= self.config.patience

    def run(self) -> FinetuneResult:
        """Train, judge, and write the result. See `finetune`."""
        target = Path(self.config.output_dir)
        with result_folder(target, overwrite=self.config.overwrite) as folder:
            log = RunLog(folder, 0, tensorboard=False, report=self.report)
            progress = Progress(self.total_steps, 0, shown=self.config.progress)
            try:
                seconds, epochs, stopped = self._train(log, progress)
            finally:
                progress.close()
                log.close()
            if self.best_weights and self.best is not None and self.best["step"] != self.step:
                self.model.load_state_dict(self.best_weights)
            self.best_weights = {}
            self.model.eval()
            run = {
                "task": self.task.name,
                "steps": self.step,
                "epochs": round(epochs, 4),
                "best_step": self.best["step"] if self.best and self.config.keep_best else self.step,
                "stopped_early": stopped,
                "tokens": self.tokens,
                "seconds": round(seconds, 3),
                "tokens_per_second": round(self.tokens / seconds, 1) if seconds else None,
                "main_metric": self.config.metric or self.task.main_metric,
            }
            metrics = self._write(folder, run)
        return FinetuneResult(metrics, str(target), self.model, self.task)

    def _train(self, log: RunLog, progress: Progress) -> tuple[float, float, bool]:
        """Seconds of the training alone, epochs done, and whether patience ended it."""
        seconds, epochs, since = 0.0, 0.0, time.perf_counter()
        losses: list[Tensor] = []
        for epochs, batches in self.steps():
            loss, norm = self.train_step(batches)
            losses.append(loss)
            last = self.step == self.total_steps
            self.unfreezing.advance(epochs)
            if last or self.step % self.config.log_interval == 0:
                mean = float(torch.stack(losses).mean())
                losses = []
                if not math.isfinite(mean) or not math.isfinite(float(norm)):
                    raise TrainingDivergedError(
                        f"the loss is {mean} and the gradient norm {float(norm)} by step {self.step}; "
                        "lower optimizer.lr or lengthen the warm-up"
                    )
                spent = seconds + time.perf_counter() - since
                lr = max(group["lr"] for group in self.optimizer.param_groups)
                values = {"epoch": round(epochs, 4), "loss": mean, "lr": lr, "grad_norm": float(norm)}
                log.write(
                    "train", self.step, {**values, "tokens": self.tokens, "tokens_per_second": self.tokens / spent}
                )
                progress.show(mean, lr, self.tokens / spent)
            progress.advance(self.step)
            every = self.config.eval_steps
            if last or (self.step % every == 0 if every else epochs == int(epochs)):
                seconds += time.perf_counter() - since
                stop = self.judge(log, progress)
                since = time.perf_counter()
                if last or stop:
                    return seconds, epochs, stop and not last
        raise AssertionError("steps() has no end")

    def _write(self, folder: Path, run: dict[str, Any]) -> dict[str, Any]:
        dev, predictions = self.evaluate(self.data.dev, self.dev_examples)
        metrics = {"run": run, "dev": dev}
        if self.data.test is not None:
            examples = self._encode(self.data.test, training=False)
            metrics["test"], _ = self.evaluate(self.data.test, examples)
        write_json(folder / METRICS, metrics)
        write_json(folder / SETTINGS, asdict(self.config))
        with (folder / PREDICTIONS).open("w", encoding="utf-8") as file:
            table, columns = self.data.dev.table, self.data.dev.columns
            errors: Sequence[float | None] | None = self.task.errors(predictions, table, columns)
            errors = [None] * len(predictions) if errors is None else errors
            for row, (prediction, error) in enumerate(zip(predictions, errors, strict=True)):
                line = {"row": table.numbers[row], "input": table.row(row), "prediction": prediction, "error": error}
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        model: Any = self.model
        model.save_pretrained(folder)
        for path in (Path(self.config.model) / name for name in TOKENIZER_FILES):
            if path.is_file():
                shutil.copy(path, folder / path.name)
        if not (folder / "tokenizer.json").is_file():
            self.tokenizer.save(str(folder / "tokenizer.json"))
        if self.config.report:
            if package := missing_package():
                self.report(f"{REPORT} is not written: {package} is not installed (pip install 'bert_fast[finetune]')")
            else:
                write_report(folder)
        return metrics


def write_json(path: Path, values: Any) -> None:
    """JSON as the files of a result folder have it; what JSON does not know becomes text."""
    path.write_text(json.dumps(values, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def finetune(
    config: FinetuneConfig, model: nn.Module | None = None, report: Callable[[str], None] = print
) -> FinetuneResult:
    """Fine-tune a model on a task and write it to `config.output_dir`, which appears complete or not at all.

    The folder holds the model and the tokenizer as transformers loads them, with the labels and the task in
    config.json; metrics.json; predictions.dev.jsonl, each line with an `error` of 0 where the prediction is right;
    log.jsonl; finetune.json, the settings; and report.html.

    Args:
        config: the run.
        model: in place of one loaded from `config.model` (which names the tokenizer's folder): a transformers model of
            the task's class, fused by `bert_fast.fuse` or as it is, or one of ours. It is trained in place.
        report: takes the sentences that a user should read.

    Raises:
        ValueError: the settings, the rows and the model don't fit each other; the message says what and where.
        FileExistsError: output_dir is there and `config.overwrite` is False.
        TrainingDivergedError: the loss or the gradient is not finite.
    """
    target = Path(config.output_dir)
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"{target} is there already; choose another output_dir, or give --overwrite true")
    return Finetuner(config, model, report).run()
