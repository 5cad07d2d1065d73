"""The loop of fine-tuning, over one task or over several on one encoder."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast._progress import ProgressBar
from bert_fast.finetune.mixing import mixed
from bert_fast.finetune.models import share_encoder
from bert_fast.finetune.task_run import Part
from bert_fast.optim.groups import Unfreezing, freeze, layered_groups
from bert_fast.optim.optimizer import clipped_step, lr_factor
from bert_fast.runtime.log import RunLog
from bert_fast.runtime.ranks import TrainingDivergedError
from bert_fast.tasks.task import Example

MicroBatch = tuple[int, list[Example]]  # the number of a part, and examples of it


class Finetuner:
    """A fine-tuning run: everything that it holds between two steps.

    Args:
        parts: the tasks; several of them share the encoder of the first one's model. Optimizer, length, evaluation and
            seed are those of the first one's configuration.
        temperature: see `bert_fast.finetune.mixing`.
    """

    def __init__(self, parts: Sequence[Part], temperature: float = 1.0) -> None:
        self.parts, self.config, self.device = list(parts), parts[0].config, parts[0].device
        self.temperature = temperature
        if len(parts) > 1:
            share_encoder([part.model for part in parts])
        for part in parts:
            part.model = part.model.to(self.device).train()
        self.models = nn.ModuleList(part.model for part in parts)
        self.optimizer = self._make_optimizer()
        self.unfreezing = Unfreezing(self.models, self.config.optimizer.unfreeze_epochs)
        self.unfreezing.advance(0.0)
        self.total_steps, self.warmup = self._lengths()
        for part in parts:
            part.check_metric()
        self.step, self.tokens = 0, 0
        self.best: dict[str, Any] | None = None
        self.best_weights: dict[str, Tensor] = {}
        self.waited = 0

    def _make_optimizer(self) -> torch.optim.Optimizer:
        options = self.config.optimizer
        freeze(self.models, embeddings=options.freeze_embeddings, layers=options.freeze_layers)
        groups = layered_groups(self.models, options.weight_decay, options.layer_decay)
        return torch.optim.AdamW(groups, lr=options.lr, betas=options.betas, eps=options.eps, fused=True)

    def _lengths(self) -> tuple[int, int]:
        """Steps of the run, and of its warm-up; where rows are augmented, epochs of the rows as they are."""
        config = self.config
        if config.steps is not None:
            total = config.steps
        else:
            whole = math.ceil(config.epochs)
            batches = [sum(len(part.batcher.epoch(epoch)) for part in self.parts) for epoch in range(whole)]
            counts = [math.ceil(count / config.batch.accumulation) for count in batches]
            total = max(1, sum(counts[:-1]) + round(counts[-1] * (config.epochs - (whole - 1))))
        given = config.optimizer.warmup_steps
        warmup = round(given * total) if given < 1 else int(given)
        if warmup >= total > 1:
            raise ValueError(f"optimizer.warmup_steps is {warmup} of {total} steps; expected fewer than all of them")
        return total, min(warmup, total - 1)

    def steps(self) -> Iterator[tuple[float, list[MicroBatch]]]:
        """The micro-batches of each step, and the epochs that are done after it."""
        size = self.config.batch.accumulation
        for epoch, batches in enumerate(mixed(self.parts, self.config.seed, self.temperature)):
            for start in range(0, len(batches), size):
                yield epoch + min(start + size, len(batches)) / len(batches), batches[start : start + size]

    def train_step(self, batches: Sequence[MicroBatch]) -> tuple[dict[int, Tensor], Tensor]:
        """One optimizer step; returns each part's mean loss and the gradient's norm before clipping, on the device.

        The loss is the mean over the micro-batches of their parts' mean losses, each times the part's weight.
        """
        by_part: dict[int, list[list[Example]]] = {}
        for number, examples in batches:
            by_part.setdefault(number, []).append(examples)
        # Divided by the weight of the whole step: micro-batches give the gradient of one large batch.
        weights = {number: self.parts[number].loss_weight(own) for number, own in by_part.items()}
        shares = {n: len(own) / len(batches) * self.parts[n].weight for n, own in by_part.items()}
        totals = {number: torch.zeros((), device=self.device) for number in by_part}
        for number, examples in batches:
            loss = self.parts[number].loss(examples) / weights[number]
            (loss * shares[number]).backward()
            totals[number] += loss.detach()
            self.tokens += sum(len(example.input_ids) for example in examples)
        self.step += 1
        options = self.config.optimizer
        factor = lr_factor(self.step, self.warmup, self.total_steps, options.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * factor * group["lr_factor"]
        norm = clipped_step(self.optimizer, options.max_grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        return totals, norm

    def judge(self, logs: Sequence[RunLog], progress: ProgressBar) -> bool:
        """Evaluate every part on its dev rows and remember the best model; returns whether patience has run out.

        Of several parts the mean of their metrics counts.
        """
        worths = []
        for part, log in zip(self.parts, logs, strict=True):
            metrics, _ = part.evaluate(part.data.dev, part.dev_examples)
            name, value, worth = part.score(metrics)
            log.write("eval", self.step, {key: x for key, x in metrics.items() if isinstance(x, (int, float))})
            shown = "not defined" if value is None else f"{value:.4f}"
            loss = "" if metrics["loss"] is None else f", loss {metrics['loss']:.4f}"
            progress.write(f"step {self.step}: {part.name + ' ' if part.name else ''}dev {name} {shown}{loss}")
            worths.append(worth)
        worth = sum(worths) / len(worths)
        if self.best is None or worth > self.best["score"]:
            self.best = {"score": worth, "step": self.step}
            self.waited = 0
            if self.config.keep_best:
                state = (*self.models.named_parameters(), *self.models.named_buffers())  # what is shared, once
                self.best_weights = {name: x.detach().to("cpu", copy=True) for name, x in state}
        else:
            self.waited += 1
        return bool(self.config.patience) and self.waited >= self.config.patience

    def run(self, folders: Sequence[Path]) -> dict[str, Any]:
        """Train and judge, and leave the models in eval mode, the best ones where those are kept.

        Args:
            folders: one for each part's log.jsonl.

        Returns:
            How the run went: steps, epochs, best_step, stopped_early, tokens, seconds, tokens_per_second.
        """
        report = self.parts[0].report
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
        """Seconds of the training alone, epochs done, and whether patience ended it."""
        seconds, epochs, since = 0.0, 0.0, time.perf_counter()
        losses: list[list[Tensor]] = [[] for _ in self.parts]
        for epochs, batches in self.steps():
            found, norm = self.train_step(batches)
            for number, loss in found.items():
                losses[number].append(loss)
            last = self.step == self.total_steps
            self.unfreezing.advance(epochs)
            if last or self.step % self.config.log_interval == 0:
                spent = seconds + time.perf_counter() - since
                self._log(logs, progress, losses, float(norm), epochs, self.tokens / spent)
                losses = [[] for _ in self.parts]
            progress.update_to(self.step)
            every = self.config.eval_steps
            if last or (self.step % every == 0 if every else epochs == int(epochs)):
                seconds += time.perf_counter() - since
                stop = self.judge(logs, progress)
                since = time.perf_counter()
                if last or stop:
                    return seconds, epochs, stop and not last
        raise AssertionError("steps() has no end")

    def _log(
        self,
        logs: Sequence[RunLog],
        progress: ProgressBar,
        losses: Sequence[Sequence[Tensor]],
        norm: float,
        epochs: float,
        speed: float,
    ) -> None:
        """A line in the log of each part that has had a step since the last one."""
        lr = max(group["lr"] for group in self.optimizer.param_groups)
        means = [float(torch.stack(list(own)).mean()) if own else None for own in losses]
        known = [mean for mean in means if mean is not None]
        for mean in known:
            if not math.isfinite(mean) or not math.isfinite(norm):
                raise TrainingDivergedError(
                    f"the loss is {mean} and the gradient norm {norm} by step {self.step}; "
                    "lower optimizer.lr or lengthen the warm-up"
                )
        for log, own in zip(logs, means, strict=True):
            if own is not None:
                values = {"epoch": round(epochs, 4), "loss": own, "lr": lr, "grad_norm": norm}
                log.write("train", self.step, {**values, "tokens": self.tokens, "tokens_per_second": speed})
        progress.show_training(sum(known) / len(known), lr, speed)
