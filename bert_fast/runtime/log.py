"""The log of a run: one JSON object a line, TensorBoard events beside it where the package is installed, and W&B."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


class RunLog:
    """Writes `<output_dir>/log.jsonl` and, when asked and possible, `<output_dir>/tensorboard/`.

    Args:
        output_dir: the folder of the run.
        step: what the run goes on from. Lines after it (of a run that was cut off after its last checkpoint) and a line
            cut off in the middle are dropped, so that each step appears once.
        tensorboard: write TensorBoard events too.
        report: called once with a sentence where TensorBoard is asked for and not installed.
        wandb: the project of Weights & Biases to write to as well; a run that goes on is the same run there.
        settings: what Weights & Biases shows of the run.

    Raises:
        ImportError: `wandb` is given and the package is not installed.
        OSError: the file can't be written, as on a full disk; the message names it.
    """

    def __init__(
        self,
        output_dir: Path,
        step: int,
        *,
        tensorboard: bool,
        report: Callable[[str], None],
        wandb: str | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / "log.jsonl"
        kept = [line for line in read_log(self.path) if line["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        # Unbuffered, so that a full disk is noticed by the write and not once more by the close.
        self._file = self.path.open("ab", buffering=0)
        self._writer = _summary_writer(output_dir / "tensorboard", step, report) if tensorboard else None
        self._wandb = _wandb_run(output_dir, wandb, dict(settings or {})) if wandb else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of `kind` "train" or "eval"; to TensorBoard too, as `<kind>/<name>`. NaN is written as null."""
        line = {name: None if value != value else value for name, value in values.items()}
        try:
            self._file.write((json.dumps({"step": step, "kind": kind, **line}) + "\n").encode())
        except OSError as error:
            raise OSError(error.errno, f"the log {self.path} can't be written: {error.strerror}") from error
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def sync(self) -> None:
        """Flush to the disk: a checkpoint that survives a crash has its lines too."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


class SilentLog:
    """The log of a rank that keeps none."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Nothing."""

    def sync(self) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that was cut off is left out, and an absent file has none."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def _wandb_run(output_dir: Path, project: str, settings: dict[str, Any]) -> Any:
    import wandb

    # One run for one folder: the name of what wrote it first stays with it.
    path = output_dir / "wandb.id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:16])
    run = wandb.init(
        project=project,
        id=path.read_text().strip(),
        resume="allow",
        name=output_dir.resolve().name,
        dir=str(output_dir),
        config=settings,
    )
    # The run's own count: after a crash it goes back to the last checkpoint's.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _summary_writer(folder: Path, step: int, report: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        report("TensorBoard events are not written: tensorboard is not installed (pip install 'bert_fast[cli]')")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
