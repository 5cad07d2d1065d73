"""The log of a run: one JSON object a line, and TensorBoard events beside it where the package is installed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
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
    """

    def __init__(self, output_dir: Path, step: int, *, tensorboard: bool, report: Callable[[str], None]) -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        self.path = output_dir / "log.jsonl"
        kept = [line for line in read_log(self.path) if line["step"] <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        temporary.replace(self.path)
        self._file = self.path.open("a")
        self._writer = _summary_writer(output_dir / "tensorboard", step, report) if tensorboard else None

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of `kind` "train" or "eval"; to TensorBoard too, as `<kind>/<name>`. NaN is written as null."""
        line = {name: None if value != value else value for name, value in values.items()}
        self._file.write(json.dumps({"step": step, "kind": kind, **line}) + "\n")
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{kind}/{name}", value, step)

    def sync(self) -> None:
        """Flush to the disk: a checkpoint that survives a crash has its lines too."""
        os.fsync(self._file.fileno())
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        self._file.close()
        if self._writer is not None:
            self._writer.close()


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


def _summary_writer(folder: Path, step: int, report: Callable[[str], None]) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        report("TensorBoard events are not written: tensorboard is not installed (pip install 'bert_fast[cli]')")
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)
