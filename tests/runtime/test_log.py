"""The run log: each step once, TensorBoard, Weights & Biases, a full disk."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bert_fast.cli.main import _one_line
from bert_fast.runtime.log import RunLog, read_log


def test_a_resumed_log_drops_later_steps_and_an_incomplete_line(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False, report=print)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": step / 3, "nsp_loss": float("nan")})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing a line
    log = RunLog(tmp_path, 2, tensorboard=False, report=print)
    log.write("train", 3, {"loss": 7.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1 / 3), (2, 2 / 3), (3, 7.0)]
    assert lines[0]["nsp_loss"] is None
    assert read_log(tmp_path / "absent.jsonl") == []


def test_damaged_lines_are_moved_and_the_lines_after_them_stay(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    good = [json.dumps({"step": step, "kind": "train", "loss": 1.0}).encode() for step in range(1, 6)]
    bad = [b"\xff\xfe", b'{"step": 2, "ki', b"[1]", b'{"step": "3", "kind": "train"}', b'{"step": 3}', b"[" * 100_000]
    lines = [good[0], bad[0], b"", good[1], bad[1], bad[2], "\u2028".encode(), good[2], *bad[3:], good[3], good[4]]
    path.write_bytes(b"\n".join(lines) + b'\n{"step": 6, "kind": "tr')
    messages: list[str] = []
    assert [line["step"] for line in read_log(path, messages.append)] == [1, 2, 3, 4, 5]
    assert messages == [f"{path} has damaged lines (2, 5, 6, ...; 7 in all), which are left out"]
    for _ in range(2):
        log = RunLog(tmp_path, 4, tensorboard=False, report=messages.append)
        log.close()
    assert path.read_bytes() == b"\n".join(good[:4]) + b"\n"
    assert messages[1:] == [
        f"{path} has damaged lines (2, 5, 6, ...; 7 in all), which are moved to {path.parent}/log.damaged"
    ]
    expected = [*bad[:3], "\u2028".encode(), *bad[3:]]
    assert (tmp_path / "log.damaged").read_bytes() == b"\n".join(expected) + b"\n"


LIMITED = """
import resource, sys
from pathlib import Path
from bert_fast.runtime.log import RunLog
log = RunLog(Path(sys.argv[1]), 0, tensorboard=sys.argv[2] == "True", report=print)
sys.dont_write_bytecode = True  # Python cuts a .pyc at the limit without an error
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    for step in range(1, 1000):
        log.write("train", step, {"loss": 1.0})
        log.sync()
except OSError as error:
    print(step, error)
log.close()
"""


@pytest.mark.parametrize("tensorboard", [False, True])
def test_a_limit_of_the_file_size_ends_with_a_sentence_and_a_log_that_resumes(
    tmp_path: Path, tensorboard: bool
) -> None:
    command = [sys.executable, "-c", LIMITED, str(tmp_path), str(tensorboard)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    *events, last = done.stdout.splitlines()
    assert len(events) == tensorboard
    assert all("TensorBoard events are no longer written: File too large" in text for text in events)
    step, _, message = last.partition(" ")
    assert "can't be written: the file would exceed the limit of this process (ulimit -f)" in message
    log = RunLog(tmp_path, int(step), tensorboard=False, report=pytest.fail)
    log.close()
    steps = [line["step"] for line in read_log(tmp_path / "log.jsonl")]
    assert steps == list(range(1, len(steps) + 1))
    assert int(step) - len(steps) in (0, 1)


def test_tensorboard_events_have_the_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    log = RunLog(tmp_path, 0, tensorboard=True, report=print)
    log.write("train", 5, {"loss": 1.25})
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 1.25)]


def test_without_tensorboard_the_log_works_and_reports_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    messages: list[str] = []
    log = RunLog(tmp_path, 0, tensorboard=True, report=messages.append)
    log.write("train", 1, {"loss": 1.0})
    log.close()
    assert len(messages) == 1
    assert "tensorboard is not installed (pip install 'bert_fast[cli]')" in messages[0]
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl")] == [1.0]


class FakeRun:
    """The part of a Weights & Biases run that the log uses."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str | None]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_the_lines_and_a_resumed_run_keeps_its_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[tuple[dict[str, Any], FakeRun]] = []

    def init(**settings: Any) -> FakeRun:
        runs.append((settings, FakeRun()))
        return runs[-1][1]

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    folder = tmp_path / "run"
    for step in (0, 2):
        log = RunLog(folder, step, tensorboard=False, report=print, wandb="project", settings={"lr": 1})
        log.write("train", step + 1, {"loss": 2.0})
        log.close()
    identity = runs[0][0]["id"]
    assert len(identity) == 16
    for settings, run in runs:
        assert settings == {"project": "project", "id": identity, "resume": "allow", "name": "run",
                            "dir": str(folder), "config": {"lr": 1}}  # fmt: skip
        assert run.metrics == [("step", None), ("*", "step")]
        assert run.finished
    assert [run.lines for _, run in runs] == [[{"step": 1, "train/loss": 2.0}], [{"step": 3, "train/loss": 2.0}]]


def test_without_wandb_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError) as caught:
        RunLog(tmp_path, 0, tensorboard=False, report=print, wandb="project")
    assert _one_line(caught.value) == ("wandb is not installed; this command needs it: pip install 'bert_fast[wandb]'")


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run", 0, tensorboard=False, report=print)
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (closed by the log)
    with pytest.raises(OSError, match=r"run/log\.jsonl can't be written: the disk is full"):
        log.write("train", 1, {"loss": 1.0})
    log.close()
