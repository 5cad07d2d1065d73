"""Failures of one rank or all ranks: checkpoints survive, and the message names the rank."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bert_fast._lock import exclusive
from bert_fast.pretrain.divergence import replay
from bert_fast.runtime import checkpoint

Start = Callable[..., Any]


def lines(folder: str) -> list[str]:
    """A run's log without measured times."""
    text = (Path(folder) / "log.jsonl").read_text().splitlines()
    measured = ("tokens_per_second", "tflops", "mfu")
    return [", ".join(part for part in line.split(", ") if not part.strip('{"').startswith(measured)) for line in text]


def test_killed_ranks_resume_with_bit_equal_losses(
    start_ranks: Start, settings: dict[str, Any], tmp_path: Path
) -> None:
    plain, killed = str(tmp_path / "plain"), str(tmp_path / "killed")
    config = {**settings, "accumulation": 3}  # with which the two ranks compute different numbers of micro-batches
    for folder, act in ((plain, None), (killed, {"rank": "all", "step": 5, "what": "kill"}), (killed, None)):
        job = start_ranks(2, config={**config, "output_dir": folder}, act=act)
        outputs = job.wait()
        if act:
            assert [process.exitcode for process in job.processes] == [-signal.SIGKILL] * 2
    assert "step-00000003 at step 3 of 6" in outputs[0]["messages"][0]
    assert lines(killed) == lines(plain)
    weights = [(Path(folder) / "final" / "model.safetensors").read_bytes() for folder in (killed, plain)]
    assert weights[0] == weights[1]


def test_a_run_killed_before_any_file_call_resumes_with_bit_equal_losses(
    start_ranks: Start, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A random choice of the calls, each in a run of its own; the same run is killed again and again at the end."""
    plain, killed = str(tmp_path / "plain"), str(tmp_path / "killed")
    config = {**settings, "steps": 4, "checkpoint_interval": 2, "eval_interval": 2, "keep_last": 1}
    (counted,) = start_ranks(1, config={**config, "output_dir": plain}, kill_before_file_call=0).wait()
    assert counted["error"] is None
    assert counted["file_calls"] > 60
    chosen = random.Random(0)
    for folder in [*(f"{killed}-{number}" for number in range(5)), *[killed] * 4]:
        number = chosen.randrange(counted["file_calls"]) + 1
        run = {**config, "output_dir": folder}
        job = start_ranks(1, config=run, kill_before_file_call=number)
        job.wait()
        if folder != killed:
            assert [process.exitcode for process in job.processes] == [-signal.SIGKILL], number
            assert start_ranks(1, config=run).wait()[0]["error"] is None, number
    assert start_ranks(1, config=run).wait()[0]["error"] is None
    for folder in (*(f"{killed}-{number}" for number in range(5)), killed):
        assert lines(folder) == lines(plain)
        names = [sorted(path.name for path in Path(each).rglob("*")) for each in (folder, plain)]
        assert names[0] == names[1], "nothing is left over, and nothing is missing"
        weights = [(Path(each) / "final" / "model.safetensors").read_bytes() for each in (folder, plain)]
        assert weights[0] == weights[1]


def test_a_killed_rank_ends_the_others_with_an_error_that_names_it(
    start_ranks: Start, settings: dict[str, Any]
) -> None:
    job = start_ranks(3, config={**settings, "timeout": 8.0}, act={"rank": 1, "step": 2, "what": "kill"})
    start = time.monotonic()
    outputs = job.wait(30)
    assert time.monotonic() - start < 25
    assert outputs[1] == {}
    for rank in (0, 2):
        assert outputs[rank]["error"].startswith(
            f"RankError: the run ended: rank 1 (process {job.processes[1].pid} on "
        )
        assert "has sent no heartbeat for" in outputs[rank]["error"]


def test_a_rank_that_hangs_ends_the_others_within_the_timeout(start_ranks: Start, settings: dict[str, Any]) -> None:
    job = start_ranks(2, config={**settings, "timeout": 8.0}, act={"rank": 1, "step": 2, "what": "stop"})
    job.processes[0].join(30)
    os.kill(job.processes[1].pid, signal.SIGKILL)
    outputs = job.wait()
    assert outputs[0]["error"].startswith("RankError: the run ended: rank 1 (process ")


def test_an_error_of_one_rank_is_reported_by_the_others(start_ranks: Start, settings: dict[str, Any]) -> None:
    outputs = start_ranks(2, config={**settings, "timeout": 8.0}, act={"rank": 1, "step": 2, "what": "fail"}).wait()
    assert outputs[1]["error"] == "ValueError: this rank has had enough"
    assert "failed: ValueError: this rank has had enough" in outputs[0]["error"]
    assert outputs[0]["error"].startswith("RankError: the run ended: rank 1 ")


def test_a_gradient_spoiled_on_one_rank_is_skipped_by_all(start_ranks: Start, settings: dict[str, Any]) -> None:
    act = {"rank": 1, "step": 3, "what": "poison"}
    outputs = start_ranks(2, config={**settings, "on_divergence": "skip"}, act=act).wait()
    assert [(rank["error"], rank["result"]["step"], rank["result"]["skipped"]) for rank in outputs] == [
        (None, 6, 1)
    ] * 2
    records = Path(settings["output_dir"]) / "diverged"
    assert [path.name for path in checkpoint.list_checkpoints(records)] == ["step-00000003"]
    # The recorded weights are those before the step, without the poison: their loss is finite.
    replayed = replay(records / "step-00000003", device="cpu")
    assert len(replayed.micro_losses) == settings["accumulation"]
    assert all(loss == loss for pair in replayed.micro_losses for loss in pair)


def test_a_full_disk_ends_every_rank_and_leaves_the_last_valid_checkpoint(
    start_ranks: Start, settings: dict[str, Any]
) -> None:
    outputs = start_ranks(2, config=settings, act={"rank": "all", "step": 4, "what": "full disk"}).wait()
    folder = Path(settings["output_dir"]) / "checkpoints"
    sentence = f"[Errno 28] {folder}/step-00000006 can't be written: the disk is full"
    advice = f"; the same command then resumes from {folder}/step-00000003"
    assert outputs[0]["error"] == f"OSError: {sentence}{advice}"
    assert outputs[1]["error"] == f"RankError: rank 0 failed: OSError: {sentence}"
    assert [path.name for path in folder.iterdir()] == ["step-00000003"]
    checkpoint.verify_folder(folder / "step-00000003")
    resumed = start_ranks(2, config=settings).wait()
    assert [rank["error"] for rank in resumed] == [None, None]
    assert resumed[0]["result"]["step"] == 6


def test_every_rank_is_refused_while_another_run_is_at_work(start_ranks: Start, settings: dict[str, Any]) -> None:
    folder = Path(settings["output_dir"])
    with exclusive(folder, inside=True):
        outputs = start_ranks(2, config={**settings, "timeout": 8.0}).wait()
    sentence = rf"OutputBusyError: another run \(host .*, pid {os.getpid()}, since .*\) is at work in {folder}"
    assert re.match(sentence, outputs[0]["error"])
    assert re.match(f"RankError: rank 0 failed: {sentence}", outputs[1]["error"])
    assert not folder.exists(), "nothing was written"
