"""Interrupted runs: a signal saves, and the same call resumes with the bits of an uninterrupted run."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert_fast.cli.main import main
from bert_fast.finetune import FinetuneConfig, RunInterruptedError, finetune, multitask
from bert_fast.finetune import unfinished as unfinished_module
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.unfinished import unfinished_folder
from bert_fast.runtime import checkpoint
from bert_fast.runtime.ranks import TrainingDivergedError
from bert_fast.tasks.classification import Classification
from bert_fast.tasks.task import TASKS


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("task", list(TASKS))
def test_an_interrupted_run_equals_an_uninterrupted_one(task: str, toy: Any, tmp_path: Path) -> None:
    """Signals after the first step, within the optimizer's schedule, and before an evaluation."""
    finetune(toy.settings(tmp_path / "whole", task), report=quiet)
    expected = toy.content(tmp_path / "whole")
    assert any(name.endswith("model.safetensors") for name in expected)
    config = toy.settings(tmp_path / "run", task)
    for step, number in ((1, signal.SIGTERM), (4, signal.SIGINT), (9, signal.SIGTERM)):
        done = checkpoint.list_checkpoints(unfinished_folder(tmp_path / "run") / "checkpoints")
        first = int(done[-1].name[5:]) if done else 0
        with toy.signal_at(Finetuner, "train_step", step - first, number), pytest.raises(RunInterruptedError) as error:
            finetune(config, report=quiet)
        assert (error.value.signal, error.value.step, error.value.total_steps) == (number, step, 10)
        assert error.value.checkpoint.is_dir()
        assert not (tmp_path / "run").exists()
    messages: list[str] = []
    finetune(config, report=messages.append)
    assert any(f"resuming from {error.value.checkpoint} at step 9 of 10" in text for text in messages)
    assert toy.content(tmp_path / "run") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_several_tasks_resume_too(toy: Any, tmp_path: Path) -> None:
    multitask(toy.several(tmp_path / "whole"), quiet)
    config = toy.several(tmp_path / "run")
    for steps in (3, 4):
        with toy.signal_at(Finetuner, "train_step", steps), pytest.raises(RunInterruptedError):
            multitask(config, quiet)
    multitask(config, quiet)
    assert toy.content(tmp_path / "run") == toy.content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_augmentation_accumulation_and_early_stopping_resume(toy: Any, tmp_path: Path) -> None:
    changes = {
        "augment": {"delete": 0.2, "mask": 0.1}, "batch": {"tokens": 20, "accumulation": 2, "bucket": 2},
        "steps": None, "epochs": 20, "eval_steps": 0, "patience": 2, "loss": {"resample": "balanced"},
    }  # fmt: skip
    whole = finetune(toy.settings(tmp_path / "whole", **changes), report=quiet)
    assert whole.metrics["run"]["stopped_early"]
    config = toy.settings(tmp_path / "run", **changes)
    with toy.signal_at(Finetuner, "train_step", 7), pytest.raises(RunInterruptedError):
        finetune(config, report=quiet)
    finetune(config, report=quiet)
    assert toy.content(tmp_path / "run") == toy.content(tmp_path / "whole")


@pytest.mark.parametrize("batch", range(1, 12))
def test_a_signal_within_an_evaluation(batch: int, toy: Any, tmp_path: Path) -> None:
    """During training and after it, of dev and of test: the evaluation is repeated, and the result is the same."""
    changes = {
        "batch": {"rows": 4, "eval_tokens": 50},
        "data": {**asdict(toy.settings(tmp_path).data), "test": toy.base / "classification.jsonl"},
    }
    whole = toy.settings(tmp_path / "whole", **changes, steps=5)
    counted = finetune(whole, report=quiet).metrics
    assert counted["test"]["accuracy"] == counted["dev"]["accuracy"]
    config = toy.settings(tmp_path / "run", **changes, steps=5)
    with toy.signal_at(Classification, "per_example", batch), pytest.raises(RunInterruptedError) as error:
        finetune(config, report=quiet)
    assert error.value.step in (0, 4, 5)
    finetune(config, report=quiet)
    assert toy.content(tmp_path / "run") == toy.content(tmp_path / "whole")


def test_checkpoints_by_steps_and_by_minutes(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write_folder = checkpoint.write_folder

    def counted(target: Path, *arguments: Any) -> None:
        written.append(int(target.name[5:]))
        write_folder(target, *arguments)
        assert len(checkpoint.list_checkpoints(target.parent)) <= 3, "two are kept"

    monkeypatch.setattr(checkpoint, "write_folder", counted)
    finetune(toy.settings(tmp_path / "steps", checkpoint_interval=2), report=quiet)
    assert written == [2, 4, 6, 8]
    written.clear()
    clock = [0.0]
    monkeypatch.setattr(unfinished_module.time, "monotonic", lambda: clock[0])
    train_step = Finetuner.train_step

    def slow_step(self: Finetuner, batches: Any) -> Any:
        clock[0] += 25.0
        return train_step(self, batches)

    monkeypatch.setattr(Finetuner, "train_step", slow_step)
    finetune(toy.settings(tmp_path / "minutes", checkpoint_minutes=1), report=quiet)
    assert written == [3, 6, 9]
    written.clear()
    finetune(toy.settings(tmp_path / "never", checkpoint_minutes=0), report=quiet)
    assert written == []
    assert toy.content(tmp_path / "steps") == toy.content(tmp_path / "minutes") == toy.content(tmp_path / "never")


def test_a_corrupt_checkpoint_is_skipped(interrupted: FinetuneConfig, toy: Any, tmp_path: Path) -> None:
    finetune(toy.settings(tmp_path / "whole"), report=quiet)
    weights = unfinished_folder(interrupted.output_dir) / "checkpoints" / "step-00000007" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    messages: list[str] = []
    finetune(interrupted, report=messages.append)
    assert any("weights.safetensors is corrupt" in text for text in messages)
    assert any("at step 6 of 10" in text for text in messages)
    assert toy.content(tmp_path / "run") == toy.content(tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"belongs to another run \(seed 0 -> 1\); restore these settings, choose another output_dir, or"),
        ({"batch": {"rows": 5}}, r"belongs to another run \(batch.rows 4 -> 5\)"),
        ({"optimizer": {"freeze_layers": 1}}, r"belongs to another run \(optimizer.freeze_layers 0 -> 1"),
        ({"resume": "never"}, "has checkpoints and resume is never"),
        ({"resume": "absent"}, "resume is 'absent'; expected auto, never or the folder of a checkpoint"),
        ({"resume": "{base}"}, "manifest.json is missing"),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_another_run_is_refused_and_the_unfinished_one_kept(
    changes: dict[str, Any], message: str, interrupted: FinetuneConfig, toy: Any, tmp_path: Path
) -> None:
    changes = {name: str(toy.base) if value == "{base}" else value for name, value in changes.items()}
    with pytest.raises((ValueError, OSError), match=message):
        finetune(toy.settings(tmp_path / "run", checkpoint_interval=3, **changes), report=quiet)
    assert toy.checkpoints_of(interrupted) == ["step-00000006", "step-00000007"]
    finetune(interrupted, report=quiet)


def test_other_rows_are_refused_and_moved_ones_are_not(interrupted: FinetuneConfig, toy: Any, tmp_path: Path) -> None:
    text = (toy.base / "classification.jsonl").read_text()
    for name, content_of in (("same", text), ("other", text.replace("good", "bad", 1))):
        (tmp_path / f"{name}.jsonl").write_text(content_of)
    data = {"train": tmp_path / "other.jsonl", "dev": toy.base / "classification.jsonl"}
    with pytest.raises(ValueError, match=r"the rows of train or dev are not those that .*step-00000007 was trained on"):
        finetune(toy.settings(tmp_path / "run", data=data), report=quiet)
    messages: list[str] = []
    data = {**data, "train": tmp_path / "same.jsonl"}
    optimizer = {"lr": 1e-3, "unfreeze_epochs": 0.5}
    result = finetune(toy.settings(tmp_path / "run", data=data, steps=12, optimizer=optimizer), report=messages.append)
    assert result.metrics["run"]["steps"] == 12
    assert "optimizer.lr is now 0.001; the run started with 0.003" in messages
    assert "steps is now 12; the run started with 10" in messages


def test_a_run_that_is_past_its_new_end_is_refused(interrupted: FinetuneConfig, toy: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing is left to train: .*step-00000007 is at step 7 of 5; set more"):
        finetune(toy.settings(tmp_path / "run", steps=5), report=quiet)
    assert not (tmp_path / "run").exists()
    assert toy.checkpoints_of(interrupted) == ["step-00000006", "step-00000007"]


def test_a_run_goes_on_from_a_named_checkpoint(interrupted: FinetuneConfig, toy: Any, tmp_path: Path) -> None:
    """Of its own, then later ones are set aside; or of another folder, whose log goes on."""
    finetune(toy.settings(tmp_path / "whole"), report=quiet)
    named = unfinished_folder(interrupted.output_dir) / "checkpoints" / "step-00000006"
    other = replace(interrupted, output_dir=str(tmp_path / "other"), resume=str(named))
    finetune(other, report=quiet)
    assert toy.content(tmp_path / "other") == toy.content(tmp_path / "whole")
    messages: list[str] = []
    finetune(replace(interrupted, resume=str(named)), report=messages.append)
    assert any("checkpoints of another branch (step-00000007) and their log are now in" in text for text in messages)
    assert toy.content(tmp_path / "run") == toy.content(tmp_path / "whole")


def test_the_same_command_with_a_named_checkpoint_resumes_its_own(
    interrupted: FinetuneConfig, toy: Any, tmp_path: Path
) -> None:
    finetune(toy.settings(tmp_path / "whole"), report=quiet)
    named = unfinished_folder(interrupted.output_dir) / "checkpoints" / "step-00000006"
    other = replace(interrupted, output_dir=str(tmp_path / "other"), resume=str(named))
    with toy.signal_at(Finetuner, "train_step", 2), pytest.raises(RunInterruptedError) as error:
        finetune(other, report=quiet)
    assert error.value.step == 8
    messages: list[str] = []
    finetune(other, report=messages.append)
    assert any("at step 8 of 10" in text for text in messages)
    assert toy.content(tmp_path / "other") == toy.content(tmp_path / "whole")


def test_a_checkpoint_of_another_model_or_kind_is_refused(
    interrupted: FinetuneConfig, toy: Any, tmp_path: Path
) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(toy.base, num_labels=2)
    with pytest.raises(ValueError, match="is the checkpoint of another model: "):
        finetune(interrupted, model=model, report=quiet)
    state = tmp_path / "pretrained"
    checkpoint.write_folder(
        state, lambda folder: checkpoint.save_training_state(folder, model, torch.optim.SGD(model.parameters()), {})
    )
    with pytest.raises(ValueError, match="has no 'progress'"):
        finetune(replace(interrupted, output_dir=str(tmp_path / "new"), resume=str(state)), report=quiet)


def test_a_passed_model_resumes(toy: Any, tmp_path: Path) -> None:
    """Of transformers, whose dropout draws from torch's generator too."""

    def model() -> transformers.BertForSequenceClassification:
        torch.manual_seed(5)
        return transformers.BertForSequenceClassification.from_pretrained(toy.base, num_labels=2)

    whole = toy.settings(tmp_path / "whole")
    finetune(whole, model=model(), report=quiet)
    config = toy.settings(tmp_path / "run")
    with toy.signal_at(Finetuner, "train_step", 6), pytest.raises(RunInterruptedError):
        finetune(config, model=model(), report=quiet)
    finetune(config, model=model(), report=quiet)
    assert toy.content(tmp_path / "run") == toy.content(tmp_path / "whole")


def test_a_diverged_state_is_not_saved(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = Finetuner.train_step

    def diverging(self: Finetuner, batches: Any) -> Any:
        losses, norm = train_step(self, batches)
        if self.progress.step == 5:
            losses = {index: loss * float("nan") for index, loss in losses.items()}
        return losses, norm

    monkeypatch.setattr(Finetuner, "train_step", diverging)
    config = toy.settings(tmp_path / "run", log_interval=100, checkpoint_interval=1, eval_steps=100)
    with pytest.raises(TrainingDivergedError, match=r"by step 5; lower optimizer\.lr"):
        finetune(config, report=quiet)
    assert toy.checkpoints_of(config) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_commands_say_how_they_resume(
    number: int, toy: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The words and exit codes of pretrain."""
    values = json.loads(json.dumps(asdict(toy.settings(tmp_path / "run"))))
    (tmp_path / "run.yaml").write_text(json.dumps(values))
    several = json.loads(json.dumps(asdict(toy.several(tmp_path / "several"))))
    (tmp_path / "several.yaml").write_text(json.dumps(several))
    for command, name, folder in (
        ("finetune", "run.yaml", "run"),
        ("multitask", "several.yaml", "several"),
        ("sweep", "run.yaml", "sweep/001"),
    ):
        arguments = [command, "--config", str(tmp_path / name)]
        arguments += ["--output_dir", str(tmp_path / "sweep")] if command == "sweep" else []
        with toy.signal_at(Finetuner, "train_step", 2, number):
            assert main(arguments) == 128 + number
        unfinished = unfinished_folder(tmp_path / folder) / "checkpoints" / "step-00000002"
        assert capsys.readouterr().out.splitlines() == [
            f"stopped by signal {number} after step 2 of 10; saved",
            f"checkpoint: {unfinished} (the same command resumes from it)",
        ]
        assert main(arguments) == 0
        assert f"resuming from {unfinished} at step 2 of 10" in capsys.readouterr().err


def test_a_second_signal_ends_the_run_at_once(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the checkpoint that the first one causes: the checkpoint before it is there."""
    write_folder = checkpoint.write_folder
    config = toy.settings(tmp_path / "run", checkpoint_interval=3)

    def interrupted(target: Path, fill: Any) -> None:
        def fill_half(folder: Path) -> None:
            fill(folder)
            if target.name == "step-00000004":
                signal.raise_signal(signal.SIGINT)

        write_folder(target, fill_half)

    monkeypatch.setattr(checkpoint, "write_folder", interrupted)
    with toy.signal_at(Finetuner, "train_step", 4, signal.SIGINT), pytest.raises(KeyboardInterrupt) as error:
        finetune(config, report=quiet)
    assert type(error.value) is KeyboardInterrupt
    assert toy.checkpoints_of(config) == ["step-00000003"]
