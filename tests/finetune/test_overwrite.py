"""Nothing is lost: an old result, a trained model, a checkpoint, whatever refuses or ends a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from bert_fast import _io
from bert_fast._lock import OutputBusyError, exclusive
from bert_fast.finetune import FinetuneConfig, RunInterruptedError, finetune, multitask
from bert_fast.finetune import unfinished as unfinished_module
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.task_run import TaskRun
from bert_fast.finetune.unfinished import unfinished_folder


def quiet(_: str) -> None:
    pass


class TestOverwrite:
    """The old result is there until the new one is complete."""

    @pytest.fixture
    def config(self, toy: Any, tmp_path: Path) -> FinetuneConfig:
        finetune(toy.settings(tmp_path / "run", seed=1, steps=1), report=quiet)
        return toy.settings(tmp_path / "run", overwrite=True, steps=5)

    def test_it_survives_a_refusal_a_failure_and_an_interruption(
        self, config: FinetuneConfig, toy: Any, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        before = toy.content(tmp_path / "run")
        with pytest.raises(FileExistsError, match="run exists; choose another folder, or give --overwrite true"):
            finetune(replace(config, overwrite=False), report=quiet)
        with pytest.raises(ValueError, match="metric is 'f1'"):
            finetune(replace(config, metric="f1"), report=quiet)
        with monkeypatch.context() as patch:
            patch.setattr(TaskRun, "backward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                finetune(config, report=quiet)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        with toy.signal_at(Finetuner, "train_step", 3), pytest.raises(RunInterruptedError):
            finetune(config, report=quiet)
        assert toy.content(tmp_path / "run") == before
        finetune(config, report=quiet)
        finetune(toy.settings(tmp_path / "whole", steps=5), report=quiet)
        assert toy.content(tmp_path / "run") == toy.content(tmp_path / "whole") != before

    def test_a_folder_of_another_kind_is_not_replaced(self, config: FinetuneConfig, tmp_path: Path) -> None:
        thesis = tmp_path / "home" / "thesis.tex"
        thesis.parent.mkdir()
        thesis.write_text("years")
        for target in (thesis.parent, thesis):
            with pytest.raises(
                FileExistsError, match="holds no result of finetune or multitask, so --overwrite does not"
            ):
                finetune(replace(config, output_dir=str(target)), report=quiet)
        assert thesis.read_text() == "years"
        (tmp_path / "empty").mkdir()
        finetune(replace(config, output_dir=str(tmp_path / "empty")), report=quiet)

    def test_a_result_that_appears_during_the_run_is_kept_and_the_model_too(
        self, config: FinetuneConfig, toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        new = replace(config, output_dir=str(tmp_path / "new"), overwrite=False)
        write = TaskRun.write

        def meanwhile(self: TaskRun, folder: Path, run: Any) -> Any:
            (tmp_path / "new").mkdir(exist_ok=True)
            (tmp_path / "new" / "theirs").write_text("theirs")
            return write(self, folder, run)

        messages: list[str] = []
        with monkeypatch.context() as patch:
            patch.setattr(TaskRun, "write", meanwhile)
            with pytest.raises(FileExistsError, match="new exists"):
                finetune(new, report=messages.append)
        assert (tmp_path / "new" / "theirs").read_text() == "theirs"
        kept = unfinished_folder(new.output_dir) / "checkpoints" / "step-00000005"
        assert any(f"the trained model is kept in {kept}" in text for text in messages)
        finetune(toy.settings(tmp_path / "whole", steps=5), report=quiet)
        monkeypatch.setattr(Finetuner, "train_step", lambda *_: pytest.fail("it is trained already"))
        finetune(replace(new, output_dir=str(tmp_path / "third"), resume=str(kept)), report=quiet)
        assert toy.content(tmp_path / "third") == toy.content(tmp_path / "whole")
        changed = replace(new, output_dir=str(tmp_path / "fourth"), optimizer=replace(new.optimizer, lr=0.1))
        with pytest.raises(ValueError, match=r"belongs to another run \(optimizer.lr 0.003 -> 0.1\)"):
            finetune(replace(changed, resume=str(kept)), report=quiet)


def test_two_runs_in_one_folder(toy: Any, tmp_path: Path) -> None:
    for run, config in ((finetune, toy.settings(tmp_path / "run")), (multitask, toy.several(tmp_path / "run"))):
        with (
            exclusive(tmp_path / "run", what="fine-tuning run"),
            pytest.raises(
                OutputBusyError, match=r"another fine-tuning run \(host \S+, pid \d+, since .*\) is at work in"
            ),
        ):
            run(config, report=quiet)  # type: ignore[operator]
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with exclusive(tmp_path / "run"), pytest.raises(OutputBusyError):
        finetune(toy.settings(tmp_path / "link"), report=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"]


@pytest.mark.parametrize("where", ["checkpoint", "result"])
def test_a_full_disk(where: str, interrupted: FinetuneConfig, toy: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """One sentence; the last checkpoint and an old result are there, and the run goes on when there is space."""
    finetune(toy.settings(tmp_path / "whole"), report=quiet)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    config = replace(interrupted, overwrite=True)
    messages: list[str] = []
    with monkeypatch.context() as patch:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")

        if where == "checkpoint":
            patch.setattr(unfinished_module, "save_file", full)
        else:
            patch.setattr(_io, "fsync_tree", full)
        with pytest.raises(OSError, match=r"can't be written: the disk is full") as error:
            finetune(config, report=messages.append)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)
    assert toy.checkpoints_of(config) == ["step-00000006", "step-00000007"]
    assert toy.content(tmp_path / "run") == toy.content(tmp_path / "whole")
    finetune(config, report=quiet)
    assert toy.content(tmp_path / "run") == toy.content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_a_failing_report_is_a_warning(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    separators = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    rows = [json.loads(line) for line in (toy.base / "classification.jsonl").read_text().splitlines()]
    rows = [{**row, "text": f"{row['text']} {separators}", "id": "\ud800"} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": tmp_path / "rows.jsonl", "dev": tmp_path / "rows.jsonl"}
    messages: list[str] = []
    config = toy.settings(tmp_path / "run", data=data, report=True, steps=1)
    finetune(config, report=messages.append)
    lines = (tmp_path / "run" / "predictions.dev.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["input"] for line in lines[:-1]] == rows
    assert (tmp_path / "run" / "report.html").is_file()
    assert not any("warning" in text and "report.html" in text for text in messages)
    monkeypatch.setattr("bert_fast.finetune.task_run.write_report", lambda _: 1 / 0)
    result = finetune(replace(config, overwrite=True), report=messages.append)
    assert "warning: report.html is not written: ZeroDivisionError: division by zero" in messages
    assert (Path(result.folder) / "model.safetensors").is_file()


def test_a_limit_of_the_file_size(toy: Any, tmp_path: Path) -> None:
    """RLIMIT_FSIZE, which safetensors meets in Rust: one sentence, and the old result stays."""
    config = toy.settings(tmp_path / "run", overwrite=True, steps=2)
    finetune(replace(config, seed=1), report=quiet)
    before = toy.content(tmp_path / "run")
    (tmp_path / "run.yaml").write_text(json.dumps(asdict(config)))
    limit = (tmp_path / "run" / "model.safetensors").stat().st_size // 2
    code = f"""
import resource, sys
sys.dont_write_bytecode = True  # Python cuts a .pyc at the limit without an error
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from bert_fast.cli.main import main
sys.exit(main(["finetune", "--config", sys.argv[1]]))
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, str(tmp_path / "run.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("bert-fast finetune: error")]
    assert len(errors) == 1
    assert "run can't be written: the file would exceed the limit of this process (ulimit -f)" in errors[0]
    assert "Traceback" not in done.stderr
    assert toy.content(tmp_path / "run") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.yaml"]
