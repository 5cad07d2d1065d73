"""The pretraining loop: steps, evaluation, log, checkpoints, and going on exactly where a run stopped.

A step is the same on any number of ranks: the same examples, weighed alike, with dropout that depends on (seed, step,
micro-batch) alone. On the CPU a run that was killed at any moment and resumed on as many ranks has, bit for bit, the
losses of one that was not.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bert_fast.data import PackedBatch
from bert_fast.optim.params import make_optimizer, set_rate
from bert_fast.optim.schedule import lr_factor
from bert_fast.pretrain import replay
from bert_fast.pretrain.config import PretrainConfig, check_resumable
from bert_fast.pretrain.cuda_graph import Capture, GraphedStep, capture_on
from bert_fast.pretrain.guard import Guard, TrainingDivergedError, Verdict
from bert_fast.pretrain.metrics import FIELDS, Totals
from bert_fast.pretrain.micro_batches import Feed, Position, Prefetch, StepBatches, shaping
from bert_fast.pretrain.passes import dropout_states, held_out_totals
from bert_fast.pretrain.setup import RunData, build_model, open_data
from bert_fast.pretrain.step import Inputs, StepWork
from bert_fast.pretrain.throughput import Meter, gemm_ceiling
from bert_fast.runtime import checkpoint
from bert_fast.runtime.log import RunLog, SilentLog
from bert_fast.runtime.parallel import Parallel
from bert_fast.runtime.progress import Progress
from bert_fast.runtime.ranks import Ranks
from bert_fast.runtime.signals import stop_signals
from bert_fast.runtime.tracing import Tracer

SETTINGS = "pretrain.json"
_RECORDS_KEPT = 3  # of steps that diverged


@dataclass(frozen=True)
class PretrainResult:
    """How a run ended.

    Args:
        step: optimizer steps done, of `total_steps`.
        tokens: real tokens trained on, over all resumes and ranks.
        seconds: wall clock of this call's training steps, without evaluation and checkpoints.
        tokens_per_second: of this call, all ranks together.
        metrics: held-out results at the end: loss, mlm_loss, mlm_accuracy, nsp_loss, nsp_accuracy.
        model_dir: the final model in Hugging Face's format, or the last checkpoint of an interrupted run.
        interrupted: the signal that ended the run early, or None.
        skipped: updates that were left out because they diverged.
        rank: who tells it; what it says is the same on all of them.
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
    """A pretraining run: everything that a rank of `pretrain` holds between two steps.

    Args:
        config: the run.
        report: takes the sentences that a user should read, on rank 0.
        ranks: who trains together; this process alone where it is None.
        capture: how steps are recorded where `cuda_graph` is on; as CUDA graphs where it is None.
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
        # One rank reads every byte of the data and of the checkpoints; the others take its word.
        self.data: RunData = ranks.together(lambda: open_data(config.data, config.seed, checksums=ranks.main))
        shape = shaping(self.data.train, label_rows=config.masked_last_layer, static=config.static_shapes)
        self.feed = Feed(self.data.train, config.accumulation, ranks.rank, ranks.world, shape)
        self.total_steps = config.steps or max(1, self.data.count_batches(config.epochs or 0) // config.accumulation)
        self.warmup = config.warmup(self.total_steps)
        self.step, self.position, self.tokens, self.lr = 0, Position(0, 0), 0, 0.0
        self.best: dict[str, float] | None = None
        start = ranks.first(self._find_start)
        torch.manual_seed(config.seed)
        model = build_model(config, self.data, start).to(self.device).train()
        if config.recompute:
            model.gradient_checkpointing_enable()
        self.parallel = Parallel(model, config, ranks)
        self.model = self.parallel.model
        self.optimizer = make_optimizer(self.model, config.optimizer, capturable=config.cuda_graph)
        self.totals = Totals(self.device)
        self.guard = Guard(config.on_divergence, config.explosion, self.device)
        self.saved_step = -1
        if start is not None:
            self._resume(start)
        self.work = StepWork(
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
            self.graph = GraphedStep(self.work, self.model.config, config.seed, capture)
        self._prefetch: Prefetch | None = None
        self._settle_buckets()

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
        self.step, self.position = state["step"], Position(state["epoch"], state["batch"])
        self.tokens, self.best = state["tokens"], state["best"]
        self.totals = Totals(self.device, state["totals"])
        self.guard.restore(state["guard"])
        self.saved_step = self.step
        self.report(f"going on from {folder} at step {self.step} of {self.total_steps}")
        if state["ranks"] != self.ranks.world:
            self.report(f"ranks are now {self.ranks.world}; the checkpoint was written by {state['ranks']}")
        for name, (before, now) in changed.items():
            if name not in ("output_dir", "resume", "progress", "data.folder"):
                self.report(f"{name} is now {now!r}; the run started with {before!r}")

    def _settle_buckets(self) -> None:
        """One pass whose gradients are thrown away: DistributedDataParallel arranges its buckets after the first.

        With several ranks the order of a bucket decides how sums round; so a run that starts and one that goes on have
        the same from their first step.
        """
        if self.parallel.forward is self.model:
            return
        taken = self.feed.step(self.position)
        self._backward(taken, self._weights(taken))
        self.work.found.reset()
        self.optimizer.zero_grad(set_to_none=True)

    def train_step(self, meter: Meter | None = None) -> Tensor:
        """One optimizer step, counted by `meter`; returns the gradient's norm before clipping, on the device."""
        if self._prefetch is None:
            pin = self.device.type == "cuda"
            self._prefetch = Prefetch(self.feed, self.position, ahead=self.config.prefetch, pin=pin)
        taken = self._prefetch.next()
        weights = self._weights(taken)
        self.position = taken.end
        self.tokens += taken.tokens
        if meter is not None:
            meter.add(taken)
        if self.graph is None:
            self._backward(taken, weights)
            self.ranks.sum(self.work.found.sums)
            self._update(taken)
        else:
            self._begin_update()
            self.graph.run(taken, weights, self.step)
            self._end_update(taken)
        return self.work.judged[2]

    def _weights(self, taken: StepBatches) -> Tensor:
        """What the losses of this rank's micro-batches weigh: float32 (M, 2), on the device.

        By masked tokens and by pairs: micro-batches and ranks give the gradient of one large batch.
        """
        counts = taken.counts.to(self.device, non_blocking=True)
        return self.ranks.world * counts / self.ranks.sum(counts.sum(0)).clamp(min=1)

    def _backward(self, taken: StepBatches, weights: Tensor) -> None:
        """The gradient of the step's loss from this rank's micro-batches, and their sums."""
        batches = [micro.batch.to(self.device, non_blocking=True) for micro in taken.micro]
        for place, (micro, batch, weight) in enumerate(zip(taken.micro, batches, weights.unbind(), strict=True)):
            states = dropout_states(self.model.config, self.device, self.config.seed, self.step + 1, micro.number)
            with self.parallel.accumulating(last=place == len(batches) - 1):
                self.work.accumulate(Inputs(batch, weight, states))

    def _update(self, taken: StepBatches) -> None:
        self._begin_update()
        self.work.update()
        self._end_update(taken)

    def _begin_update(self) -> None:
        self.step += 1
        options = self.config.optimizer
        self.lr = options.lr * lr_factor(self.step, self.warmup, self.total_steps, options.decay)
        set_rate(self.optimizer, self.lr)

    def _end_update(self, taken: StepBatches) -> None:
        self.guard.note(self.step, taken.start, self.work.judged)
        self._hear()

    def _hear(self, *, all_steps: bool = False) -> None:
        """Act on what the guard has found: keep the batches, and stop where that is asked for or skipping goes on."""
        for verdict in self.guard.settled(all_steps=all_steps):
            if verdict.refused:
                self._diverged(verdict)

    def _diverged(self, verdict: Verdict) -> None:
        kept = self.output_dir / "diverged" / f"step-{verdict.step:08d}"

        def fill(folder: Path) -> None:
            self.parallel.save_pretrained(folder, main=self.ranks.main)
            if self.ranks.main:
                micro = self.feed.whole_step(verdict.start).micro
                replay.write_batch(folder, verdict, micro, self.config.seed, self.config.precision)

        checkpoint.write_folder(kept, fill, self.ranks)
        if self.ranks.main:
            checkpoint.prune(kept.parent, _RECORDS_KEPT)
        stopping = self.config.on_divergence == "stop"
        if stopping or self.guard.in_a_row >= self.config.max_skips:
            last = checkpoint.list_checkpoints(self.checkpoints)
            raise TrainingDivergedError(
                f"{verdict.reason} at step {verdict.step}"
                + ("" if stopping else f", the last of {self.guard.in_a_row} skipped in a row")
                + f"; lower optimizer.lr or lengthen the warm-up. The batch is in {kept}"
                + (f"; the last checkpoint from before is {last[-1]}" if last else "")
            )
        self.report(f"step {verdict.step} was skipped: {verdict.reason}; the batch is in {kept}")

    def evaluate(self) -> dict[str, float]:
        """Losses and accuracies on the held-out split, of which each rank computes a part."""
        count = self.data.count_held_out(self.config.eval_batches)
        rank, world = self.ranks.rank, self.ranks.world
        mine = range(rank, count, world)
        precision = self.config.precision
        totals = held_out_totals(self.model, (self._held_out_batch(i) for i in mine), self.device, precision)
        if self.parallel.sharded and len(mine) < -(-count // world):
            # The shards of the others' last pass are here.
            held_out_totals(self.model, [self._held_out_batch(0)], self.device, precision)
        self.ranks.sum(totals.sums)
        return totals.summary()

    def _held_out_batch(self, index: int) -> PackedBatch:
        batch = self.data.held_out.batch(0, index)
        return batch.with_label_rows() if self.config.masked_last_layer else batch

    def save(self) -> Path:
        """Write the checkpoint of this step, unless there is one, and remove those that are too old."""
        target = checkpoint.checkpoint_path(self.checkpoints, self.step)
        if self.saved_step == self.step and target.exists():
            return target
        self._hear(all_steps=True)
        state = {
            "step": self.step,
            "epoch": self.position.epoch,
            "batch": self.position.batch,
            "tokens": self.tokens,
            "totals": self.totals.tolist(),
            "guard": self.guard.state(),
            "best": self.best,
            "total_steps": self.total_steps,
            "ranks": self.ranks.world,
            "data_fingerprint": self.data.fingerprint,
            "config": asdict(self.config),
        }

        def fill(folder: Path) -> None:
            self._write_model(folder)
            checkpoint.save_training_state(folder, self.model, self.optimizer, state, self.ranks)

        self._write_folder(target, fill)
        self.saved_step = self.step
        if self.ranks.main:
            checkpoint.prune(self.checkpoints, self.config.keep_last, int(self.best["step"]) if self.best else None)
        return target

    def save_final(self) -> Path:
        """Write the model and its tokenizer alone, in Hugging Face's format."""
        target = self.output_dir / "final"
        self._write_folder(target, self._write_model)
        return target

    def _write_folder(self, target: Path, fill: Callable[[Path], None]) -> None:
        try:
            checkpoint.write_folder(target, fill, self.ranks)
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) != errno.ENOSPC and "No space left" not in str(error):
                raise
            last = checkpoint.list_checkpoints(self.checkpoints)
            raise OSError(
                errno.ENOSPC,
                f"the disk of {target.parent} is full, so {target.name} could not be written; make room and give the "
                "same command again" + (f": it goes on from {last[-1]}" if last else ""),
            ) from error

    def _write_model(self, folder: Path) -> None:
        self.parallel.save_pretrained(folder, main=self.ranks.main)
        if self.ranks.main:
            for path in self.data.tokenizer_files:
                shutil.copy(path, folder / path.name)

    def run(self) -> PretrainResult:
        """Train to the last step or to a signal. See `pretrain`."""
        config, main = self.config, self.ranks.main
        log: RunLog | SilentLog = SilentLog()
        if main:
            log = self._open_log()
        progress = Progress(self.total_steps, self.step, shown=config.progress and main)
        interrupted = None
        metrics: dict[str, float] = {}
        try:
            with stop_signals(repeated=self.ranks.launched) as stopped:
                meter = self._meter()
                tracer = Tracer(self.output_dir / "trace.json", config.trace if main else 0, self.device)
                while self.step < self.total_steps and interrupted is None:
                    norm = self.train_step(meter)
                    tracer.step()
                    interrupted = self.ranks.agreed(stopped())
                    if self.step % config.log_interval == 0 or self.step == self.total_steps:
                        self._log_step(log, progress, meter, norm)
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
            interrupted,
            self.guard.skipped,
            self.ranks.rank,
        )

    def _open_log(self) -> RunLog:
        """The log, and beside it the run's settings for whoever reads it."""
        config, settings = self.config, asdict(self.config)
        self.output_dir.mkdir(parents=True, exist_ok=True)
        temporary = self.output_dir / f".{SETTINGS}.tmp"
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
        temporary.replace(self.output_dir / SETTINGS)
        return RunLog(
            self.output_dir,
            self.step,
            tensorboard=config.tensorboard,
            report=self.report,
            wandb=config.wandb,
            settings=settings,
        )

    def _meter(self) -> Meter:
        config, ceiling = self.config, None
        if config.ceiling:
            ceiling = float(self.ranks.sum(gemm_ceiling(self.device, config.precision)))
            self.report(f"matrix products reach {ceiling / 1e12:.3g} TFLOP/s in {config.precision} here")
        return Meter(self.model.config, self.feed.pieces * config.data.token_budget, ceiling)

    def _log_step(self, log: RunLog | SilentLog, progress: Progress, meter: Meter, norm: Tensor) -> None:
        values = self.totals.summary()
        self._hear(all_steps=True)
        speed = meter.lap(self.totals.tolist()[FIELDS.index("mlm_count")])
        self.totals.reset()
        extra = {"lr": self.lr, "grad_norm": float(norm), "tokens": self.tokens, **speed}
        log.write("train", self.step, {"epoch": self.position.epoch, **values, **extra, "skipped": self.guard.skipped})
        progress.show(values["loss"], self.lr, speed["tokens_per_second"])

    def _housekeeping(self, log: RunLog | SilentLog, progress: Progress, stopping: bool) -> dict[str, float]:
        """Evaluate and save where this step is due; returns the evaluation's metrics, if there was one."""
        config, last = self.config, self.step == self.total_steps
        interval = config.checkpoint_interval
        due = last or stopping or bool(interval and self.step % interval == 0)
        metrics: dict[str, float] = {}
        if last or (not stopping and config.eval_interval and self.step % config.eval_interval == 0):
            metrics = self.evaluate()
            log.write("eval", self.step, metrics)
            progress.say(
                f"step {self.step}: held-out MLM loss {metrics['mlm_loss']:.3f}, MLM accuracy "
                f"{metrics['mlm_accuracy']:.1%}, NSP accuracy {metrics['nsp_accuracy']:.1%}"
            )
            if config.keep_best and interval and (self.best is None or metrics["loss"] < self.best["loss"]):
                self.best = {"step": self.step, "loss": metrics["loss"]}
                due = True
        if due:
            log.sync()
            self.save()
        return metrics


def pretrain(config: PretrainConfig, report: Callable[[str], None] = print) -> PretrainResult:
    """Pretrain a BERT on masked tokens and sentence pairs, from the start or from the last checkpoint in output_dir.

    Under torchrun all ranks call it and train together. The first SIGTERM or SIGINT that any of them gets ends the run
    after the current step (with several ranks, the next) with a checkpoint.

    Args:
        config: the run.
        report: takes the sentences that a user should read, on rank 0.

    Raises:
        ValueError: the settings contradict the data, the machine or the checkpoint to go on from.
        CorruptCheckpointError: there are checkpoints and none is good.
        TrainingDivergedError: the loss or the gradient is not finite, or explodes.
        RankError: another rank failed or is lost; the message names it.
        OSError: the disk is full; the last checkpoint is good.
    """
    with Ranks(config.device, config.timeout) as ranks:
        return Trainer(config, report, ranks).run()
