"""The fine-tuning loop, over one task or several tasks on one encoder.

With several tasks, a task with n batches per epoch is sampled in proportion to n^(1/T): with temperature T = 1 in
proportion to its batches, with T = 2 to their square root, with T = infinity uniformly (Arivazhagan et al., "Massively
multilingual neural machine translation in the wild", 2019). The number of batches per epoch is exact, not random.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bert_fast._progress import ProgressBar
from bert_fast.finetune.models import share_encoder
from bert_fast.finetune.task_run import TaskRun
from bert_fast.optim.groups import Unfreezing, freeze, layered_groups
from bert_fast.optim.optimizer import clipped_step, lr_factor
from bert_fast.runtime.log import RunLog
from bert_fast.runtime.ranks import TrainingDivergedError
from bert_fast.tasks.task import Example

MicroBatch = tuple[int, list[Example]]  # the index of a task run, and examples of it
_ORDER = 21  # the random stream of the order of tasks


class Finetuner:
    """The state of a fine-tuning run between two steps.

    Args:
        task_runs: the tasks; several share the encoder of the first one's model. Optimizer, length, evaluation and
            seed come from the first one's settings.
        temperature: of the sampling of tasks.

    Raises:
        ValueError: the metric, the warm-up or the frozen layers don't fit the task or the model.
    """

    def __init__(self, task_runs: Sequence[TaskRun], temperature: float = 1.0) -> None:
        self.task_runs, self.config, self.device = list(task_runs), task_runs[0].config, task_runs[0].device
        self.temperature = temperature
        if len(task_runs) > 1:
            share_encoder([task_run.model for task_run in task_runs])
        for task_run in task_runs:
            task_run.model = task_run.model.to(self.device).train()
        self.models = nn.ModuleList(task_run.model for task_run in task_runs)
        self.optimizer = self._make_optimizer()
        self.unfreezing = Unfreezing(self.models, self.config.optimizer.unfreeze_epochs)
        self.unfreezing.advance(0.0)
        self.total_steps, self.warmup = self._lengths()
        for task_run in task_runs:
            task_run.check_metric()
        self.step, self.tokens = 0, 0
        self.best: dict[str, Any] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.evals_since_best = 0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = self.config.optimizer
        freeze(self.models, embeddings=options.freeze_embeddings, layers=options.freeze_layers)
        groups = layered_groups(self.models, options.weight_decay, options.layer_decay)
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)

    def _lengths(self) -> tuple[int, int]:
        """The steps of the run and of its warm-up; epochs are counted on the rows without augmentation."""
        config = self.config
        if config.steps is not None:
            total = config.steps
        else:
            epochs = math.ceil(config.epochs)
            batches = [
                sum(len(task_run.batcher.epoch(epoch)) for task_run in self.task_runs) for epoch in range(epochs)
            ]
            counts = [math.ceil(count / config.batch.accumulation) for count in batches]
            total = max(1, sum(counts[:-1]) + round(counts[-1] * (config.epochs - (epochs - 1))))
        warmup_steps = config.optimizer.warmup_steps
        warmup = round(warmup_steps * total) if warmup_steps < 1 else int(warmup_steps)
        if warmup >= total > 1:
            raise ValueError(f"optimizer.warmup_steps is {warmup} of {total} steps; expected fewer than all of them")
        return total, min(warmup, total - 1)

    def steps(self) -> Iterator[tuple[float, list[MicroBatch]]]:
        """The micro-batches of each step, and the number of epochs completed after it."""
        size = self.config.batch.accumulation
        for epoch, batches in enumerate(interleaved_batches(self.task_runs, self.config.seed, self.temperature)):
            for start in range(0, len(batches), size):
                yield epoch + min(start + size, len(batches)) / len(batches), batches[start : start + size]

    def train_step(self, batches: Sequence[MicroBatch]) -> tuple[dict[int, Tensor], Tensor]:
        """Take one optimizer step.

        The loss is the mean, over the micro-batches, of the mean loss of their task times the task's weight.

        Returns:
            The mean loss of each task in the step, and the gradient norm before clipping, on the device.
        """
        by_task: dict[int, list[list[Example]]] = {}
        for index, examples in batches:
            by_task.setdefault(index, []).append(examples)
        # Normalized over the whole step: micro-batches have the gradient of one large batch.
        weights = {index: self.task_runs[index].loss_weight(of_task) for index, of_task in by_task.items()}
        shares = {i: len(of_task) / len(batches) * self.task_runs[i].weight for i, of_task in by_task.items()}
        losses = {index: torch.zeros((), device=self.device) for index in by_task}
        for index, examples in batches:
            loss = self.task_runs[index].loss(examples) / weights[index]
            (loss * shares[index]).backward()
            losses[index] += loss.detach()
            self.tokens += sum(len(example.input_ids) for example in examples)
        self.step += 1
        options = self.config.optimizer
        factor = lr_factor(self.step, self.warmup, self.total_steps, options.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * factor * group["lr_factor"]
        norm = clipped_step(self.optimizer, options.max_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return losses, norm

    def evaluate(self, logs: Sequence[RunLog], progress: ProgressBar) -> bool:
        """Evaluate every task on its dev rows, keep the model if it is the best so far, and return whether to stop.

        With several tasks the mean of their metrics decides.
        """
        scores = []
        for task_run, log in zip(self.task_runs, logs, strict=True):
            metrics, _ = task_run.evaluate(task_run.data.dev, task_run.dev_examples)
            name, value, score = task_run.main_metric(metrics)
            log.write("eval", self.step, {key: x for key, x in metrics.items() if isinstance(x, (int, float))})
            shown = "undefined" if value is None else f"{value:.4f}"
            loss = "" if metrics["loss"] is None else f", loss {metrics['loss']:.4f}"
            progress.write(f"step {self.step}: {task_run.name + ' ' if task_run.name else ''}dev {name} {shown}{loss}")
            scores.append(score)
        score = sum(scores) / len(scores)
        if self.best is None or score > self.best["score"]:
            self.best = {"score": score, "step": self.step}
            self.evals_since_best = 0
            if self.config.keep_best:
                state = (*self.models.named_parameters(), *self.models.named_buffers())  # shared tensors once
                self.best_weights = {name: x.detach().to("cpu", copy=True) for name, x in state}
        else:
            self.evals_since_best += 1
        return bool(self.config.patience) and self.evals_since_best >= self.config.patience

    def run(self, folders: Sequence[Path]) -> dict[str, Any]:
        """Train and evaluate; leaves the models in eval mode, with the best weights if `keep_best` is set.

        Args:
            folders: one per task, for its log.jsonl.

        Returns:
            steps, epochs, best_step, stopped_early, tokens, seconds and tokens_per_second.
        """
        report = self.task_runs[0].report
        logs = [RunLog(folder, 0, tensorboard=False, report=report) for folder in folders]
        progress = ProgressBar(self.total_steps, shown=self.config.progress, unit="step")
        try:
            seconds, epochs, stopped = self._train(logs, progress)
        finally:
            progress.close()
            for log in logs:
                log.close()
        if self.best_weights and self.best is not None and self.best["step"] != self.step:
            self.models.load_state_dict(self.best_weights, strict=False)
        self.best_weights = {}
        self.models.eval()
        return {
            "steps": self.step,
            "epochs": round(epochs, 4),
            "best_step": self.best["step"] if self.best and self.config.keep_best else self.step,
            "stopped_early": stopped,
            "tokens": self.tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(self.tokens / seconds, 1) if seconds else None,
        }

    def _train(self, logs: Sequence[RunLog], progress: ProgressBar) -> tuple[float, float, bool]:
        """Train to the end; returns seconds without evaluation, epochs, and whether patience ended the run."""
        seconds, epochs, since = 0.0, 0.0, time.perf_counter()
        losses: list[list[Tensor]] = [[] for _ in self.task_runs]
        for epochs, batches in self.steps():
            step_losses, norm = self.train_step(batches)
            for index, loss in step_losses.items():
                losses[index].append(loss)
            last = self.step == self.total_steps
            self.unfreezing.advance(epochs)
            if last or self.step % self.config.log_interval == 0:
                elapsed = seconds + time.perf_counter() - since
                self._log(logs, progress, losses, float(norm), epochs, self.tokens / elapsed)
                losses = [[] for _ in self.task_runs]
            progress.update_to(self.step)
            interval = self.config.eval_steps
            if last or (self.step % interval == 0 if interval else epochs == int(epochs)):
                seconds += time.perf_counter() - since
                stop = self.evaluate(logs, progress)
                since = time.perf_counter()
                if last or stop:
                    return seconds, epochs, stop and not last
        raise AssertionError("steps() is infinite")

    def _log(
        self,
        logs: Sequence[RunLog],
        progress: ProgressBar,
        losses: Sequence[Sequence[Tensor]],
        norm: float,
        epochs: float,
        speed: float,
    ) -> None:
        """Write a line to the log of each task with a step since the last line."""
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        means = [float(torch.stack(list(of_task)).mean()) if of_task else None for of_task in losses]
        logged = [mean for mean in means if mean is not None]
        for value in logged:
            if not math.isfinite(value) or not math.isfinite(norm):
                raise TrainingDivergedError(
                    f"the loss is {value} and the gradient norm {norm} by step {self.step}; "
                    "lower optimizer.lr or raise optimizer.warmup_steps"
                )
        for log, loss in zip(logs, means, strict=True):
            if loss is not None:
                values = {"epoch": round(epochs, 4), "loss": loss, "lr": lr, "grad_norm": norm}
                log.write("train", self.step, {**values, "tokens": self.tokens, "tokens_per_second": speed})
        progress.show_training(sum(logged) / len(logged), lr, speed)


def batches_per_task(sizes: Sequence[int], temperature: float) -> list[int]:
    """How many batches of each task an epoch has; they sum to the sum of `sizes`.

    Args:
        sizes: the number of batches of each task.
        temperature: above 0; may be infinite.
    """
    weights = np.asarray(sizes, dtype=np.float64) ** (1.0 / temperature)
    exact = weights / weights.sum() * sum(sizes)
    counts = np.floor(exact + 1e-9).astype(np.int64)
    missing = sum(sizes) - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return [int(count) for count in counts]


def interleaved_batches(task_runs: Sequence[TaskRun], seed: int, temperature: float) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each epoch, with the index of their task; a pure function of the arguments.

    Each task iterates over its own epochs: a rarely sampled task resumes within its epoch in the next epoch of the run.
    One task alone has its own batches in their order.
    """
    streams = [_endless_batches(task_run) for task_run in task_runs]
    epoch = 0
    while True:
        if len(task_runs) == 1:
            yield [(0, batch) for batch in task_runs[0].batches(epoch)]
        else:
            counts = batches_per_task([len(task_run.batcher.epoch(epoch)) for task_run in task_runs], temperature)
            order = np.random.default_rng([seed, _ORDER, epoch]).permutation(np.repeat(range(len(task_runs)), counts))
            yield [(index, next(streams[index])) for index in order.tolist()]
        epoch += 1


def _endless_batches(task_run: TaskRun) -> Iterator[list[Example]]:
    epoch = 0
    while True:
        yield from task_run.batches(epoch)
        epoch += 1
