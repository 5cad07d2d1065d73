"""The log of a run: JSON lines, and optionally TensorBoard events and Weights & Biases."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bert_fast import _io

LOG = "log.jsonl"


class RunLog:
    """Writes `<output_dir>/log.jsonl` and, if requested and installed, `<output_dir>/tensorboard/`.

    Args:
        output_dir: the folder of the run.
        step: the step that the run resumes from. Lines of later steps (of a run killed after its last checkpoint) and
            an incomplete last line are dropped, so that each step appears once.
        tensorboard: write TensorBoard events too.
        report: called once with a message if TensorBoard is requested and not installed.
        wandb: the Weights & Biases project to log to as well; a resumed run has the same run id there.
        settings: the run's configuration for Weights & Biases.

    Raises:
        ImportError: `wandb` is given and the package is not installed.
        OSError: the file can't be written, for example on a full disk; the message names it.
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
        self.path = output_dir / LOG
        lines = [line for line in read_log(self.path) if line["step"] <= step]
        _io.write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))
        # Unbuffered: a full disk raises in `write`, and not again in `close`.
        self._file = self.path.open("ab", buffering=0)
        self._writer = _summary_writer(output_dir / "tensorboard", step, report) if tensorboard else None
        self._wandb = _wandb_run(output_dir, wandb, dict(settings or {})) if wandb else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write a line of `kind` "train" or "eval", also to TensorBoard as `<kind>/<name>`. NaN is written as null."""
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
        """Flush to disk: called before a checkpoint is written, so that the log has every line up to it."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Close the file and the other writers."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()


class SilentLog:
    """The log of a rank other than 0, which writes none."""

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Do nothing."""

    def sync(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without an incomplete last one; none if there is no file."""
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

    # The id of the folder's first run: a resumed run continues it.
    path = output_dir / "wandb.id"
    if not path.exists():
        _io.write_text(path, uuid.uuid4().hex[:16])
    run = wandb.init(
        project=project,
        id=path.read_text().strip(),
        resume="allow",
        name=output_dir.resolve().name,
        dir=str(output_dir),
        config=settings,
    )
    # Not wandb's own step, which can't decrease: a run that was killed resumes from an earlier step.
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
