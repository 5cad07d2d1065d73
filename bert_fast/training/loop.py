"""The pretraining loop: steps, evaluation, log, checkpoints, and going on exactly where a run stopped.

On the CPU a run that was killed at any moment and resumed has, bit for bit, the losses of one that was not: batches are
a pure function of (seed, epoch, index), dropout follows torch's generator, and a checkpoint holds all the rest.
"""

from __future__ import annotations

import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.training import checkpoint
from bert_fast.training.config import PretrainConfig, check_resumable
from bert_fast.training.log import RunLog
from bert_fast.training.metrics import Totals
from bert_fast.training.params import clipped_step, make_optimizer
from bert_fast.training.parts import RunData, build_model, open_data, resolve_device
from bert_fast.training.progress import Progress
from bert_fast.training.schedule import lr_factor


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is not finite; the last checkpoint is from before."""


@dataclass(frozen=True)
class PretrainResult:
    """How a run ended.

    Args:
        step: optimizer steps done, of `total_steps`.
        tokens: real tokens trained on, over all resumes.
        seconds: wall clock of this call's training steps, without evaluation and checkpoints.
        tokens_per_second: of this call.
        metrics: held-out results at the end: loss, mlm_loss, mlm_accuracy, nsp_loss, nsp_accuracy.
        model_dir: the final model in Hugging Face's format, or the last checkpoint of an interrupted run.
        interrupted: the signal that ended the run early, or None.
    """

    step: int
    total_steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    metrics: dict[str, float]
    model_dir: str
    interrupted: int | None = None


@contextmanager
def stop_signals() -> Iterator[Callable[[], int | None]]:
    """Within the block the first SIGTERM or SIGINT only sets what the yielded function returns; a second acts as ever.

    So a step is never cut in half. Outside the main thread, where handlers can't be set, it always returns None.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast on `device`, or nothing for fp32."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()


def forward(model: torch.nn.Module, batch: Any) -> Any:
    """The model's output for a PackedBatch."""
    return model(
        input_ids=batch.input_ids,
        token_type_ids=batch.token_type_ids,
        position_ids=batch.position_ids,
        cu_seqlens=batch.cu_seqlens,
        max_seqlen=batch.max_seqlen,
        labels=batch.labels,
        next_sentence_label=batch.next_sentence_label,
        output_logits=False,
    )


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Iterator[Any], device: torch.device, precision: str) -> dict[str, float]:
    """Losses and accuracies over `batches`, weighed by masked tokens and by sentence pairs."""
    training = model.training
    model.eval()
    totals = Totals(device)
    for batch in batches:
        batch = batch.to(device)
        with autocast(device, precision):
            out = forward(model, batch)
        totals.add(out.mlm_loss, out.mlm_correct, out.mlm_count, out.seq_relationship_logits, batch.next_sentence_label)
    model.train(training)
    return totals.summary()


class Trainer:
    """A pretraining run: everything that `pretrain` holds between two steps.

    Args:
        config: the run.
        report: takes the sentences that a user should read.
    """

    def __init__(self, config: PretrainConfig, report: Callable[[str], None] = print) -> None:
        self.config, self.report = config, report
        self.output_dir = Path(config.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.device = resolve_device(config.device)
        self.data: RunData = open_data(config.data, config.seed)
        self.total_steps = config.steps or max(1, self.data.count_batches(config.epochs or 0) // config.accumulation)
        self.warmup = config.warmup(self.total_steps)
        self.step, self.epoch, self.index, self.tokens = 0, 0, 0, 0
        start = self._find_start()
        torch.manual_seed(config.seed)
        self.model = build_model(config, self.data, start).to(self.device).train()
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.totals = Totals(self.device)
        self.saved_step = -1
        if start is not None:
            self._resume(start)

    def _find_start(self) -> Path | None:
        resume = self.config.resume
        if resume == "auto":
            return checkpoint.newest_good(self.checkpoints, self.report)
        if resume == "never":
            if checkpoint.list_checkpoints(self.checkpoints):
                raise ValueError(
                    f"{self.checkpoints} has checkpoints and resume is never; choose another output_dir, remove them, "
                    "or use resume=auto to go on"
                )
            return None
        if not Path(resume).is_dir():
            raise FileNotFoundError(f"resume is {resume!r}; expected auto, never or the folder of a checkpoint")
        checkpoint.verify_folder(Path(resume))
        return Path(resume)

    def _resume(self, folder: Path) -> None:
        state = checkpoint.load_trainer_state(folder)
        changed = check_resumable(state["config"], asdict(self.config))
        if state["data_fingerprint"] != self.data.fingerprint:
            raise ValueError(
                f"{self.config.data.folder} is not the data that {folder} was trained on; restore it or choose another "
                "output_dir"
            )
        checkpoint.load_training_state(folder, self.model, self.optimizer)
        self.step, self.epoch, self.index = state["step"], state["epoch"], state["index"]
        self.tokens = state["tokens"]
        self.totals = Totals(self.device, state["totals"])
        self.saved_step = self.step
        self.report(f"going on from {folder} at step {self.step} of {self.total_steps}")
        for name, (before, now) in changed.items():
            if name not in ("output_dir", "resume", "progress", "data.folder"):
                self.report(f"{name} is now {now!r}; the run started with {before!r}")

    def _next_batches(self) -> list[Any]:
        """The micro-batches of the next step, in order; epochs follow each other without a gap."""
        batches = []
        for _ in range(self.config.accumulation):
            batches.append(self.data.train.batch(self.epoch, self.index))
            self.index += 1
            if self.index >= self.data.train.num_batches(self.epoch):
                self.epoch, self.index = self.epoch + 1, 0
        return batches

    def train_step(self) -> Tensor:
        """One optimizer step; returns the gradient's norm before clipping, on the device."""
        batches = [batch.to(self.device) for batch in self._next_batches()]
        masked = [(batch.labels != -100).sum() for batch in batches]
        pairs = [(batch.next_sentence_label != -100).sum() for batch in batches]
        all_masked, all_pairs = (torch.stack(counts).sum().clamp(min=1) for counts in (masked, pairs))
        for batch, batch_masked, batch_pairs in zip(batches, masked, pairs, strict=True):
            with autocast(self.device, self.config.precision):
                out = forward(self.model, batch)
            # Weigh by masked tokens and by pairs: accumulated micro-batches give the gradient of one large batch.
            mlm_weight, nsp_weight = batch_masked / all_masked, batch_pairs / all_pairs
            loss = out.loss
            if len(batches) > 1:
                loss = mlm_weight * out.mlm_loss + nsp_weight * out.next_sentence_loss
            loss.backward()
            labels = batch.next_sentence_label
            self.totals.add(out.mlm_loss, out.mlm_correct, out.mlm_count, out.seq_relationship_logits, labels)
            self.tokens += len(batch.input_ids)
            if self.device.type == "cpu":
                self._check_finite(loss.detach(), "loss", self.step + 1)
        return self._update()

    def _update(self) -> Tensor:
        self.step += 1
        options = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * lr_factor(self.step, self.warmup, self.total_steps, options.decay)
        norm = clipped_step(self.optimizer, options.max_grad_norm)
        if self.device.type == "cpu":
            self._check_finite(norm, "gradient norm", self.step)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _check_finite(self, value: Tensor, name: str, step: int) -> None:
        if not bool(value.isfinite()):
            last = checkpoint.list_checkpoints(self.checkpoints)
            raise TrainingDivergedError(
                f"the {name} is {float(value)} at step {step}; lower optimizer.lr or lengthen the warm-up"
                + (f". The last checkpoint from before is {last[-1]}" if last else "")
            )

    def evaluate(self) -> dict[str, float]:
        """Losses and accuracies on the held-out split."""
        batches = self.data.held_out_batches(self.config.eval_batches)
        return evaluate(self.model, batches, self.device, self.config.precision)

    def save(self) -> Path:
        """Write the checkpoint of this step, unless there is one, and remove those that are too old."""
        target = checkpoint.checkpoint_path(self.checkpoints, self.step)
        if self.saved_step == self.step and target.exists():
            return target
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "index": self.index,
            "tokens": self.tokens,
            "totals": self.totals.tolist(),
            "total_steps": self.total_steps,
            "data_fingerprint": self.data.fingerprint,
            "config": asdict(self.config),
        }

        def fill(folder: Path) -> None:
            self._write_model(folder)
            checkpoint.save_training_state(folder, self.model, self.optimizer, state)

        checkpoint.write_folder(target, fill)
        self.saved_step = self.step
        checkpoint.prune(self.checkpoints, self.config.keep_last)
        return target

    def save_final(self) -> Path:
        """Write the model and its tokenizer alone, in Hugging Face's format."""
        target = self.output_dir / "final"
        checkpoint.write_folder(target, self._write_model)
        return target

    def _write_model(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        for path in self.data.tokenizer_files:
            shutil.copy(path, folder / path.name)

    def run(self) -> PretrainResult:
        """Train to the last step or to a signal. See `pretrain`."""
        log = RunLog(self.output_dir, self.step, tensorboard=self.config.tensorboard, report=self.report)
        progress = Progress(self.total_steps, self.step, shown=self.config.progress)
        first_tokens, seconds, interrupted = self.tokens, 0.0, None
        metrics: dict[str, float] = {}
        try:
            with stop_signals() as stopped:
                meter = _Meter(self.tokens)
                while self.step < self.total_steps and interrupted is None:
                    norm = self.train_step()
                    interrupted = stopped()
                    if self.step % self.config.log_interval == 0 or self.step == self.total_steps:
                        seconds += self._log_step(log, progress, meter, norm)
                    progress.advance(self.step)
                    with meter.paused():
                        metrics = self._housekeeping(log, progress, interrupted is not None) or metrics
                if interrupted is None:
                    metrics = metrics or self.evaluate()
                    folder = self.save_final()
                else:
                    folder = self.save()
                log.sync()
        finally:
            progress.close()
            log.close()
        tokens = self.tokens - first_tokens
        rate = tokens / seconds if seconds else 0.0
        return PretrainResult(
            self.step, self.total_steps, self.tokens, seconds, rate, metrics, str(folder), interrupted
        )

    def _log_step(self, log: RunLog, progress: Progress, meter: _Meter, norm: Tensor) -> float:
        values = self.totals.summary()
        self._check_finite(self.totals.sums.sum(), "loss", self.step)
        self._check_finite(norm, "gradient norm", self.step)
        self.totals = Totals(self.device)
        seconds, tokens = meter.lap(self.tokens)
        lr = self.optimizer.param_groups[0]["lr"]
        extra = {"lr": lr, "grad_norm": float(norm), "tokens": self.tokens, "tokens_per_second": tokens / seconds}
        log.write("train", self.step, {"epoch": self.epoch, **values, **extra})
        progress.show(values["loss"], lr, tokens / seconds)
        return seconds

    def _housekeeping(self, log: RunLog, progress: Progress, stopping: bool) -> dict[str, float]:
        """Evaluate and save where this step is due; returns the evaluation's metrics, if there was one."""
        config, last = self.config, self.step == self.total_steps
        metrics: dict[str, float] = {}
        if last or (not stopping and config.eval_interval and self.step % config.eval_interval == 0):
            metrics = self.evaluate()
            log.write("eval", self.step, metrics)
            progress.say(
                f"step {self.step}: held-out MLM loss {metrics['mlm_loss']:.3f}, MLM accuracy "
                f"{metrics['mlm_accuracy']:.1%}, NSP accuracy {metrics['nsp_accuracy']:.1%}"
            )
        if last or stopping or (config.checkpoint_interval and self.step % config.checkpoint_interval == 0):
            log.sync()
            self.save()
        return metrics


class _Meter:
    """Wall clock of training alone: what runs inside `paused` does not count."""

    def __init__(self, tokens: int) -> None:
        self._since, self._tokens = time.perf_counter(), tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._since += time.perf_counter() - start

    def lap(self, tokens: int) -> tuple[float, int]:
        """Seconds and tokens since the last lap."""
        now = time.perf_counter()
        result = max(now - self._since, 1e-9), tokens - self._tokens
        self._since, self._tokens = now, tokens
        return result


def pretrain(config: PretrainConfig, report: Callable[[str], None] = print) -> PretrainResult:
    """Pretrain a BERT on masked tokens and sentence pairs, from the start or from the last checkpoint in output_dir.

    The first SIGTERM or SIGINT ends the run after the current step with a checkpoint.

    Args:
        config: the run.
        report: takes the sentences that a user should read.

    Raises:
        ValueError: the settings contradict the data, the machine or the checkpoint to go on from.
        CorruptCheckpointError: there are checkpoints and none is good.
        TrainingDivergedError: the loss or the gradient is not finite.
    """
    return Trainer(config, report).run()
