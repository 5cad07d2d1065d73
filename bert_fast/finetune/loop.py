"""The fine-tuning loop, over one task or several tasks on one encoder.

With several tasks, a task with n batches per epoch is sampled in proportion to n^(1/T): with temperature T = 1 in
proportion to its batches, with T = 2 to their square root, with T = infinity uniformly (Arivazhagan et al., "Massively
multilingual neural machine translation in the wild", 2019). The number of batches per epoch is exact, not random.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
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


@dataclass
class Progress:
    """How far a run is.

    The state of a run is this, the weights (also the best ones), the optimizer's tensors, the losses not yet logged and
    the state of the random generators.

    Attributes:
        step: optimizer steps done.
        epochs: epochs done, with a fraction.
        tokens: real tokens trained on.
        seconds: of the training steps, without evaluation and checkpoints, over all resumes.
        evaluated_step: the step of the last evaluation.
        best_step, best_score: of the best evaluation; None before the first.
        evals_since_best: evaluations since then.
        stopped_early: `patience` ended the training.
        finished: the training is over; the weights are those of the result.
    """

    step: int = 0
    epochs: float = 0.0
    tokens: int = 0
    seconds: float = 0.0
    evaluated_step: int = 0
    best_step: int | None = None
    best_score: float | None = None
    evals_since_best: int = 0
    stopped_early: bool = False
    finished: bool = False


class Finetuner:
    """A fine-tuning run between two steps.

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
        self.progress = Progress()
        self.best_weights: dict[str, Tensor] = {}
        self.losses: list[list[Tensor]] = [[] for _ in task_runs]  # of each task since its last line in the log
        self.grad_norm = torch.zeros(())  # of the last step, before clipping

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = self.config.optimizer
        for task in (task_run.task for task_run in self.task_runs):
            if options.unfreeze_epochs and task.model_class == "BertModel":
                raise ValueError(
                    f"optimizer.unfreeze_epochs is {options.unfreeze_epochs}; expected 0: {task.name} has no head to "
                    "train first"
                )
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
            losses[index] += self.task_runs[index].backward(examples, weights[index], shares[index])
            self.progress.tokens += sum(len(example.input_ids) for example in examples)
        self.progress.step += 1
        options = self.config.optimizer
        factor = lr_factor(self.progress.step, self.warmup, self.total_steps, options.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * factor * group["lr_factor"]
        norm = clipped_step(self.optimizer, options.max_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return losses, norm

    def train(self, logs: Sequence[RunLog], bar: ProgressBar, between: Callable[[], None]) -> None:
        """Train to the end, evaluating when it is due.

        Args:
            logs: of each task.
            bar: shows the steps.
            between: called after each step and each evaluation; may raise to stop the run.
        """
        steps = islice(self.steps(), self.progress.step, None)
        while not self.progress.finished:
            if self.evaluation_due:
                self.evaluate(logs, bar)
            else:
                self._step(*next(steps), logs, bar)
            between()

    @property
    def evaluation_due(self) -> bool:
        """Whether the next thing to do is an evaluation."""
        state, interval = self.progress, self.config.eval_steps
        if state.step == state.evaluated_step:
            return False
        due = state.step % interval == 0 if interval else state.epochs == int(state.epochs)
        return due or state.step >= self.total_steps

    def _step(self, epochs: float, batches: Sequence[MicroBatch], logs: Sequence[RunLog], bar: ProgressBar) -> None:
        """Take a step and log it if that is due."""
        state, since = self.progress, time.perf_counter()
        losses, self.grad_norm = self.train_step(batches)
        for index, loss in losses.items():
            self.losses[index].append(loss)
        state.epochs = epochs
        self.unfreezing.advance(epochs)
        due = state.step >= self.total_steps or state.step % self.config.log_interval == 0
        if due:
            self.check_finite()  # waits for the device
        state.seconds += time.perf_counter() - since
        if due:
            self._log(logs, bar)
        bar.update_to(state.step)

    def evaluate(self, logs: Sequence[RunLog], bar: ProgressBar) -> None:
        """Evaluate every task on its dev rows, keep the weights if they are the best so far, and decide on the end.

        With several tasks the mean of their metrics decides.
        """
        state, scores = self.progress, []
        evaluated = [task_run.evaluate(task_run.data.dev, task_run.dev_examples)[0] for task_run in self.task_runs]
        for task_run, metrics, log in zip(self.task_runs, evaluated, logs, strict=True):
            name, value, score = task_run.main_metric(metrics)
            log.write("eval", state.step, {key: x for key, x in metrics.items() if isinstance(x, (int, float))})
            shown = "undefined" if value is None else f"{value:.4f}"
            loss = "" if metrics["loss"] is None else f", loss {metrics['loss']:.4f}"
            bar.write(f"step {state.step}: {task_run.name + ' ' if task_run.name else ''}dev {name} {shown}{loss}")
            scores.append(score)
        score = sum(scores) / len(scores)
        if state.best_score is None or score > state.best_score:
            state.best_step, state.best_score, state.evals_since_best = state.step, score, 0
            if self.config.keep_best:
                self.best_weights = {name: x.detach().to("cpu", copy=True) for name, x in self.named_tensors()}
        else:
            state.evals_since_best += 1
        state.evaluated_step = state.step
        impatient = bool(self.config.patience) and state.evals_since_best >= self.config.patience
        state.finished = impatient or state.step >= self.total_steps
        state.stopped_early = impatient and state.step < self.total_steps
        if state.finished and any(self.losses):  # of the steps since the last line
            self.check_finite()
            self._log(logs, bar)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The parameters and buffers of the models; shared ones once."""
        yield from self.models.named_parameters()
        yield from self.models.named_buffers()

    def finish(self) -> dict[str, Any]:
        """End the training: the models are in eval mode, with the best weights if `keep_best` is set.

        Returns:
            steps, epochs, best_step, stopped_early, tokens, seconds and tokens_per_second.
        """
        state = self.progress
        if self.best_weights and state.best_step != state.step:
            with torch.no_grad():
                for name, x in self.named_tensors():
                    x.copy_(self.best_weights[name])
        self.best_weights = {}
        self.optimizer.state.clear()
        self.models.eval()
        return {
            "steps": state.step,
            "epochs": round(state.epochs, 4),
            "best_step": state.best_step if self.config.keep_best else state.step,
            "stopped_early": state.stopped_early,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "tokens_per_second": round(state.tokens / state.seconds, 1) if state.seconds else None,
        }

    def check_finite(self) -> None:
        """Raise TrainingDivergedError if a loss since the last log line or the last gradient norm is not finite."""
        norm = float(self.grad_norm)
        for loss in (float(torch.stack(losses).mean()) for losses in self.losses if losses):
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise TrainingDivergedError(
                    f"the loss is {loss} and the gradient norm {norm} by step {self.progress.step}; "
                    "lower optimizer.lr or raise optimizer.warmup_steps"
                )

    def _log(self, logs: Sequence[RunLog], bar: ProgressBar) -> None:
        """Write a line to the log of each task with a step since the last line."""
        state = self.progress
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        means = [float(torch.stack(losses).mean()) if losses else None for losses in self.losses]
        self.losses = [[] for _ in self.task_runs]
        logged = [mean for mean in means if mean is not None]
        speed = state.tokens / state.seconds
        for log, loss in zip(logs, means, strict=True):
            if loss is not None:
                values = {"epoch": round(state.epochs, 4), "loss": loss, "lr": lr, "grad_norm": float(self.grad_norm)}
                log.write("train", state.step, {**values, "tokens": state.tokens, "tokens_per_second": speed})
        bar.show_training(sum(logged) / len(logged), lr, speed)


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
