"""Every task through the loop: it learns rows that can be learnt, and its folder predicts what was learnt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bert_fast.models
from bert_fast.data import load_tokenizer
from bert_fast.models import BertConfig, BertModel
from bert_fast.tasks.prediction import predict
from bert_fast.tasks.table import Table
from bert_fast.tasks.task import task_class, task_from_config
from bert_fast.training.config import from_mapping
from bert_fast.training.finetune import finetune
from bert_fast.training.finetune_config import FinetuneConfig

COLOURS = ["red", "green", "blue", "black"]
THINGS = ["house", "river", "bird", "cat", "road"]
WORDS = [*COLOURS, *THINGS, "the", "a", "is", "what", "near"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = BertModel(BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, initializer_range=0.2, **sizes))
    model.save_pretrained(folder)
    return folder


def tagged(draw: random.Random) -> dict[str, Any]:
    words = draw.choices([*COLOURS, *THINGS, "the", "near"], k=draw.randint(3, 8))
    return {"tokens": words, "tags": ["B-colour" if word in COLOURS else "O" for word in words]}


def asked(draw: random.Random) -> dict[str, Any]:
    words = draw.choices([*THINGS, "the", "near"], k=draw.randint(3, 8))
    place, colour = draw.randrange(len(words)), draw.choice(COLOURS)
    context = " ".join([*words[:place], colour, *words[place:]])
    answers = {"text": [colour], "answer_start": [context.index(colour)]}
    return {"question": "what is the", "context": context, "answers": answers}


def chosen(draw: random.Random) -> dict[str, Any]:
    choices = [f"{draw.choice(THINGS)} near" for _ in range(draw.randint(2, 4))]
    right = draw.randrange(len(choices))
    choices[right] = f"{draw.choice(COLOURS)} near"
    return {"text": f"the {draw.choice(THINGS)} is", "choices": choices, "label": right}


def triplet(draw: random.Random) -> dict[str, Any]:
    one, other = draw.sample(COLOURS, 2)
    anchor, positive, negative = (f"the {word} {draw.choice(THINGS)}" for word in (one, one, other))
    return {"anchor": anchor, "positive": positive, "negative": negative}


CASES: dict[str, tuple[Callable[[random.Random], dict[str, Any]], dict[str, Any], str]] = {
    "token-classification": (tagged, {}, "f1"),
    "question-answering": (asked, {"overlap": 4, "max_question": 8}, "exact_match"),
    "multiple-choice": (chosen, {}, "accuracy"),
    "sentence-embedding": (triplet, {"objective": "triplet"}, "triplet_accuracy"),
}


@pytest.mark.parametrize("name", CASES)
def test_it_learns_and_predicts(name: str, base: Path, tmp_path: Path) -> None:
    make, options, metric = CASES[name]
    draw = random.Random(0)
    for part, count in (("train", 128), ("dev", 24)):
        lines = [json.dumps(make(draw)) + "\n" for _ in range(count)]
        (tmp_path / f"{part}.jsonl").write_text("".join(lines))
    values = {
        "task": name,
        "model": str(base),
        "output_dir": str(tmp_path / "run"),
        "data": {"train": str(tmp_path / "train.jsonl"), "dev": str(tmp_path / "dev.jsonl")},
        "options": options,
        "text": {"max_length": 24},
        "optimizer": {"lr": 3e-3},
        "epochs": 6,
        "dropout": 0.0,
        "device": "cpu",
        "progress": False,
    }
    said: list[str] = []
    result = finetune(from_mapping(FinetuneConfig, values), report=said.append)
    found = result.metrics["dev"][metric]
    assert found in (1.0, 100.0), (result.metrics["dev"], said)
    folder = Path(result.folder)
    task = task_from_config(json.loads((folder / "config.json").read_text()))
    model: Any = getattr(bert_fast.models, task_class(name).model_class).from_pretrained(folder)
    written = [json.loads(line) for line in (folder / "predictions.dev.jsonl").read_text().splitlines()]
    table = Table({key: [line["input"][key] for line in written] for key in written[0]["input"]})
    columns = {role.name: key for role in task.roles if not role.target for key in table.columns if key in role.usual}
    predictions = predict(model, task, load_tokenizer(folder), table, columns)
    assert len(predictions) == len(written)
    for ours, line in zip(predictions, written, strict=True):
        for key, value in line["prediction"].items():
            expected = pytest.approx(value, abs=1e-4) if isinstance(value, float) else value
            assert ours[key] == expected or not isinstance(value, (str, float, int))
