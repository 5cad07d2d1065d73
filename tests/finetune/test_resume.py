"""Interrupted runs: a signal saves, the same call resumes with the bits of an uninterrupted run, and nothing is lost."""

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
    from bert_fast.tasks.classification import Classification

    with signal_at(Classification, "per_example", batch), pytest.raises(RunInterruptedError) as error:
        finetune(config, report=quiet)
    assert error.value.step in (0, 4, 5)
    finetune(config, report=quiet)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
