"""Sums that aggregate exactly, the unigram baseline, and a log without duplicates."""

from __future__ import annotations

import json
import math
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bert_fast.cli.main import _one_line
from bert_fast.pretrain.metrics import Totals, token_counts, unigram_loss
from bert_fast.runtime.log import RunLog, read_log

Batch = namedtuple("Batch", "labels")


def test_batches_weigh_by_what_they_count() -> None:
    totals = Totals("cpu")
    right, wrong = torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]])
    totals.add(torch.tensor(2.0), torch.tensor(1), torch.tensor(10), right, torch.tensor([0]))
    labels = torch.tensor([0, 0, -100])
    totals.add(torch.tensor(5.0), torch.tensor(20), torch.tensor(30), torch.cat([wrong, right, right]), labels)
    summary = totals.summary()
    assert summary["mlm_loss"] == (2.0 * 10 + 5.0 * 30) / 40
    assert summary["mlm_accuracy"] == 21 / 40
    assert summary["nsp_accuracy"] == 2 / 3
    assert summary["nsp_loss"] == pytest.approx((18 + 2 * math.log1p(math.exp(-18))) / 3, rel=1e-5)
    assert summary["loss"] == summary["mlm_loss"] + summary["nsp_loss"]
    assert Totals("cpu", json.loads(json.dumps(totals.tolist()))).summary() == summary


def test_nothing_counted_is_nan_and_does_not_poison_the_rest() -> None:
    totals = Totals("cpu")
    assert math.isnan(totals.summary()["loss"])
    totals.add(torch.tensor(float("nan")), torch.tensor(0), torch.tensor(0), torch.zeros(1, 2), torch.tensor([-100]))
    totals.add(torch.tensor(3.0), torch.tensor(0), torch.tensor(4), torch.zeros(1, 2), torch.tensor([-100]))
    summary = totals.summary()
    assert summary["mlm_loss"] == summary["loss"] == 3.0
    assert math.isnan(summary["nsp_accuracy"])


def test_unigram_loss_by_hand() -> None:
    counts = token_counts([Batch(torch.tensor([0, -100, 0, 1])), Batch(torch.tensor([0, -100]))], vocab_size=4)
    assert counts.tolist() == [3, 1, 0, 0]
    # (count + 1) / (4 + 4): 1/2, 1/4, 1/8, 1/8
    assert unigram_loss(counts, torch.tensor([0, 1, 3])) == pytest.approx((math.log(2) + math.log(4) + math.log(8)) / 3)
    uniform = torch.zeros(16, dtype=torch.int64)
    assert unigram_loss(uniform, torch.arange(16)) == pytest.approx(math.log(16))


def test_the_log_is_cut_back_to_the_step_of_the_checkpoint(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False, report=print)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": step / 3, "nsp_loss": float("nan")})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # killed in the middle of a line
    log = RunLog(tmp_path, 2, tensorboard=False, report=print)
    log.write("train", 3, {"loss": 7.0})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1 / 3), (2, 2 / 3), (3, 7.0)]
    assert lines[0]["nsp_loss"] is None
    assert read_log(tmp_path / "absent.jsonl") == []


def test_tensorboard_events_hold_the_values(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import event_accumulator

    log = RunLog(tmp_path, 0, tensorboard=True, report=print)
    log.write("train", 5, {"loss": 1.25})
    log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 1.25)]


def test_without_tensorboard_the_log_goes_on_and_says_so_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    said: list[str] = []
    log = RunLog(tmp_path, 0, tensorboard=True, report=said.append)
    log.write("train", 1, {"loss": 1.0})
    log.close()
    assert len(said) == 1
    assert "tensorboard is not installed (pip install 'bert_fast[cli]')" in said[0]
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl")] == [1.0]


class FakeRun:
    """What the log asks of a run of Weights & Biases."""

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


def test_weights_and_biases_gets_the_lines_and_a_resumed_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def test_without_weights_and_biases_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError) as caught:
        RunLog(tmp_path, 0, tensorboard=False, report=print, wandb="project")
    assert _one_line(caught.value) == ("wandb is not installed; this command needs it: pip install 'bert_fast[wandb]'")


def test_a_log_on_a_full_disk_says_which_file(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, tensorboard=False, report=print)
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115 (closed by the log)
    with pytest.raises(OSError, match=r"the log .*log\.jsonl can't be written: No space left on device"):
        log.write("train", 1, {"loss": 1.0})
    log.close()
