"""A run that has not written its result yet: its checkpoints and logs, exact resume, and the end of the run.

    <output_dir>.unfinished/
        log.jsonl                        of several tasks NAME/log.jsonl
        checkpoints/step-00000500/
            weights.safetensors          the models' tensors, the best ones, losses not yet logged, random generators
            training_state.safetensors   the optimizer's tensors
            trainer_state.json           `Progress` and the settings
            manifest.json                size and SHA-256 of every other file

The folder is deleted when the result is in its place. On the CPU a run that was interrupted at any moment and resumed
gives the bits of an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from bert_fast import _io
from bert_fast._config import differences
from bert_fast._device import random_state, set_random_state
from bert_fast._progress import ProgressBar
from bert_fast.finetune.config import FinetuneConfig, MultitaskConfig
from bert_fast.finetune.loop import Finetuner, Progress
from bert_fast.models.storage import read_safetensors
from bert_fast.runtime import checkpoint
from bert_fast.runtime.log import LOG, RunLog
from bert_fast.runtime.ranks import stop_signals

_WEIGHTS = "weights.safetensors"
# Settings that don't change what a run computes.
NEUTRAL = (
    "output_dir", "resume", "overwrite", "progress", "report", "log_interval", "device",
    "checkpoint_interval", "checkpoint_minutes", "keep_last",
)  # fmt: skip
# Further ones that may change when a run resumes: where the same rows are; and, before the end of the training, the
# run's length and evaluation and the update.
_MOVABLE = ("data.train", "data.dev", "data.test")
_CHANGEABLE = (
    "epochs", "steps", "eval_steps", "patience", "metric", "keep_best", "batch.eval_tokens",
    "optimizer.lr", "optimizer.warmup_steps", "optimizer.decay", "optimizer.layer_decay", "optimizer.weight_decay",
    "optimizer.betas", "optimizer.eps", "optimizer.max_grad_norm",
)  # fmt: skip
_KINDS: dict[str, Any] = {
    "int": int, "float": (int, float), "bool": bool, "int | None": (int, type(None)),
    "float | None": (int, float, type(None)),
}  # fmt: skip


class RunInterruptedError(KeyboardInterrupt):
    """A signal ended the run early; its state is saved, and the same call resumes it.

    Attributes:
        signal: its number.
        step, total_steps: steps done, and steps of the run.
        checkpoint: the folder of the state.
    """

    def __init__(self, signal: int, step: int, total_steps: int, checkpoint: Path) -> None:
        super().__init__(f"stopped by signal {signal} after step {step} of {total_steps}; saved in {checkpoint}")
        self.signal, self.step, self.total_steps, self.checkpoint = signal, step, total_steps, checkpoint


class _StopRequestedError(Exception):
    """A signal was received."""


def unfinished_folder(output_dir: str | Path) -> Path:
    """The folder of the unfinished run of a result folder."""
    target = Path(os.path.realpath(output_dir))
    return target.with_name(f"{target.name}.unfinished")


def training_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{dotted name: (before, now)} of the settings that differ and change what a run computes."""
    now = json.loads(json.dumps(now, default=str))
    return {name: pair for name, pair in differences(before, now).items() if name not in NEUTRAL}


def unfinished_settings(output_dir: str | Path) -> dict[str, Any] | None:
    """The settings of the unfinished run of a result folder, as its newest checkpoint has them; None without one."""
    checkpoints = checkpoint.list_checkpoints(unfinished_folder(output_dir) / "checkpoints")
    return _read_state(checkpoints[-1])["config"] if checkpoints else None


class UnfinishedRun:
    """A run whose result is not written.

    Args:
        loop: before its first step.
        config: the settings of the run.
        report: called with each message for the user.
    """

    def __init__(
        self, loop: Finetuner, config: FinetuneConfig | MultitaskConfig, report: Callable[[str], None]
    ) -> None:
        self.loop, self.config, self.report = loop, config, report
        self.folder = unfinished_folder(config.output_dir)
        self.checkpoints = self.folder / "checkpoints"
        self._saved_step, self._saved_at = -1, time.monotonic()
        self._logs: list[RunLog] = []
        self._received_signal: Callable[[], int | None] = lambda: None

    def finish(self, write: Callable[[Path, Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """Train to the end, from a checkpoint if there is one, write the result folder and delete this one.

        Args:
            write: writes the result into a folder that holds the logs; its second argument is how the run went, as
                `Finetuner.finish` returns it.

        Returns:
            What `write` returned.

        Raises:
            RunInterruptedError: the first SIGTERM or SIGINT; a second one acts as usual.
        """
        loop = self.loop
        with ExitStack() as stack:
            stack.callback(self._delete_without_checkpoint)
            self._received_signal = stack.enter_context(stop_signals())
            self._resume()
            step = loop.progress.step
            for name in self._log_names():
                folder = (self.folder / name).parent
                evaluated = loop.progress.evaluated_step == step
                log = RunLog(folder, step, tensorboard=False, report=self.report, evaluated=evaluated)
                self._logs.append(log)
                stack.callback(log.close)
            bar = ProgressBar(loop.total_steps, done=step, shown=self.config.progress, unit="step")
            stack.callback(bar.close)
            for task_run in loop.task_runs:
                task_run.on_batch = self._stop_if_requested
            try:
                self._stop_if_requested()
                loop.train(self._logs, bar, self._between)
                bar.close()
                metrics = self._write_result(write)
            except _StopRequestedError:
                signal = self._received_signal()
                assert signal is not None
                raise RunInterruptedError(signal, loop.progress.step, loop.total_steps, self.save()) from None
            except BaseException:
                self._keep_trained_model()
                raise
        return metrics

    def _write_result(self, write: Callable[[Path, Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        run = self.loop.finish()
        with _io.atomic_folder(Path(self.config.output_dir), overwrite=self.config.overwrite) as result:
            for name in self._log_names():
                (result / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(self.folder / name, result / name)
            metrics = write(result, run)
        with suppress(OSError):  # a leftover is deleted by the next run
            checkpoint.delete(self.folder)
        return metrics

    def _keep_trained_model(self) -> None:
        """Save the state of a run that failed after its training: in the evaluation, or when it wrote the result."""
        if not self.loop.progress.finished:
            return
        with suppress(OSError, ValueError):
            path = self.save()
            self.report(
                f"the trained model is kept in {path}: the same command continues from there, as does one with another "
                "output_dir and resume set to that folder"
            )

    def _delete_without_checkpoint(self) -> None:
        if not checkpoint.list_checkpoints(self.checkpoints):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _log_names(self) -> list[str]:
        return [f"{task_run.name}/{LOG}" if task_run.name else LOG for task_run in self.loop.task_runs]

    def _stop_if_requested(self, _: int = 0) -> None:
        if self._received_signal() is not None:
            raise _StopRequestedError

    def _between(self) -> None:
        """Between two steps: stop if a signal was received, save if that is due."""
        self._stop_if_requested()
        loop, config = self.loop, self.config
        if loop.progress.finished or loop.evaluation_due:
            return
        by_step = config.checkpoint_interval and loop.progress.step % config.checkpoint_interval == 0
        by_time = config.checkpoint_minutes and time.monotonic() - self._saved_at >= 60 * config.checkpoint_minutes
        if by_step or by_time:
            self.save()

    def save(self) -> Path:
        """Write the checkpoint of this step, unless it exists, and delete those beyond `keep_last`."""
        loop, step = self.loop, self.loop.progress.step
        target = checkpoint.checkpoint_path(self.checkpoints, step)
        if self._saved_step == step and target.exists() and not loop.progress.finished:
            return target
        loop.check_finite()
        for log in self._logs:
            log.sync()
        state = {"progress": asdict(loop.progress), "config": asdict(self.config), "rows": rows_fingerprint(loop)}

        def fill(folder: Path) -> None:
            save_file(_tensors(loop), folder / _WEIGHTS)
            checkpoint.save_training_state(folder, loop.models, loop.optimizer, state)

        last = checkpoint.list_checkpoints(self.checkpoints)
        with _io.write_errors(target, f"; the same command then resumes from {last[-1]}" if last else ""):
            checkpoint.write_folder(target, fill)
        self._saved_step, self._saved_at = step, time.monotonic()
        checkpoint.prune(self.checkpoints, self.config.keep_last, [Path(os.path.realpath(self.config.resume))])
        return target

    def _resume(self) -> None:
        """Restore the state that `config.resume` says, if there is one."""
        loop = self.loop
        folder = self._own_continuation() or checkpoint.find_checkpoint(
            self.config.resume, self.checkpoints, self.report
        )
        if folder is None:
            return
        state = _read_state(folder)
        progress = Progress(**state["progress"])
        changed = self._check_resumable(folder, state)
        if progress.step > loop.total_steps:
            raise ValueError(
                f"nothing is left to train: {folder} is at step {progress.step} of {loop.total_steps}; set more epochs "
                f"or steps, choose another output_dir, or delete {self.folder} to start a new run"
            )
        _load_tensors(folder, loop)
        checkpoint.load_training_state(folder, loop.models, loop.optimizer)
        loop.progress = progress
        loop.unfreezing.advance(progress.epochs)
        progress.finished |= progress.step >= loop.total_steps and progress.evaluated_step == progress.step
        self._leave_other_branches(Path(os.path.realpath(folder)))
        self.report(f"resuming from {folder} at step {progress.step} of {loop.total_steps}")
        for name, (before, now) in changed.items():
            self.report(f"{name} is now {now!r}; the run started with {before!r}")

    def _own_continuation(self) -> Path | None:
        """The newest checkpoint, if the same command has gone on from the checkpoint that `config.resume` names."""
        if self.config.resume in ("auto", "never") or not checkpoint.list_checkpoints(self.checkpoints):
            return None
        newest = checkpoint.newest_valid(self.checkpoints, self.report)
        assert newest is not None
        before = _read_state(newest)["config"]
        same = before["resume"] == self.config.resume and not training_changes(before, asdict(self.config))
        return newest if same else None

    def _leave_other_branches(self, start: Path) -> None:
        """Move the checkpoints of other branches than that of `start` aside, with a copy of their logs."""
        inside = start.parent == self.checkpoints
        step = self.loop.progress.step
        aside = checkpoint.set_aside(self.checkpoints, step if inside else -1)
        for name in self._log_names():
            log, other = self.folder / name, start.parent.parent / name
            if aside is not None and log.is_file():
                (aside / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(log, aside / name)
            if not inside:  # the log of the run goes on, too
                log.unlink(missing_ok=True)
                if other.is_file():
                    log.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(other, log)
        if aside is not None:
            names = ", ".join(path.name for path in checkpoint.list_checkpoints(aside))
            self.report(f"checkpoints of another branch ({names}) and their log are now in {aside}")
        self._saved_step = step if inside else -1

    def _check_resumable(self, folder: Path, state: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        changed = training_changes(state["config"], asdict(self.config))
        allowed = _MOVABLE if state["progress"]["finished"] else _MOVABLE + _CHANGEABLE
        fixed = {name: pair for name, pair in changed.items() if re.sub(r"^tasks\.[^.]+\.", "", name) not in allowed}
        if fixed:
            listed = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in fixed.items())
            raise ValueError(
                f"the checkpoint {folder} belongs to another run ({listed}); restore these settings, choose another "
                f"output_dir, or delete {self.folder} to start a new run"
            )
        if state["rows"] != rows_fingerprint(self.loop):
            raise ValueError(
                f"the rows of train or dev are not those that {folder} was trained on; restore them, choose another "
                f"output_dir, or delete {self.folder} to start a new run"
            )
        return changed


def rows_fingerprint(loop: Finetuner) -> str:
    """A hash of the tokens and targets of all training and dev rows."""
    digest = hashlib.sha256()
    for task_run in loop.task_runs:
        for examples in (task_run.train_examples, task_run.dev_examples):
            digest.update(b"%d\n" % len(examples))
            for example in examples:
                digest.update(np.asarray(example.input_ids, dtype=np.int64).tobytes())
                digest.update(repr(example.target).encode())
    return digest.hexdigest()


def _read_state(folder: Path) -> dict[str, Any]:
    """The state in a checkpoint, of the schema that `UnfinishedRun.save` writes.

    Raises:
        ValueError: the folder is not the checkpoint of a fine-tuning run; the message names the file.
    """
    state = checkpoint.load_trainer_state(folder, {"progress": dict, "config": dict, "rows": str})
    kinds = {name: _KINDS[hint] for name, hint in Progress.__annotations__.items()}
    where = f"{folder / checkpoint.STATE}: progress"
    unknown = sorted(set(_io.check_fields(state["progress"], kinds, where)) - set(kinds))
    if unknown:
        raise ValueError(f"{where} has {', '.join(unknown)}; expected {', '.join(kinds)}")
    return state


def _tensors(loop: Finetuner) -> dict[str, Tensor]:
    """What weights.safetensors holds."""
    tensors = {f"model/{name}": x.detach() for name, x in loop.named_tensors()}
    tensors |= {f"best/{name}": x for name, x in loop.best_weights.items()}
    tensors |= {f"losses/{index}": torch.stack(losses) for index, losses in enumerate(loop.losses) if losses}
    tensors |= {f"random/{kind}": state for kind, state in random_state(loop.device).items()}
    # A copy of each: safetensors rejects tensors that share memory.
    return {name: x.to("cpu", copy=True).contiguous() for name, x in tensors.items()}


def _load_tensors(folder: Path, loop: Finetuner) -> None:
    """Restore what `_tensors` returned.

    Raises:
        ValueError: the checkpoint is of another model.
    """
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "losses": {}, "random": {}}
    for key, x in read_safetensors(folder / _WEIGHTS).items():
        group, _, name = key.partition("/")
        groups[group][name] = x
    own = dict(loop.named_tensors())
    shapes, stored = ({name: x.shape for name, x in tensors.items()} for tensors in (own, groups["model"]))
    if shapes != stored:
        names = sorted(name for name in {*shapes, *stored} if shapes.get(name) != stored.get(name))
        raise ValueError(f"{folder} is the checkpoint of another model: {', '.join(names[:3])} and others differ")
    with torch.no_grad():
        for name, x in own.items():
            x.copy_(groups["model"][name])
    loop.best_weights = groups["best"]
    for index, losses in groups["losses"].items():
        loop.losses[int(index)] = list(losses.to(loop.device).unbind())
    set_random_state(groups["random"], loop.device)
