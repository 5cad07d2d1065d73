"""Several tasks on one encoder: each learns and trains the encoder, and each result loads in transformers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from bert_fast._config import from_mapping
from bert_fast.cli.main import main
from bert_fast.finetune import MultitaskConfig, finetune, multitask
from bert_fast.finetune.api import open_task_runs
from bert_fast.finetune.loop import Finetuner, batches_per_task, interleaved_batches
from bert_fast.models import BertConfig, BertModel
from bert_fast.runtime.log import read_log

NAMES = ["ada", "rome", "paris"]
WORDS = ["good", "fine", "bad", "poor", "the", "a", "film", "was", "it", "in", "where", *NAMES]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(
        BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, initializer_range=0.2, **sizes)
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The tasks of a run: 96 rows of opinions, 24 of names, 24 of questions."""
    folder = tmp_path_factory.mktemp("rows")
    opinions = [
        {
            "text": f"{WORDS[4 + n % 6]} film was {WORDS[n % 4]} {WORDS[4 + n % 5]}",
            "label": "bad" if n % 4 > 1 else "good",
        }
        for n in range(96)
    ]
    names = []
    questions = []
    for n in range(24):
        before, name = [WORDS[4 + (n * 5 + k) % 6] for k in range(n % 4)], NAMES[n % 3]
        tag = "B-PER" if name == "ada" else "B-LOC"
        names.append({"tokens": [*before, name, "was"], "tags": [*["O"] * len(before), tag, "O"]})
        context = " ".join([*before, name, "was", "fine"])
        answer = {"text": name, "answer_start": context.index(name)}
        questions.append({"question": "where", "context": context, "answers": [answer]})
    for name, of_task in (("opinions", opinions), ("names", names), ("questions", questions)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_task))
    kinds = {"opinions": "classification", "names": "token-classification", "questions": "question-answering"}
    data = {name: {"train": str(folder / f"{name}.jsonl"), "dev": str(folder / f"{name}.jsonl")} for name in kinds}
    return {name: {"task": kind, "data": data[name]} for name, kind in kinds.items()}


def settings(base: Path, target: Path, tasks: dict[str, Any], **changes: Any) -> MultitaskConfig:
    values = {
        "tasks": tasks,
        "model": str(base),
        "output_dir": str(target),
        "text": {"max_length": 24},
        "batch": {"rows": 8},
        "optimizer": {"lr": 3e-3},
        "log_interval": 1,
        "progress": False,
        "report": False,
        "device": "cpu",
        **changes,
    }
    config: MultitaskConfig = from_mapping(MultitaskConfig, values)
    return config


def train_losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = [line for line in read_log(folder / "log.jsonl") if line["kind"] == "train"]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def test_each_task_learns_and_loads_in_transformers(base: Path, rows: dict[str, Any], tmp_path: Path) -> None:
    config = settings(base, tmp_path / "run", rows, epochs=10, sampling="uniform", report=True)
    result = multitask(config, quiet)
    assert result.metrics["mean"] == 1.0
    main_metrics = {
        name: of_task["dev"][of_task["run"]["main_metric"]] for name, of_task in result.metrics["tasks"].items()
    }
    assert main_metrics == {"opinions": 1.0, "names": 1.0, "questions": 1.0}
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == result.metrics
    assert "opinions/report.html" in (tmp_path / "run/report.html").read_text()
    folders = {name: tmp_path / "run" / name for name in rows}
    models = {
        "opinions": transformers.AutoModelForSequenceClassification.from_pretrained(folders["opinions"]),
        "names": transformers.AutoModelForTokenClassification.from_pretrained(folders["names"]),
        "questions": transformers.AutoModelForQuestionAnswering.from_pretrained(folders["questions"]),
    }
    first = models["opinions"].bert.encoder.state_dict()
    for name, model in models.items():
        encoder = model.bert.encoder.state_dict()
        assert all(torch.equal(encoder[key], x) for key, x in first.items()), "one encoder"
        assert (folders[name] / "report.html").is_file()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["opinions"])
    line = json.loads((folders["opinions"] / "predictions.dev.jsonl").read_text().splitlines()[0])
    with torch.no_grad():
        scores = models["opinions"](**tokenizer(line["input"]["text"], return_tensors="pt")).logits.softmax(-1)[0]
    # float32 in another order: some eps (1.2e-7) of the logits; a score moves by a quarter of that.
    assert scores.tolist() == pytest.approx(list(line["prediction"]["scores"].values()), abs=1e-5)
    assert {id(of_task.model.bert.encoder) for of_task in result.tasks.values()} == {
        id(result.tasks["names"].model.bert.encoder)
    }


@pytest.mark.parametrize("name", ["opinions", "questions"])
def test_one_task_is_bitwise_equal_to_finetune(name: str, base: Path, rows: dict[str, Any], tmp_path: Path) -> None:
    changes = {"batch": {"rows": 5, "accumulation": 2}, "epochs": 2.5, "patience": 3}
    config = settings(base, tmp_path / "run", {name: rows[name]}, **changes)
    several = multitask(config, quiet).tasks[name]
    alone = replace(config.task_configs()[name], output_dir=str(tmp_path / "one"))
    plain = finetune(alone, report=quiet)
    assert train_losses(tmp_path / "run" / name) == train_losses(tmp_path / "one")
    pairs = zip(several.model.named_parameters(), plain.model.named_parameters(), strict=True)
    assert all(one == other and torch.equal(x, y) for (one, x), (other, y) in pairs)
    assert several.metrics["dev"] == plain.metrics["dev"]


def test_the_encoder_learns_from_every_task(base: Path, rows: dict[str, Any], tmp_path: Path) -> None:
    """The gradient of a step on both tasks is the sum of those of each task, times its share and weight."""
    tasks = {"opinions": rows["opinions"], "names": {**rows["names"], "weight": 3.0}}
    config = settings(base, tmp_path / "run", tasks, optimizer={"max_grad_norm": 0.0})
    loop = Finetuner(open_task_runs(config, quiet))
    loop.optimizer = torch.optim.SGD(loop.models.parameters(), lr=0.0)
    loop.optimizer.param_groups[0]["lr_factor"] = 0.0
    loop.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
    for task_run in loop.task_runs:
        task_run.model.eval()
    first, second = (task_run.batches(0)[0] for task_run in loop.task_runs)

    def gradients(*batches: Any) -> dict[str, torch.Tensor]:
        loop.models.zero_grad()
        loop.train_step(batches)
        encoder = loop.task_runs[0].model.bert
        return {
            name: x.grad.clone()
            for kind in ("embeddings", "encoder")
            for name, x in getattr(encoder, kind).named_parameters(kind)
            if x.grad is not None
        }

    both = gradients((0, first), (1, second))
    alone = [gradients((0, first)), gradients((1, second))]
    assert both.keys() == alone[0].keys() == alone[1].keys()
    for name, gradient in both.items():
        # The factor 1/2 is exact; the sum of two float32 gradients of up to 3 rounds by half an ulp, 1.2e-7.
        assert torch.allclose(gradient, (alone[0][name] + alone[1][name]) / 2, atol=1e-6), name
        assert all(one[name].abs().max() > 0 for one in alone), name


@pytest.mark.parametrize(
    ("sizes", "temperature", "expected"),
    [
        ([90, 10], 1.0, [90, 10]),
        ([81, 9], 2.0, [68, 22]),  # 3 : 1 of 90
        ([90, 9, 1], float("inf"), [34, 33, 33]),
        ([7], 5.0, [7]),
        ([1, 1, 1], 1.0, [1, 1, 1]),
    ],
)
def test_batches_per_task(sizes: list[int], temperature: float, expected: list[int]) -> None:
    counts = batches_per_task(sizes, temperature)
    assert sum(counts) == sum(sizes)
    assert counts == expected


def test_the_order_of_the_tasks(base: Path, rows: dict[str, Any], tmp_path: Path) -> None:
    tasks = {name: rows[name] for name in ("opinions", "names")}
    task_runs = open_task_runs(settings(base, tmp_path / "run", tasks), quiet)

    def order(seed: int, temperature: float, epochs: int) -> list[list[tuple[int, tuple[int, ...]]]]:
        batches = islice(interleaved_batches(task_runs, seed, temperature), epochs)
        return [[(number, tuple(example.row for example in batch)) for number, batch in epoch] for epoch in batches]

    assert order(3, 2.0, 2) == order(3, 2.0, 2)
    assert [number for number, _ in order(3, 2.0, 1)[0]] != [number for number, _ in order(4, 2.0, 1)[0]]
    for epoch in order(0, 1.0, 2):  # proportional: every row of both, once
        for number, rows_of_task in ((0, 96), (1, 24)):
            seen = Counter(row for which, batch in epoch for row in batch if which == number)
            assert seen == Counter(range(rows_of_task))
    # Uniform: eight batches of names, which has three per epoch; each epoch of names starts where the last one ended.
    uniform = [batch for number, batch in order(0, float("inf"), 1)[0] if number == 1]
    assert [len(batch) for batch in uniform] == [8] * len(uniform)
    assert sorted(row for batch in uniform[:3] for row in batch) == list(range(24))
    assert sorted(row for batch in uniform[3:6] for row in batch) == list(range(24))


def test_the_mean_of_the_metrics_stops_the_run(base: Path, rows: dict[str, Any], tmp_path: Path) -> None:
    tasks = {"opinions": rows["opinions"], "names": {**rows["names"], "metric": "loss"}}
    result = multitask(settings(base, tmp_path / "run", tasks, epochs=30, patience=1, optimizer={"lr": 0.01}), quiet)
    logs = [
        {line["step"]: line for line in read_log(tmp_path / "run" / name / "log.jsonl") if line["kind"] == "eval"}
        for name in tasks
    ]
    means = {step: (line["accuracy"] - logs[1][step]["loss"]) / 2 for step, line in logs[0].items()}
    run = result.metrics["run"]
    assert run["stopped_early"]
    assert run["best_step"] == max(means, key=lambda step: means[step])
    assert list(means)[-2] == run["best_step"]
    assert result.metrics["mean"] == pytest.approx(means[run["best_step"]], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "tasks is empty"),
        ({"tasks": {"../up": None}}, "tasks has the name '../up'"),
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"sampling": "random"}, "sampling is 'random'"),
        ({"tasks": {"a": {"weight": -1.0}}}, "weight is -1.0"),
        ({"tasks": {"a": {"data": {"train": "nowhere.csv"}}}}, "nowhere.csv"),
        ({"tasks": {"a": {"options": {"no": 1}}}}, "tasks.a: classification has no option no"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
def test_invalid_settings(
    changes: dict[str, Any], message: str, base: Path, rows: dict[str, Any], tmp_path: Path
) -> None:
    tasks = {name: {**rows["opinions"], **(task or {})} for name, task in changes.pop("tasks", {"a": {}}).items()}
    with pytest.raises((ValueError, OSError)) as error:
        multitask(settings(base, tmp_path / "run", tasks, **changes), quiet)
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_command(base: Path, rows: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {
        "model": str(base),
        "output_dir": str(tmp_path / "run"),
        "text": {"max_length": 24},
        "progress": False,
        "report": False,
        "steps": 4,
        "sampling": "square-root",
        "tasks": {"opinions": {**rows["opinions"], "rows": 4}, "names": rows["names"]},
    }
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(values))
    command = ["multitask", "--config", str(tmp_path / "tasks.yaml"), "--seed", "3"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "opinions, dev" in shown.out
    assert "names, dev" in shown.out
    assert "mean of the metrics" in shown.out
    assert "opinions: " in shown.err
    written = json.loads((tmp_path / "run/multitask.json").read_text())
    assert written["seed"] == 3
    assert json.loads((tmp_path / "run/opinions/finetune.json").read_text())["batch"]["rows"] == 4
    assert main(["predict", str(tmp_path / "run/names"), "ada was in rome"]) == 0
    assert "entities" in capsys.readouterr().out
    assert main(command) == 2
    assert "run exists; choose another folder" in capsys.readouterr().err
