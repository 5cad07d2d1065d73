"""Runs of every task on toy rows, and signals that arrive within them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fast._config import from_mapping
from bert_fast.finetune import FinetuneConfig, MultitaskConfig, RunInterruptedError, finetune
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.unfinished import unfinished_folder
from bert_fast.models import BertConfig, BertModel
from bert_fast.runtime import checkpoint
from bert_fast.runtime.log import read_log
from bert_fast.tasks.task import TASKS

WORDS = ["ada", "bob", "rome", "oslo", "good", "bad", "the", "we", "saw", "went", "who", "?"]


class Toy:
    """A tiny model with its tokenizer, rows of every task, and settings of runs on them.

    Args:
        base: the folder of the model and the rows.
    """

    def __init__(self, base: Path) -> None:
        self.base = base
        (base / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        BertModel(
            BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, initializer_range=0.2, **sizes)
        ).save_pretrained(base)
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
            choices = [words[0], words[2]][:: 1 - 2 * (n % 2)]
            rows["multiple-choice"].append({"text": "who ?", "choices": choices, "label": n % 2})
            rows["sentence-embedding"].append({"anchor": f"the {words[0]}", "positive": f"we {words[2]} {words[3]}"})
            rows["rerank"].append({"query": f"the {words[0]}", "text": f"we {words[2]}", "label": n % 2})
        for name, values in rows.items():
            (base / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))

    def settings(self, target: Path, task: str = "classification", **changes: Any) -> FinetuneConfig:
        """Ten steps with dropout, an evaluation every four and a line of the log every three."""
        values = {
            "task": task,
            "model": self.base,
            "output_dir": target,
            "data": {"train": self.base / f"{task}.jsonl", "dev": self.base / f"{task}.jsonl"},
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

    def several(self, target: Path) -> MultitaskConfig:
        """The same for four tasks."""
        shared = asdict(self.settings(target))
        tasks = {name: {"task": name, "data": self.settings(target, name).data} for name in list(TASKS)[:4]}
        names = set(MultitaskConfig.__dataclass_fields__)
        values = {**{name: value for name, value in shared.items() if name in names}, "tasks": tasks}
        config: MultitaskConfig = from_mapping(MultitaskConfig, values)
        return config

    @staticmethod
    def content(folder: Path) -> dict[str, Any]:
        """What a run computed: its files, without times and the settings of where it ran."""
        found: dict[str, Any] = {}
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(folder))
            if path.name == "log.jsonl":
                found[name] = _without_times(read_log(path))
            elif path.name == "metrics.json":
                found[name] = _without_times(json.loads(path.read_text()))
            elif path.name not in ("finetune.json", "multitask.json"):
                found[name] = path.read_bytes()
        return found

    @staticmethod
    def checkpoints_of(config: FinetuneConfig) -> list[str]:
        """The names of the checkpoints of an unfinished run."""
        root = unfinished_folder(config.output_dir) / "checkpoints"
        return [path.name for path in checkpoint.list_checkpoints(root)]

    @staticmethod
    @contextmanager
    def signal_at(owner: Any, name: str, count: int, number: int = signal.SIGTERM) -> Iterator[None]:
        """In the block, a signal arrives after `count` calls of the method `name` of the class `owner`."""
        call, left = getattr(owner, name), count

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            result = call(*args, **kwargs)
            left -= 1
            if left == 0:
                signal.raise_signal(number)
            return result

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, run)
            yield


def _without_times(values: Any) -> Any:
    """`values` without what depends on the clock."""
    if isinstance(values, dict):
        return {k: _without_times(x) for k, x in values.items() if k not in ("seconds", "tokens_per_second")}
    return [_without_times(x) for x in values] if isinstance(values, list) else values


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """A tiny model and rows of every task."""
    return Toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Every test computes with one thread."""


@pytest.fixture
def interrupted(toy: Toy, tmp_path: Path) -> FinetuneConfig:
    """A run that was interrupted after step 7, with checkpoints of steps 6 and 7."""
    config = toy.settings(tmp_path / "run", checkpoint_interval=3)
    with toy.signal_at(Finetuner, "train_step", 7), pytest.raises(RunInterruptedError):
        finetune(config, report=lambda _: None)
    assert toy.checkpoints_of(config) == ["step-00000006", "step-00000007"]
    return config
