"""The log of a run: JSON lines, and optionally TensorBoard events and Weights & Biases."""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bert_fast import _io

LOG, DAMAGED = "log.jsonl", "log.damaged"


class RunLog:
    """Writes `<output_dir>/log.jsonl` and, if requested and installed, `<output_dir>/tensorboard/`.

    Args:
        output_dir: the folder of the run.
        step: the step that the run resumes from. Lines of later steps (of a run killed after its last checkpoint) and
            an incomplete last line are dropped, so that each step appears once. Damaged lines are moved to
            `<output_dir>/log.damaged`.
        tensorboard: write TensorBoard events too.
        report: called with a message if TensorBoard is requested and not installed, and if lines are damaged.
        wandb: the Weights & Biases project to log to as well; a resumed run has the same run id there.
        settings: the run's configuration for Weights & Biases.
        evaluated: whether the run has the evaluation of `step`; lines of it are dropped if not.

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
        evaluated: bool = True,
    ) -> None:
        _io.make_folder(output_dir)
        self.path = output_dir / LOG
        lines, damaged = _parse(self.path)
        if damaged:
            _keep_damaged(output_dir / DAMAGED, damaged)
            report(f"{_damage(self.path, damaged)} moved to {output_dir / DAMAGED}")
        kept = [x for x in lines if x["step"] < step or (x["step"] == step and (evaluated or x["kind"] != "eval"))]
        _io.write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        # Unbuffered: a full disk raises in `write`, and not again in `close`.
        self._file = self.path.open("ab", buffering=0)
        self._report = report
        self._writer = _summary_writer(output_dir / "tensorboard", step, report) if tensorboard else None
        self._wandb = _wandb_run(output_dir, wandb, dict(settings or {})) if wandb else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write a line of `kind` "train" or "eval", also to TensorBoard as `<kind>/<name>`. NaN is written as null."""
        line = {name: None if value != value else value for name, value in values.items()}
        with _io.write_errors(self.path):
            data = (json.dumps({"step": step, "kind": kind, **line}) + "\n").encode()
            while data:  # a full disk or a limit first shortens a write, and refuses the next
                data = data[self._file.write(data) :]

        def add_scalars(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(f"{kind}/{name}", value, step)

        self._write_events(add_scalars)
        if self._wandb is not None:
            self._wandb.log({"step": step, **{f"{kind}/{name}": value for name, value in values.items()}})

    def _write_events(self, write: Callable[[Any], None]) -> None:
        """Call `write` with TensorBoard's writer. After an error of the device no more events are written."""
        if self._writer is None:
            return
        try:
            write(self._writer)
        except OSError as error:
            self._writer = None
            self._report(f"TensorBoard events are no longer written: {error.strerror}; the log goes on in {self.path}")

    def sync(self) -> None:
        """Flush to disk: called before a checkpoint is written, so that the log has every line up to it."""
        with _io.write_errors(self.path):
            os.fsync(self._file.fileno())
        self._write_events(lambda writer: writer.flush())

    def close(self) -> None:
        """Close the file and the other writers."""
        self._file.close()
        self._write_events(lambda writer: writer.close())
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


def read_log(path: Path, report: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The lines of a log, without an incomplete last one; none if there is no file.

    Args:
        path: the log.
        report: called with a message if other lines are damaged, and left out therefore.
    """
    lines, damaged = _parse(path)
    if damaged and report is not None:
        report(f"{_damage(path, damaged)} left out")
    return lines


def _parse(path: Path) -> tuple[list[dict[str, Any]], list[tuple[int, bytes]]]:
    """The valid lines of a log, and number and bytes of the damaged ones; an incomplete last one is neither."""
    if not path.exists():
        return [], []
    *complete, last = path.read_bytes().split(b"\n")
    lines, damaged = [], []
    for number, data in enumerate([*complete, last], start=1):
        if not data.strip():
            continue
        try:
            line = _io.check_fields(json.loads(data.decode()), {"step": int, "kind": str}, "the line")
        except (ValueError, RecursionError):
            if number <= len(complete):
                damaged.append((number, data))
        else:
            lines.append(line)
    return lines, damaged


def _damage(path: Path, damaged: Sequence[tuple[int, bytes]]) -> str:
    numbers = ", ".join(str(number) for number, _ in damaged[:3]) + (", ..." if len(damaged) > 3 else "")
    return f"{path} has damaged lines ({numbers}; {len(damaged)} in all), which are"


def _keep_damaged(path: Path, damaged: Sequence[tuple[int, bytes]]) -> None:
    """Append damaged lines to `path`."""
    before = path.read_bytes() if path.exists() else b""
    with _io.atomic_file(path) as temporary:
        temporary.write_bytes(before + b"".join(data + b"\n" for _, data in damaged))


def _wandb_run(output_dir: Path, project: str, settings: dict[str, Any]) -> Any:
    import wandb

    # The id of the folder's first run: a resumed run continues it.
    path = output_dir / "wandb.id"
    if not path.exists():
        _io.write_text(path, uuid.uuid4().hex[:16])
    identity = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[\w-]{1,64}", identity, re.ASCII):
        raise ValueError(
            f"{path} has {identity!r}; expected a run id of Weights & Biases: delete it to start a new run"
        )
    run = wandb.init(
        project=project,
        id=identity,
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
