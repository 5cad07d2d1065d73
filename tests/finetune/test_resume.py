"""Interrupted runs: a signal saves, the same call resumes with the bits of an uninterrupted run, nothing is lost."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bert_fast import _io
from bert_fast._config import from_mapping
from bert_fast._lock import OutputBusyError, exclusive
from bert_fast.finetune import FinetuneConfig, MultitaskConfig, RunInterruptedError, finetune, multitask
from bert_fast.finetune import unfinished as unfinished_module
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.task_run import TaskRun
from bert_fast.finetune.unfinished import unfinished_folder
from bert_fast.models import BertConfig, BertModel
from bert_fast.runtime import checkpoint
from bert_fast.runtime.log import read_log
from bert_fast.runtime.ranks import TrainingDivergedError
from bert_fast.tasks.classification import Classification

WORDS = ["ada", "bob", "rome", "oslo", "good", "bad", "the", "we", "saw", "went", "who", "?"]


def quiet(_: str) -> None:
    pass


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer, and rows of every task."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, initializer_range=0.2, **sizes))
    model.save_pretrained(folder)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in TASKS}
    for n in range(20):
        words = [WORDS[n % 2], WORDS[6 + n % 4], WORDS[2 + n % 2], WORDS[4 + n // 2 % 2]]
        text = " ".join(words)
        rows["classification"].append({"text": text, "label": words[3]})
        rows["multi-label"].append({"text": text, "label": [words[0], words[3]]})
        rows["regression"].append({"text": text, "label": float(n % 2)})
        rows["token-classification"].append({"tokens": words, "tags": ["B-PER", "O", "B-LOC", "O"]})
        answer = {"text": words[2], "answer_start": text.index(words[2])}
        rows["question-answering"].append({"question": "who ?", "context": text, "answers": [answer]})
        rows["multiple-choice"].append(
            {"text": "who ?", "choices": [words[0], words[2]][:: 1 - 2 * (n % 2)], "label": n % 2}
        )
        rows["sentence-embedding"].append({"anchor": f"the {words[0]}", "positive": f"we {words[2]} {words[3]}"})
    for name, values in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    return folder


TASKS = (
    "classification", "multi-label", "regression", "token-classification", "question-answering", "multiple-choice",
    "sentence-embedding",
)  # fmt: skip


def settings(base: Path, target: Path, task: str = "classification", **changes: Any) -> FinetuneConfig:
    """Ten steps with dropout, an evaluation every four and a line of the log every three."""
    values = {
        "task": task,
        "model": base,
        "output_dir": target,
        "data": {"train": base / f"{task}.jsonl", "dev": base / f"{task}.jsonl"},
        "text": {"max_length": 16},
        "batch": {"rows": 4},
        "optimizer": {"lr": 3e-3, "unfreeze_epochs": 0.0 if task == "sentence-embedding" else 0.5},
        "steps": 10,
        "eval_steps": 4,
        "log_interval": 3,
        "progress": False,
        "report": False,
        "device": "cpu",
        **changes,
    }
    config: FinetuneConfig = from_mapping(FinetuneConfig, values)
    return config


def several(base: Path, target: Path, **changes: Any) -> MultitaskConfig:
    shared = asdict(settings(base, target))
    tasks = {name: {"task": name, "data": settings(base, target, name).data} for name in TASKS[:4]}
    assert shared["optimizer"]["unfreeze_epochs"] > 0
    names = set(MultitaskConfig.__dataclass_fields__)
    values = {**{name: value for name, value in shared.items() if name in names}, "tasks": tasks, **changes}
    config: MultitaskConfig = from_mapping(MultitaskConfig, values)
    return config


def without_times(values: Any) -> Any:
    """`values` without what depends on the clock."""
    if isinstance(values, dict):
        return {k: without_times(x) for k, x in values.items() if k not in ("seconds", "tokens_per_second")}
    return [without_times(x) for x in values] if isinstance(values, list) else values


def content(folder: Path) -> dict[str, Any]:
    """What a run computed: its files, without times and the settings of where it ran."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if path.name == "log.jsonl":
            found[name] = without_times(read_log(path))
        elif path.name == "metrics.json":
            found[name] = without_times(json.loads(path.read_text()))
        elif path.name not in ("finetune.json", "multitask.json"):
            found[name] = path.read_bytes()
    return found


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A context in which a signal arrives after so many training steps or during so many batches of an evaluation."""

    def patched(owner: Any, name: str, count: int, number: int) -> Any:
        context = monkeypatch.context()
        patch = context.__enter__()
        call, left = getattr(owner, name), [count]

        def run(*args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                signal.raise_signal(number)
            return result

        patch.setattr(owner, name, run)
        return context

    class At:
        def __init__(self, owner: Any, name: str, count: int, number: int = signal.SIGTERM) -> None:
            self.arguments = (owner, name, count, number)

        def __enter__(self) -> None:
            self.context = patched(*self.arguments)

        def __exit__(self, *error: Any) -> None:
            self.context.__exit__(None, None, None)

    return At


@pytest.mark.parametrize("task", TASKS)
def test_an_interrupted_run_equals_an_uninterrupted_one(
    task: str, base: Path, tmp_path: Path, signal_at: Callable[..., Any]
) -> None:
    """Signals after the first step, within the optimizer's schedule, and before an evaluation."""
    finetune(settings(base, tmp_path / "whole", task), report=quiet)
    expected = content(tmp_path / "whole")
    assert any(name.endswith("model.safetensors") for name in expected)
    config = settings(base, tmp_path / "run", task)
    for step, number in ((1, signal.SIGTERM), (4, signal.SIGINT), (9, signal.SIGTERM)):
        done = checkpoint.list_checkpoints(unfinished_folder(tmp_path / "run") / "checkpoints")
        first = int(done[-1].name[5:]) if done else 0
        with signal_at(Finetuner, "train_step", step - first, number), pytest.raises(RunInterruptedError) as error:
            finetune(config, report=quiet)
        assert (error.value.signal, error.value.step, error.value.total_steps) == (number, step, 10)
        assert error.value.checkpoint.is_dir()
        assert not (tmp_path / "run").exists()
    messages: list[str] = []
    finetune(config, report=messages.append)
    assert any(f"resuming from {error.value.checkpoint} at step 9 of 10" in text for text in messages)
    assert content(tmp_path / "run") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_several_tasks_resume_too(base: Path, tmp_path: Path, signal_at: Callable[..., Any]) -> None:
    multitask(several(base, tmp_path / "whole"), quiet)
    config = several(base, tmp_path / "run")
    for steps in (3, 4):
        with signal_at(Finetuner, "train_step", steps), pytest.raises(RunInterruptedError):
            multitask(config, quiet)
    multitask(config, quiet)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_augmentation_accumulation_and_early_stopping_resume(
    base: Path, tmp_path: Path, signal_at: Callable[..., Any]
) -> None:
    changes = {
        "augment": {"delete": 0.2, "mask": 0.1}, "batch": {"tokens": 20, "accumulation": 2, "bucket": 2},
        "steps": None, "epochs": 20, "eval_steps": 0, "patience": 2, "loss": {"resample": "balanced"},
    }  # fmt: skip
    whole = finetune(settings(base, tmp_path / "whole", **changes), report=quiet)
    assert whole.metrics["run"]["stopped_early"]
    config = settings(base, tmp_path / "run", **changes)
    with signal_at(Finetuner, "train_step", 7), pytest.raises(RunInterruptedError):
        finetune(config, report=quiet)
    finetune(config, report=quiet)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


@pytest.mark.parametrize("batch", range(1, 12))
def test_a_signal_within_an_evaluation(batch: int, base: Path, tmp_path: Path, signal_at: Callable[..., Any]) -> None:
    """During training and after it, of dev and of test: the evaluation is repeated, and the result is the same."""
    changes = {
        "batch": {"rows": 4, "eval_tokens": 50},
        "data": {**asdict(settings(base, tmp_path).data), "test": base / "classification.jsonl"},
    }
    whole = settings(base, tmp_path / "whole", **changes, steps=5)
    counted = finetune(whole, report=quiet).metrics
    assert counted["test"]["accuracy"] == counted["dev"]["accuracy"]
    config = settings(base, tmp_path / "run", **changes, steps=5)
    with signal_at(Classification, "per_example", batch), pytest.raises(RunInterruptedError) as error:
        finetune(config, report=quiet)
    assert error.value.step in (0, 4, 5)
    finetune(config, report=quiet)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_checkpoints_by_steps_and_by_minutes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write_folder = checkpoint.write_folder

    def counted(target: Path, *arguments: Any) -> None:
        written.append(int(target.name[5:]))
        write_folder(target, *arguments)
        assert len(checkpoint.list_checkpoints(target.parent)) <= 3, "two are kept"

    monkeypatch.setattr(checkpoint, "write_folder", counted)
    finetune(settings(base, tmp_path / "steps", checkpoint_interval=2), report=quiet)
    assert written == [2, 4, 6, 8]
    written.clear()
    clock = [0.0]
    monkeypatch.setattr(unfinished_module.time, "monotonic", lambda: clock[0])
    train_step = Finetuner.train_step

    def slow_step(self: Finetuner, batches: Any) -> Any:
        clock[0] += 25.0
        return train_step(self, batches)

    monkeypatch.setattr(Finetuner, "train_step", slow_step)
    finetune(settings(base, tmp_path / "minutes", checkpoint_minutes=1), report=quiet)
    assert written == [3, 6, 9]
    written.clear()
    finetune(settings(base, tmp_path / "never", checkpoint_minutes=0), report=quiet)
    assert written == []
    assert content(tmp_path / "steps") == content(tmp_path / "minutes") == content(tmp_path / "never")


@pytest.fixture
def interrupted(base: Path, tmp_path: Path, signal_at: Callable[..., Any]) -> FinetuneConfig:
    """A run that was interrupted after step 7, with checkpoints of steps 6 and 7."""
    config = settings(base, tmp_path / "run", checkpoint_interval=3)
    with signal_at(Finetuner, "train_step", 7), pytest.raises(RunInterruptedError):
        finetune(config, report=quiet)
    assert checkpoints_of(config) == ["step-00000006", "step-00000007"]
    return config


def checkpoints_of(config: FinetuneConfig) -> list[str]:
    root = unfinished_folder(config.output_dir) / "checkpoints"
    return [path.name for path in checkpoint.list_checkpoints(root)]


def test_a_corrupt_checkpoint_is_skipped(interrupted: FinetuneConfig, base: Path, tmp_path: Path) -> None:
    finetune(settings(base, tmp_path / "whole"), report=quiet)
    weights = unfinished_folder(interrupted.output_dir) / "checkpoints" / "step-00000007" / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    messages: list[str] = []
    finetune(interrupted, report=messages.append)
    assert any("weights.safetensors is corrupt" in text for text in messages)
    assert any("at step 6 of 10" in text for text in messages)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


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
    changes: dict[str, Any], message: str, interrupted: FinetuneConfig, base: Path, tmp_path: Path
) -> None:
    changes = {name: str(base) if value == "{base}" else value for name, value in changes.items()}
    with pytest.raises((ValueError, OSError), match=message):
        finetune(settings(base, tmp_path / "run", checkpoint_interval=3, **changes), report=quiet)
    assert checkpoints_of(interrupted) == ["step-00000006", "step-00000007"]
    finetune(interrupted, report=quiet)


def test_other_rows_are_refused_and_moved_ones_are_not(interrupted: FinetuneConfig, base: Path, tmp_path: Path) -> None:
    text = (base / "classification.jsonl").read_text()
    for name, content_of in (("same", text), ("other", text.replace("good", "bad", 1))):
        (tmp_path / f"{name}.jsonl").write_text(content_of)
    data = {"train": tmp_path / "other.jsonl", "dev": base / "classification.jsonl"}
    with pytest.raises(ValueError, match=r"the rows of train or dev are not those that .*step-00000007 was trained on"):
        finetune(settings(base, tmp_path / "run", data=data), report=quiet)
    messages: list[str] = []
    data = {**data, "train": tmp_path / "same.jsonl"}
    optimizer = {"lr": 1e-3, "unfreeze_epochs": 0.5}
    result = finetune(
        settings(base, tmp_path / "run", data=data, steps=12, optimizer=optimizer), report=messages.append
    )
    assert result.metrics["run"]["steps"] == 12
    assert "optimizer.lr is now 0.001; the run started with 0.003" in messages
    assert "steps is now 12; the run started with 10" in messages


def test_a_run_goes_on_from_a_named_checkpoint(interrupted: FinetuneConfig, base: Path, tmp_path: Path) -> None:
    """Of its own, then later ones are set aside; or of another folder, whose log goes on."""
    finetune(settings(base, tmp_path / "whole"), report=quiet)
    named = unfinished_folder(interrupted.output_dir) / "checkpoints" / "step-00000006"
    other = replace(interrupted, output_dir=str(tmp_path / "other"), resume=str(named))
    finetune(other, report=quiet)
    assert content(tmp_path / "other") == content(tmp_path / "whole")
    messages: list[str] = []
    finetune(replace(interrupted, resume=str(named)), report=messages.append)
    assert any("checkpoints of another branch (step-00000007) and their log are now in" in text for text in messages)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_the_same_command_with_a_named_checkpoint_resumes_its_own(
    interrupted: FinetuneConfig, base: Path, tmp_path: Path, signal_at: Callable[..., Any]
) -> None:
    finetune(settings(base, tmp_path / "whole"), report=quiet)
    named = unfinished_folder(interrupted.output_dir) / "checkpoints" / "step-00000006"
    other = replace(interrupted, output_dir=str(tmp_path / "other"), resume=str(named))
    with signal_at(Finetuner, "train_step", 2), pytest.raises(RunInterruptedError) as error:
        finetune(other, report=quiet)
    assert error.value.step == 8
    messages: list[str] = []
    finetune(other, report=messages.append)
    assert any("at step 8 of 10" in text for text in messages)
    assert content(tmp_path / "other") == content(tmp_path / "whole")


def test_a_checkpoint_of_another_model_or_kind_is_refused(
    interrupted: FinetuneConfig, base: Path, tmp_path: Path
) -> None:
    model = transformers.BertForSequenceClassification.from_pretrained(base, num_labels=2)
    with pytest.raises(ValueError, match="is the checkpoint of another model: "):
        finetune(interrupted, model=model, report=quiet)
    state = tmp_path / "pretrained"
    checkpoint.write_folder(
        state, lambda folder: checkpoint.save_training_state(folder, model, torch.optim.SGD(model.parameters()), {})
    )
    with pytest.raises(ValueError, match="has no 'progress'"):
        finetune(replace(interrupted, output_dir=str(tmp_path / "new"), resume=str(state)), report=quiet)


def test_a_passed_model_resumes(base: Path, tmp_path: Path, signal_at: Callable[..., Any]) -> None:
    """Of transformers, whose dropout draws from torch's generator too."""

    def model() -> transformers.BertForSequenceClassification:
        torch.manual_seed(5)
        return transformers.BertForSequenceClassification.from_pretrained(base, num_labels=2)

    whole = settings(base, tmp_path / "whole")
    finetune(whole, model=model(), report=quiet)
    config = settings(base, tmp_path / "run")
    with signal_at(Finetuner, "train_step", 6), pytest.raises(RunInterruptedError):
        finetune(config, model=model(), report=quiet)
    finetune(config, model=model(), report=quiet)
    assert content(tmp_path / "run") == content(tmp_path / "whole")


def test_a_diverged_state_is_not_saved(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_step = Finetuner.train_step

    def diverging(self: Finetuner, batches: Any) -> Any:
        losses, norm = train_step(self, batches)
        if self.progress.step == 5:
            losses = {index: loss * float("nan") for index, loss in losses.items()}
        return losses, norm

    monkeypatch.setattr(Finetuner, "train_step", diverging)
    config = settings(base, tmp_path / "run", log_interval=100, checkpoint_interval=1, eval_steps=100)
    with pytest.raises(TrainingDivergedError, match=r"by step 5; lower optimizer\.lr"):
        finetune(config, report=quiet)
    assert checkpoints_of(config) == ["step-00000003", "step-00000004"]


class TestOverwrite:
    """The old result is there until the new one is complete."""

    @pytest.fixture
    def config(self, base: Path, tmp_path: Path) -> FinetuneConfig:
        finetune(settings(base, tmp_path / "run", seed=1, steps=1), report=quiet)
        return settings(base, tmp_path / "run", overwrite=True, steps=5)

    def test_it_survives_a_refusal_a_failure_and_an_interruption(
        self, config: FinetuneConfig, base: Path, tmp_path: Path, signal_at: Callable[..., Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        before = content(tmp_path / "run")
        with pytest.raises(FileExistsError, match="run exists; choose another folder, or give --overwrite true"):
            finetune(replace(config, overwrite=False), report=quiet)
        with pytest.raises(ValueError, match="metric is 'f1'"):
            finetune(replace(config, metric="f1"), report=quiet)
        with monkeypatch.context() as patch:
            patch.setattr(TaskRun, "loss", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                finetune(config, report=quiet)
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        with signal_at(Finetuner, "train_step", 3), pytest.raises(RunInterruptedError):
            finetune(config, report=quiet)
        assert content(tmp_path / "run") == before
        finetune(config, report=quiet)
        finetune(settings(base, tmp_path / "whole", steps=5), report=quiet)
        assert content(tmp_path / "run") == content(tmp_path / "whole") != before

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
        self, config: FinetuneConfig, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
        finetune(settings(base, tmp_path / "whole", steps=5), report=quiet)
        monkeypatch.setattr(Finetuner, "train_step", lambda *_: pytest.fail("it is trained already"))
        finetune(replace(new, output_dir=str(tmp_path / "third"), resume=str(kept)), report=quiet)
        assert content(tmp_path / "third") == content(tmp_path / "whole")
        changed = replace(new, output_dir=str(tmp_path / "fourth"), optimizer=replace(new.optimizer, lr=0.1))
        with pytest.raises(ValueError, match=r"belongs to another run \(optimizer.lr 0.003 -> 0.1\)"):
            finetune(replace(changed, resume=str(kept)), report=quiet)


def test_two_runs_in_one_folder(base: Path, tmp_path: Path) -> None:
    for run, config in ((finetune, settings(base, tmp_path / "run")), (multitask, several(base, tmp_path / "run"))):
        with (
            exclusive(tmp_path / "run", what="fine-tuning run"),
            pytest.raises(
                OutputBusyError, match=r"another fine-tuning run \(host \S+, pid \d+, since .*\) is at work in"
            ),
        ):
            run(config, report=quiet)  # type: ignore[operator]
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with exclusive(tmp_path / "run"), pytest.raises(OutputBusyError):
        finetune(settings(base, tmp_path / "link"), report=quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link"]


@pytest.mark.parametrize("where", ["checkpoint", "result"])
def test_a_full_disk(where: str, interrupted: FinetuneConfig, base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """One sentence; the last checkpoint and an old result are there, and the run goes on when there is space."""
    finetune(settings(base, tmp_path / "whole"), report=quiet)
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
    assert checkpoints_of(config) == ["step-00000006", "step-00000007"]
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    finetune(config, report=quiet)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "whole"]


def test_a_failing_report_is_a_warning(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    separators = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"
    rows = [json.loads(line) for line in (base / "classification.jsonl").read_text().splitlines()]
    rows = [{**row, "text": f"{row['text']} {separators}", "id": "\ud800"} for row in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": tmp_path / "rows.jsonl", "dev": tmp_path / "rows.jsonl"}
    messages: list[str] = []
    config = settings(base, tmp_path / "run", data=data, report=True, steps=1)
    finetune(config, report=messages.append)
    lines = (tmp_path / "run" / "predictions.dev.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line)["input"] for line in lines[:-1]] == rows
    monkeypatch.setattr("bert_fast.finetune.task_run.write_report", lambda _: 1 / 0)
    result = finetune(replace(config, overwrite=True), report=messages.append)
    assert "warning: report.html is not written: ZeroDivisionError: division by zero" in messages
    assert (Path(result.folder) / "model.safetensors").is_file()
