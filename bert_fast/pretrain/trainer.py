"""The pretraining loop: steps, evaluation, log, checkpoints, exact resume.

A step is the same on any number of ranks: the same examples with the same weights, and dropout that is a function of
(seed, step, micro-batch). On the CPU a run that was killed at any moment and resumed on the same number of ranks has
the losses of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bert_fast import _io
from bert_fast._lock import exclusive
from bert_fast._progress import ProgressBar
from bert_fast.data import PackedBatch, copy_tokenizer
from bert_fast.models.config import longest_input
from bert_fast.optim.optimizer import lr_factor, make_optimizer, set_lr
from bert_fast.pretrain import resume
from bert_fast.pretrain.config import RECORDS, SETTINGS, PretrainConfig, check_resumable, listed
from bert_fast.pretrain.cuda_graph import Capture, GraphedStep, capture_on
from bert_fast.pretrain.divergence import Guard, Verdict, write_record
from bert_fast.pretrain.metrics import FIELDS, Meter, Totals, gemm_ceiling, held_out_totals
from bert_fast.pretrain.micro_batches import Feed, Position, Prefetch, StepBatches, batch_transform, dropout_states
from bert_fast.pretrain.setup import RunData, build_model, open_data
from bert_fast.pretrain.step import Inputs, TrainStep
from bert_fast.runtime import checkpoint
from bert_fast.runtime.log import RunLog, SilentLog
from bert_fast.runtime.parallel import Parallel
from bert_fast.runtime.ranks import Ranks, TrainingDivergedError, stop_signals
from bert_fast.runtime.tracing import Tracer

_RECORDS_KEPT = 3  # of steps that diverged


@dataclass(frozen=True)
class PretrainResult:
    """The result of `pretrain`, equal on all ranks except for `rank`.

    Args:
        step, total_steps: optimizer steps done, and steps of the run.
        tokens: real tokens trained on, over all resumes and ranks.
        seconds: wall-clock time of this call's training steps, without evaluation and checkpoints.
        tokens_per_second: of this call, on all ranks together.
        metrics: held-out results at the end: loss, mlm_loss, mlm_accuracy, nsp_loss, nsp_accuracy.
        model_dir: the final model in transformers' format, or the last checkpoint of an interrupted run.
        interrupted: the signal that ended the run early, or None.
        skipped: updates skipped because they diverged.
        rank: of this process.
    """

    step: int
    total_steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    metrics: dict[str, float]
    model_dir: str
    interrupted: int | None = None
    skipped: int = 0
    rank: int = 0


class Trainer:
    """A pretraining run on one rank.

    Args:
        config: the run.
        report: called with messages for the user, on rank 0.
        ranks: the ranks of the run; `Ranks(config.device, config.timeout)` if None.
        capture: captures the steps if `config.cuda_graph` is on; as CUDA graphs if None.
    """

    def __init__(
        self,
        config: PretrainConfig,
        report: Callable[[str], None] = print,
        ranks: Ranks | None = None,
        capture: Capture | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks = ranks or Ranks(config.device, config.timeout)
        if config.cuda_graph and capture is None:
            capture = capture_on(ranks, config.precision)
        self.report = report if ranks.main else lambda text: None
        self.output_dir = Path(config.output_dir)
        self.checkpoints = self.output_dir / "checkpoints"
        self.device = ranks.device
        # Rank 0 alone verifies every byte of the data and of the checkpoints.
        self.data: RunData = ranks.on_all_ranks(lambda: open_data(config.data, config.seed, checksums=ranks.main))
        transform = batch_transform(self.data.train, label_rows=config.masked_last_layer, static=config.static_shapes)
        self.feed = Feed(self.data.train, config.accumulation, ranks.rank, ranks.world_size, transform)
        self.total_steps = config.steps or max(1, self.data.count_batches(config.epochs or 0) // config.accumulation)
        self.warmup = config.warmup(self.total_steps)
        self.step, self.position, self.tokens, self.lr = 0, Position(0, 0), 0, 0.0
        self.best: dict[str, float] | None = None
        self.interrupted: int | None = None  # the signal
        self.evaluation_due = False  # at this step; a signal has ended the one that the interval demands
        self._received_signal: Callable[[], int | None] = lambda: None
        self.start = start = ranks.on_rank0(
            lambda: resume.find_checkpoint(config, self.checkpoints, self.report, restarted=ranks.restarted)
        )
        torch.manual_seed(config.seed)
        model = build_model(config, self.data, start).to(self.device).train()
        if config.recompute:
            model.gradient_checkpointing_enable()
        self.parallel = Parallel(
            model, ranks, strategy=config.parallel, gradient_communication=config.gradient_communication
        )
        self.model = self.parallel.model
        self.optimizer = make_optimizer(self.model, config.optimizer, capturable=config.cuda_graph)
        self.totals = Totals(self.device)
        self.guard = Guard(config.on_divergence, config.explosion, self.device)
        self.saved_step = -1
        if start is not None:
            self._resume(start)
        self.device_step = TrainStep(
            self.parallel.forward,
            self.optimizer,
            self.guard,
            self.totals,
            precision=config.precision,
            max_grad_norm=config.optimizer.max_grad_norm,
            keep_gradients=config.cuda_graph and (config.accumulation > 1 or config.optimizer.name == "lamb"),
        )
        self.graph: GraphedStep | None = None
        if config.cuda_graph:
            assert capture is not None
            self.graph = GraphedStep(self.device_step, self.model.config, config.seed, capture)
        self._prefetch: Prefetch | None = None
        self._warm_up_buckets()

    def _resume(self, start: Path) -> None:
        state = resume.load_state(start)
        changed = check_resumable(state["config"], asdict(self.config))
        if state["data_fingerprint"] != self.data.fingerprint:
            raise ValueError(
                f"{self.config.data.folder} is not the data that {start} was trained on; restore that data or choose "
                "another output_dir"
            )
        if state["step"] >= self.total_steps and changed:
            raise ValueError(
                f"nothing is left to train: {start} is at step {state['step']} of {self.total_steps}, and its run had "
                f"other settings ({listed(changed)}); restore them, set more steps, or choose another output_dir"
            )
        checkpoint.load_training_state(start, self.model, self.optimizer)
        self.step, self.position = state["step"], Position(state["epoch"], state["batch"])
        self.tokens, self.best = state["tokens"], state["best"]
        self.totals = Totals(self.device, state["totals"])
        self.guard.restore(state["guard"])
        self.saved_step = self.step
        self.evaluation_due = bool(state.get("evaluation_due"))
        self.report(f"resuming from {start} at step {self.step} of {self.total_steps}")
        if state["ranks"] != self.ranks.world_size:
            self.report(f"ranks are now {self.ranks.world_size}; the checkpoint was written by {state['ranks']}")
        for name, (before, now) in changed.items():
            self.report(f"{name} is now {now!r}; the run started with {before!r}")

        def leave_branch() -> bool:
            resume.leave_branch(start, self.step, self.checkpoints, self.report)
            return self.best is not None and self._checkpoint(int(self.best["step"])).is_dir()

        if not self.ranks.on_rank0(leave_branch):
            self.best = None

    def _checkpoint(self, step: int) -> Path:
        return checkpoint.checkpoint_path(self.checkpoints, step)

    def _warm_up_buckets(self) -> None:
        """Run a backward pass and discard its gradients: DistributedDataParallel rebuilds its buckets after the first.

        The order of parameters in the buckets decides how sums round. With this pass a new and a resumed run have the
        same buckets from their first step on.
        """
        if self.parallel.forward is self.model:
            return
        batches = self.feed.step(self.position)
        self._backward(batches, self._weights(batches))
        self.device_step.step_totals.reset()
        self.optimizer.zero_grad(set_to_none=True)

    def train_step(self, meter: Meter | None = None) -> Tensor:
        """Run one optimizer step and count it in `meter`; returns the gradient norm before clipping, on the device."""
        if self._prefetch is None:
            pin = self.device.type == "cuda"
            self._prefetch = Prefetch(self.feed, self.position, ahead=self.config.prefetch, pin=pin)
        batches = self._prefetch.next()
        weights = self._weights(batches)
        self.position = batches.end
        self.tokens += batches.tokens
        if meter is not None:
            meter.add(batches)
        if self.graph is None:
            self._backward(batches, weights)
            self.ranks.sum(self.device_step.step_totals.sums)
            self._update(batches)
        else:
            self._begin_update()
            self.graph.run(batches, weights, self.step)
            self._end_update(batches)
        return self.device_step.verdict[2]

    def _weights(self, batches: StepBatches) -> Tensor:
        """The weights of the losses of this rank's micro-batches, float32 (M, 2), on the device.

        Proportional to masked tokens and to pairs, so that the step has the gradient of one large batch.
        """
        counts = batches.counts.to(self.device, non_blocking=True)
        return self.ranks.world_size * counts / self.ranks.sum(counts.sum(0)).clamp(min=1)

    def _backward(self, batches: StepBatches, weights: Tensor) -> None:
        """Accumulate the gradients and sums of this rank's micro-batches."""
        on_device = [micro.batch.to(self.device, non_blocking=True) for micro in batches.micro]
        with self.device_step.one_cast(len(on_device)):
            for index, (micro, batch, weight) in enumerate(
                zip(batches.micro, on_device, weights.unbind(), strict=True)
            ):
                states = dropout_states(self.model.config, self.device, self.config.seed, self.step + 1, micro.number)
                with self.parallel.accumulating(last=index == len(on_device) - 1):
                    self.device_step.accumulate(Inputs(batch, weight, states))

    def _update(self, batches: StepBatches) -> None:
        self._begin_update()
        self.device_step.update()
        self._end_update(batches)

    def _begin_update(self) -> None:
        self.step += 1
        options = self.config.optimizer
        self.lr = options.lr * lr_factor(self.step, self.warmup, self.total_steps, options.decay)
        set_lr(self.optimizer, self.lr)

    def _end_update(self, batches: StepBatches) -> None:
        self.guard.enqueue(self.step, batches.start, self.device_step.verdict)
        self._handle_verdicts()

    def _handle_verdicts(self, *, all_steps: bool = False) -> None:
        """Record every step that the guard refused; raises TrainingDivergedError if the run must end."""
        for verdict in self.guard.drain(all_steps=all_steps):
            if verdict.refused:
                self._record_divergence(verdict)

    def _record_divergence(self, verdict: Verdict) -> None:
        record = self.output_dir / RECORDS / f"step-{verdict.step:08d}"

        def fill(folder: Path) -> None:
            self.parallel.save_pretrained(folder)
            if self.ranks.main:
                micro = self.feed.step_of_all_ranks(verdict.start).micro
                write_record(folder, verdict, micro, self.config.seed, self.config.precision)

        checkpoint.write_folder(record, fill, self.ranks)
        if self.ranks.main:
            # The newest ones, which need not be those of the highest steps.
            records = checkpoint.list_checkpoints(record.parent)
            records.sort(key=lambda path: (path == record, path.stat().st_mtime_ns))
            for old in records[:-_RECORDS_KEPT]:
                checkpoint.delete(old)
        stopping = self.config.on_divergence == "stop"
        if stopping or self.guard.in_a_row >= self.config.max_skips:
            checkpoints = checkpoint.list_checkpoints(self.checkpoints)
            raise TrainingDivergedError(
                f"{verdict.reason} at step {verdict.step}"
                + ("" if stopping else f", the last of {self.guard.in_a_row} skipped in a row")
                + f"; lower optimizer.lr or lengthen the warm-up. The batch is in {record}"
                + (f"; the last checkpoint before it is {checkpoints[-1]}" if checkpoints else "")
            )
        self.report(f"step {verdict.step} was skipped: {verdict.reason}; the batch is in {record}")

    def evaluate(self) -> dict[str, float]:
        """Losses and accuracies on the held-out split; the ranks share its batches. {} if a signal ends it."""
        count = self.data.count_held_out(self.config.eval_batches)
        rank, world_size, precision = self.ranks.rank, self.ranks.world_size, self.config.precision

        def batches() -> Iterator[PackedBatch]:
            for first in range(0, count, world_size):
                if self._stopping():
                    return
                if first + rank < count:
                    yield self._held_out_batch(first + rank)

        totals = held_out_totals(self.model, batches(), self.device, precision)
        if self.interrupted is not None:
            return {}
        if self.parallel.sharded and -count % world_size >= world_size - rank:
            # One batch fewer than other ranks, which need this rank's shards for their last forward pass.
            held_out_totals(self.model, [self._held_out_batch(0)], self.device, precision)
        self.ranks.sum(totals.sums)
        return totals.summary()

    def _stopping(self) -> bool:
        """Whether a signal ends the run. A collective: the ranks get the same answer, with several a call later."""
        if self.interrupted is None:
            self.interrupted = self.ranks.async_max(self._received_signal())
        return self.interrupted is not None

    def _held_out_batch(self, index: int) -> PackedBatch:
        batch = self.data.held_out.batch(0, index)
        return batch.with_label_rows() if self.config.masked_last_layer else batch

    def save(self) -> Path:
        """Write the checkpoint of this step, unless it exists, and delete those beyond `keep_last`."""
        target = self._checkpoint(self.step)
        if self.saved_step == self.step and target.exists():
            return target
        self._handle_verdicts(all_steps=True)
        state = {
            "step": self.step,
            "epoch": self.position.epoch,
            "batch": self.position.batch,
            "tokens": self.tokens,
            "totals": self.totals.tolist(),
            "guard": self.guard.state(),
            "best": self.best,
            "evaluation_due": self.evaluation_due,
            "total_steps": self.total_steps,
            "ranks": self.ranks.world_size,
            "data_fingerprint": self.data.fingerprint,
            "config": asdict(self.config),
        }

        def fill(folder: Path) -> None:
            self._write_model(folder)
            checkpoint.save_training_state(folder, self.model, self.optimizer, state, self.ranks)

        self._write_folder(target, fill)
        self.saved_step = self.step
        self._prune()
        return target

    def _prune(self) -> None:
        if self.ranks.main:
            best_step = int(self.best["step"]) if self.best else None
            kept = resume.kept(self.config, self.checkpoints, best_step)
            checkpoint.prune(self.checkpoints, self.config.keep_last, kept)

    def save_final(self) -> Path:
        """Write the model and its tokenizer, without training state, in transformers' format, unless they are there."""
        target, last = self.output_dir / "final", self._checkpoint(self.step)
        if not self.ranks.on_rank0(lambda: resume.is_current(target, last)):
            self._write_folder(target, self._write_model)
        return target

    def _write_folder(self, target: Path, fill: Callable[[Path], None]) -> None:
        checkpoints = checkpoint.list_checkpoints(self.checkpoints)
        advice = f"; the same command then resumes from {checkpoints[-1]}" if checkpoints else ""
        with _io.write_errors(target, advice):
            checkpoint.write_folder(target, fill, self.ranks)

    def _write_model(self, folder: Path) -> None:
        self.parallel.save_pretrained(folder)
        if self.ranks.main:
            copy_tokenizer(self.data.tokenizer, folder, model_max_length=longest_input(self.model.config))

    def run(self) -> PretrainResult:
        """Train to the last step or to a signal. See `pretrain`."""
        config, main = self.config, self.ranks.main
        log: RunLog | SilentLog = SilentLog()
        if main and (self.step < self.total_steps or self.evaluation_due):
            log = self._open_log()
        progress = ProgressBar(self.total_steps, done=self.step, unit="step", shown=config.progress and main)
        metrics: dict[str, float] = {}
        try:
            with stop_signals(repeated=self.ranks.launched) as self._received_signal:
                meter = self._meter()
                tracer = Tracer(self.output_dir / "trace.json", config.trace if main else 0, self.device)
                if self.evaluation_due:
                    metrics = self._evaluate_and_save(log, progress)
                while self.step < self.total_steps and not self._stopping():
                    norm = self.train_step(meter)
                    tracer.step()
                    if self.step % config.log_interval == 0 or self.step == self.total_steps:
                        self._log_step(log, progress, meter, norm)
                    progress.update_to(self.step)
                    with meter.paused():
                        metrics = self._evaluate_and_save(log, progress) or metrics
                if self.interrupted is None:
                    metrics = metrics or self.evaluate()
                folder = self.save_final() if self.interrupted is None else self.save()
                self._prune()  # a run that was killed after its last checkpoint has not
                log.sync()
        finally:
            if self._prefetch is not None:
                self._prefetch.close()
                self._prefetch = None
            progress.close()
            log.close()
        rate = meter.tokens / meter.seconds if meter.seconds else 0.0
        return PretrainResult(
            self.step,
            self.total_steps,
            self.tokens,
            meter.seconds,
            rate,
            metrics,
            str(folder),
            self.interrupted,
            self.guard.skipped,
            self.ranks.rank,
        )

    def _open_log(self) -> RunLog:
        """Write the run's settings and open its log."""
        config, settings = self.config, asdict(self.config)
        _io.write_json(self.output_dir / SETTINGS, settings)
        return RunLog(
            self.output_dir,
            self.step,
            tensorboard=config.tensorboard,
            report=self.report,
            wandb=config.wandb,
            settings=settings,
            evaluated=not self.evaluation_due,
        )

    def _meter(self) -> Meter:
        config, ceiling = self.config, None
        if config.ceiling:
            ceiling = float(self.ranks.sum(gemm_ceiling(self.device, config.precision)))
            self.report(f"matrix products reach {ceiling / 1e12:.3g} TFLOP/s in {config.precision} here")
        return Meter(self.model.config, self.feed.num_micro_batches * config.data.token_budget, ceiling)

    def _log_step(self, log: RunLog | SilentLog, progress: ProgressBar, meter: Meter, norm: Tensor) -> None:
        values = self.totals.summary()
        self._handle_verdicts(all_steps=True)
        speed = meter.lap(self.totals.tolist()[FIELDS.index("mlm_count")])
        self.totals.reset()
        extra = {"lr": self.lr, "grad_norm": float(norm), "tokens": self.tokens, **speed}
        log.write("train", self.step, {"epoch": self.position.epoch, **values, **extra, "skipped": self.guard.skipped})
        progress.show_training(values["loss"], self.lr, speed["tokens_per_second"])

    def _evaluate_and_save(self, log: RunLog | SilentLog, progress: ProgressBar) -> dict[str, float]:
        """Evaluate and save if due at this step; returns the metrics of the evaluation, or {}."""
        config, last, late = self.config, self.step == self.total_steps, self.evaluation_due
        interval = config.checkpoint_interval
        due = last or late or bool(interval and self.step % interval == 0)
        metrics: dict[str, float] = {}
        if last or late or (config.eval_interval and self.step % config.eval_interval == 0):
            metrics = self.evaluate()
            self.evaluation_due = not metrics
            if not metrics:
                return {}  # the loop ends, with a checkpoint of this step; the resumed run evaluates first
            self.saved_step = -1  # a checkpoint of this step has another state
            log.write("eval", self.step, metrics)
            progress.write(
                f"step {self.step}: held-out MLM loss {metrics['mlm_loss']:.3f}, MLM accuracy "
                f"{metrics['mlm_accuracy']:.1%}, NSP accuracy {metrics['nsp_accuracy']:.1%}"
            )
            loss = metrics["loss"]
            if config.keep_best and interval and loss == loss and (self.best is None or loss < self.best["loss"]):
                self.best = {"step": self.step, "loss": loss}
                due = True
        if due:
            log.sync()
            self.save()
        return metrics


def pretrain(config: PretrainConfig, report: Callable[[str], None] = print) -> PretrainResult:
    """Pretrain a BERT with masked-language modelling and next-sentence prediction, or resume from output_dir.

    Under torchrun every rank must call it. The first SIGTERM or SIGINT to any rank ends the run with a checkpoint after
    the current step (with several ranks, the next one), or within an evaluation, which the resumed run does first. One
    run at a time writes to an output_dir.

    Args:
        config: the run.
        report: called with messages for the user, on rank 0.

    Returns:
        How the run ended.

    Raises:
        ValueError: the configuration contradicts the data, the machine or the checkpoint to resume from; or the run has
            finished with other settings.
        OutputBusyError: another run is at work in output_dir.
        CorruptCheckpointError: every checkpoint is corrupt.
        TrainingDivergedError: the loss or the gradient is not finite, or the loss exploded.
        RankError: another rank failed or is lost; the message names it.
        OSError: the disk is full, a quota or a limit is reached; the last checkpoint is valid.
    """
    with Ranks(config.device, config.timeout) as ranks, ExitStack() as stack:
        lock = exclusive(Path(config.output_dir), what="run", inside=True)
        ranks.on_rank0(lambda: stack.enter_context(lock))
        return Trainer(config, report, ranks).run()
