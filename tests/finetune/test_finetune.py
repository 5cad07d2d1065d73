"""Fine-tuning on toy rows: learning, determinism, freezing, class weights, early stopping and the result folder."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import bert_fast
from bert_fast._config import from_mapping
from bert_fast.data import load_tokenizer
from bert_fast.finetune import BatchOptions, FinetuneConfig, FinetuneResult, finetune
from bert_fast.finetune.data import Batcher, Split, hold_out
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.task_run import TaskRun
from bert_fast.models import BertConfig, BertForSequenceClassification, BertModel
from bert_fast.optim.groups import Unfreezing, depths, freeze, layered_groups
from bert_fast.runtime.log import read_log
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.prediction import predict
from bert_fast.tasks.task import LossOptions, make_task, task_from_config

WORDS = ["good", "fine", "great", "bad", "poor", "sad", "the", "a", "film", "was", "it", "very", "and", "we", "saw"]
FILLER = WORDS[6:]


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pretrained model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    # Larger initial weights than BERT's, so that so small a model can learn.
    model = BertModel(BertConfig(vocab_size=5 + len(WORDS), max_position_embeddings=32, initializer_range=0.2, **sizes))
    model.save_pretrained(folder)
    return folder


def sentence(words: list[str], number: int) -> str:
    """Fillers, and one of `words` at a position that depends on `number`."""
    fillers = [FILLER[(number * 7 + position * 5) % len(FILLER)] for position in range(3 + number % 5)]
    return " ".join([*fillers[: number % 3], words[number % len(words)], *fillers[number % 3 :]])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv and dev.csv, with different texts: the label is good or bad, as one of the words."""
    folder = tmp_path_factory.mktemp("rows")
    for name, numbers in (("train", range(0, 96)), ("dev", range(100, 124))):
        rows = [(sentence(WORDS[:3] if n % 2 else WORDS[3:6], n), "good" if n % 2 else "bad") for n in numbers]
        (folder / f"{name}.csv").write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in rows))
    return folder


@pytest.fixture
def config(base: Path, files: Path, tmp_path: Path) -> FinetuneConfig:
    return from_mapping(
        FinetuneConfig,
        {
            "task": "classification",
            "model": str(base),
            "output_dir": str(tmp_path / "run"),
            "data": {"train": str(files / "train.csv"), "dev": str(files / "dev.csv")},
            "text": {"max_length": 16},
            "optimizer": {"lr": 3e-3},
            "epochs": 3,
            "log_interval": 1,
            "dropout": 0.0,
            "progress": False,
            "report": False,
            "device": "cpu",
        },
    )


def with_(config: FinetuneConfig, **changes: Any) -> FinetuneConfig:
    """`config` with values replaced; a mapping replaces values within a group."""
    groups = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) and name != "options" else value
        for name, value in changes.items()
    }
    return replace(config, **groups)


def losses(result: FinetuneResult) -> list[float]:
    return [line["loss"] for line in read_log(Path(result.folder) / "log.jsonl") if line["kind"] == "train"]


def test_a_model_learns_and_loads_in_transformers(config: FinetuneConfig, files: Path) -> None:
    messages: list[str] = []
    result = finetune(with_(config, epochs=20, data={"test": str(files / "dev.csv")}), report=messages.append)
    # The texts of dev are new to the model: all 24 are right for most seeds.
    assert result.metrics["dev"]["accuracy"] == result.metrics["test"]["accuracy"] >= 0.9
    assert result.metrics["dev"]["loss"] == pytest.approx(result.metrics["test"]["loss"])
    assert any("96 rows; text, label" in text for text in messages)
    folder = Path(result.folder)
    assert json.loads((folder / "metrics.json").read_text()) == result.metrics
    assert losses(result)[-1] < 0.1 < losses(result)[0]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    assert theirs.config.problem_type == "single_label_classification"
    lines = [json.loads(line) for line in (folder / "predictions.dev.jsonl").read_text().splitlines()]
    right = [line["prediction"]["label"] == line["input"]["label"] for line in lines]
    assert sum(right) / len(right) == pytest.approx(result.metrics["dev"]["accuracy"])
    assert right == [line["error"] == 0 for line in lines]
    with torch.no_grad():
        for line in lines[:4]:
            scores = theirs(**tokenizer(line["input"]["text"], return_tensors="pt")).logits.softmax(-1)[0]
            # float32 in another order: some eps (1.2e-7) of the logits; a score moves by a quarter of that.
            assert scores.tolist() == pytest.approx(list(line["prediction"]["scores"].values()), abs=1e-5)
    ours = BertForSequenceClassification.from_pretrained(folder)
    task = task_from_config(json.loads((folder / "config.json").read_text()))
    table = Table({"text": [line["input"]["text"] for line in lines]})
    predictions = predict(ours, task, load_tokenizer(folder), table, {"text": "text"})
    assert [prediction["label"] for prediction in predictions] == [line["prediction"]["label"] for line in lines]
    assert not list(folder.parent.glob(".run*"))


def test_the_same_seed_gives_the_same_losses(config: FinetuneConfig) -> None:
    first, second, other = (
        losses(finetune(with_(config, epochs=1, seed=seed, overwrite=True), report=quiet)) for seed in (1, 1, 2)
    )
    assert first == second
    assert first != other


def test_the_first_loss_equals_that_of_transformers(config: FinetuneConfig) -> None:
    loop = Finetuner([TaskRun(config, report=quiet)])
    task_run = loop.task_runs[0]
    task_run.model.eval()
    _, ((number, examples),) = next(loop.steps())
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20, max_position_embeddings=32, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64,
        )
    ).eval()  # fmt: skip
    model.load_state_dict(bert_fast.models.to_hf(task_run.model.state_dict()))
    rows = [task_run.data.train.table["text"][example.row] for example in examples]
    encoded = task_run.tokenizer.encode_batch(rows)
    width = max(len(one.ids) for one in encoded)
    ids = torch.tensor([one.ids + [0] * (width - len(one.ids)) for one in encoded])
    labels = torch.tensor([example.target for example in examples])
    expected = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
    step_losses, _ = loop.train_step([(number, examples)])
    # float32 in another order through two layers: the error is 1.2e-7, an eps of a loss of 0.8.
    assert float(step_losses[0]) == pytest.approx(float(expected.detach()), abs=1e-6)


@pytest.mark.parametrize("weights", ["none", [1.0, 5.0]], ids=["plain", "weighted classes"])
def test_accumulated_gradients_equal_those_of_one_large_batch(config: FinetuneConfig, weights: Any) -> None:
    gradients = []
    for rows, accumulation in ((12, 1), (3, 4)):
        batch = {"rows": rows, "accumulation": accumulation}
        torch.manual_seed(0)
        task_run = TaskRun(with_(config, batch=batch, loss={"class_weights": weights}), report=quiet)
        loop = Finetuner([task_run])
        loop.optimizer = torch.optim.SGD(task_run.model.parameters(), lr=0.0)
        loop.optimizer.param_groups[0]["lr_factor"] = 0.0
        loop.optimizer.zero_grad = lambda set_to_none=True: None  # type: ignore[method-assign]
        _, batches = next(loop.steps())
        loop.train_step(batches)
        gradients.append([parameter.grad for parameter in task_run.model.parameters()])
    for large, small in zip(*gradients, strict=True):
        # float32 sums of 12 rows in another order: the error is 4e-8, three eps of gradients of up to 0.1.
        assert torch.allclose(large, small, atol=1e-6)


def test_a_fused_transformers_model_is_trained_in_place(config: FinetuneConfig, base: Path) -> None:
    results = []
    for fused in (False, True):
        torch.manual_seed(3)
        model = transformers.BertForSequenceClassification.from_pretrained(
            base, num_labels=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        head = model.classifier.weight.detach().clone()
        if results:  # the same new head in both
            model.load_state_dict(start)  # noqa: F821
        start = {name: x.clone() for name, x in model.state_dict().items()}  # noqa: F841
        model = bert_fast.fuse(model) if fused else model
        result = finetune(with_(config, epochs=1, overwrite=True), model=model, report=quiet)
        assert result.model is model
        assert not torch.equal(model.classifier.weight, head)
        results.append(losses(result))
    # float32 in another order: half an eps (6e-8) of losses of 1; six steps of AdamW can enlarge it.
    assert results[0] == pytest.approx(results[1], abs=1e-4)
    written = json.loads((Path(config.output_dir) / "config.json").read_text())
    assert written["architectures"] == ["BertForSequenceClassification"]
    assert task_from_config(written).settings() == {"labels": ["bad", "good"]}
    with pytest.raises(ValueError, match="model has 3 labels; expected 2"):
        finetune(
            with_(config, overwrite=True),
            model=transformers.BertForSequenceClassification.from_pretrained(base, num_labels=3),
            report=quiet,
        )


def test_regression_and_multi_label_learn(config: FinetuneConfig, tmp_path: Path) -> None:
    rows = [{"text": sentence(WORDS[:3], n), "label": float(n % 3)} for n in range(120)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "rows.jsonl"), "dev": None}
    result = finetune(with_(config, task="regression", epochs=20, data=data), report=quiet)
    assert result.metrics["dev"]["pearson"] > 0.9
    marks = [{"text": f"{a} film {b}", "label": [*["up"] * (a == "good"), *["down"] * (b == "bad")]}
             for a in ("good", "fine", "the") for b in ("bad", "poor", "it") for _ in range(10)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marks))
    result = finetune(
        with_(config, task="multi-label", epochs=20, optimizer={"lr": 1e-2}, data=data, overwrite=True), report=quiet
    )
    assert result.metrics["dev"]["accuracy"] >= 0.9


def model_of(layers: int = 2) -> BertForSequenceClassification:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=9, num_hidden_layers=layers, **sizes))


def test_layers_have_learning_rates_by_depth() -> None:
    model = model_of()
    by_name, top = depths(model)
    assert top == 3
    assert by_name["bert.embeddings.LayerNorm.weight"] == 0
    assert by_name["bert.encoder.layer.1.attention.self.qkv.weight"] == 2
    assert by_name["bert.pooler.dense.weight"] == by_name["classifier.bias"] == 3
    groups = layered_groups(model, 0.1, 0.5)
    factor = {id(p): (group["lr_factor"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(factor) == len(list(model.parameters()))
    assert factor[id(model.classifier.weight)] == (1.0, 0.1)
    assert factor[id(model.classifier.bias)] == (1.0, 0.0)
    assert factor[id(model.bert.encoder.layer[0].attention.self.qkv.weight)] == (0.25, 0.1)
    assert factor[id(model.bert.embeddings.word_embeddings.weight)] == (0.125, 0.1)
    assert [group["lr_factor"] for group in layered_groups(model, 0.1, 1.0)] == [1.0, 1.0]


def test_freezing_and_gradual_unfreezing() -> None:
    model = model_of(3)

    def trained() -> set[int]:
        by_name, _ = depths(model)
        return {by_name[name] for name, parameter in model.named_parameters() if parameter.requires_grad}

    freeze(model, embeddings=True, layers=0)
    assert trained() == {1, 2, 3, 4}
    freeze(model, embeddings=False, layers=1)
    assert trained() == {2, 3, 4}
    unfreezing = Unfreezing(model, 0.5)
    seen = []
    for epoch in (0.0, 0.4, 0.5, 1.0, 3.0):
        unfreezing.advance(epoch)
        seen.append(min(trained()))
    assert seen == [4, 4, 3, 2, 2]
    with pytest.raises(ValueError, match=r"optimizer.freeze_layers is 4; the model has 3 layers"):
        freeze(model, embeddings=False, layers=4)


def test_only_unfrozen_parameters_change(config: FinetuneConfig, base: Path) -> None:
    before = BertModel.from_pretrained(base).state_dict()
    optimizer = {"freeze_embeddings": True, "unfreeze_epochs": 1.0, "layer_decay": 0.9}
    result = finetune(with_(config, epochs=2, optimizer=optimizer, keep_best=False), report=quiet)
    after = result.model.bert.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    layers = {name.split(".")[2] for name in moved if name.startswith("encoder.")}
    assert layers == {"1"}
    assert not any(name.startswith("embeddings.") for name in moved)
    assert "pooler.dense.weight" in moved


def test_early_stopping_keeps_the_best_model(config: FinetuneConfig) -> None:
    changes = {"epochs": 20, "patience": 2, "optimizer": {"lr": 1e-2}}
    result = finetune(with_(config, **changes), report=quiet)
    run = result.metrics["run"]
    evaluations = [line for line in read_log(Path(result.folder) / "log.jsonl") if line["kind"] == "eval"]
    best = max(line["accuracy"] for line in evaluations)
    first_best = next(line["step"] for line in evaluations if line["accuracy"] == best)
    assert run["stopped_early"]
    assert run["best_step"] == first_best == run["steps"] - 2 * 6
    assert result.metrics["dev"]["accuracy"] == best
    by_loss = finetune(with_(config, metric="loss", overwrite=True, **changes), report=quiet)
    evaluations = [line for line in read_log(Path(by_loss.folder) / "log.jsonl") if line["kind"] == "eval"]
    assert by_loss.metrics["dev"]["loss"] == pytest.approx(min(line["loss"] for line in evaluations), rel=1e-5)


def test_batches_cover_every_row_once_with_similar_lengths() -> None:
    from bert_fast.tasks.task import Example

    examples = [Example(row, [2] * (2 + row * 7 % 30), [0] * (2 + row * 7 % 30), row % 2) for row in range(50)]
    task = make_task("classification")

    def batches(options: BatchOptions, epoch: int = 0, **more: Any) -> list[list[int]]:
        epoch_batches = Batcher(task, examples, options, seed=5, **more).epoch(epoch)
        return [[example.row for example in batch] for batch in epoch_batches]

    plain = batches(BatchOptions(rows=8))
    assert sorted(row for batch in plain for row in batch) == list(range(50))
    assert [len(batch) for batch in plain] == [8] * 6 + [2]
    assert plain == batches(BatchOptions(rows=8))
    assert plain != batches(BatchOptions(rows=8), 1)
    bucketed = batches(BatchOptions(rows=8, bucket=7))
    ranges = [max(row * 7 % 30 for row in batch) - min(row * 7 % 30 for row in batch) for batch in bucketed]
    assert max(ranges) <= 6
    by_tokens = batches(BatchOptions(tokens=60))
    assert sorted(row for batch in by_tokens for row in batch) == list(range(50))
    assert max(sum(2 + row * 7 % 30 for row in batch) for batch in by_tokens) <= 60
    examples = [Example(row, [2, 3], [0, 0], int(row < 5)) for row in range(500)]
    drawn = [row < 5 for batch in batches(BatchOptions(), resample=True) for row in batch]
    assert 0.4 < sum(drawn) / len(drawn) < 0.6


def test_held_out_rows_are_stratified_by_class() -> None:
    split = Split(Table({"text": list(map(str, range(100))), "label": ["a"] * 80 + ["b"] * 20}), {"label": "label"})
    train, dev = hold_out(split, 0.1, 0)
    assert sorted(dev.table["label"]) == ["a"] * 8 + ["b"] * 2
    assert sorted(train.table["text"] + dev.table["text"]) == sorted(split.table["text"])
    assert hold_out(split, 0.1, 0)[1].table["text"] == dev.table["text"]
    assert hold_out(split, 0.1, 1)[1].table["text"] != dev.table["text"]


def test_balanced_weights_and_duplicates_and_empty_rows(config: FinetuneConfig, tmp_path: Path) -> None:
    rows = [{"text": f"good film {n}", "label": "good"} for n in range(6)] + [{"text": "bad", "label": "bad"}] * 2
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"text": " ", "label": "bad"}]))
    (tmp_path / "b.json").write_text(json.dumps([rows[0], {"text": "sad", "label": "bad"}]))
    data = {"train": str(tmp_path / "a.json"), "dev": str(tmp_path / "b.json"), "empty": "drop"}
    messages: list[str] = []
    run = TaskRun(with_(config, data=data, loss={"class_weights": "balanced"}), report=messages.append)
    assert run.loss_options.class_weights is not None
    assert run.loss_options.class_weights.tolist() == pytest.approx([8 / (2 * 2), 8 / (2 * 6)])
    assert any("1 of 9 rows have no text (row 9); dropped" in text for text in messages)
    assert any("1 of 2 rows of" in text and "(row 1): the metrics overestimate" in text for text in messages)
    weight = run.task.weight(run.train_examples, run.loss_options)
    assert weight == pytest.approx(len(run.train_examples))
    assert math.isclose(run.task.weight(run.train_examples, LossOptions()), 8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "classify"}, "task is 'classify'"),
        ({"model": "absent"}, "absent is not a folder; expected a folder with config.json"),
        ({"options": {"stride": 3}}, "classification has no option stride; expected among its options: pooling"),
        ({"text": {"max_length": 64}}, "text.max_length is 64; expected at most 32"),
        ({"metric": "f1"}, "metric is 'f1'; expected one of the metrics of classification: loss, accuracy, macro_f1"),
        ({"metric": "per_class"}, "metric is 'per_class'"),
        ({"loss": {"class_weights": [1.0]}}, "loss.class_weights has 1 numbers; expected 2"),
        ({"task": "regression"}, "train.csv, line 2: 'label' holds 'bad'; expected a number"),
        ({"optimizer": {"warmup_steps": 18.0}}, "optimizer.warmup_steps is 18 of 18 steps"),
        ({"data": {"columns": {"label": "labels"}}}, "has no column 'labels' for label; it has text, label"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_inconsistent_settings_are_refused_before_training(config: FinetuneConfig, changes: Any, message: str) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        finetune(with_(config, **changes), report=quiet)
    assert message in str(error.value)
    assert not Path(config.output_dir).exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": {"train": "a", "empty": "ignore"}}, "empty is 'ignore'; expected one of refuse, drop, fill"),
        ({"optimizer": {"decay": "step"}}, "decay is 'step'"),
        ({"optimizer": {"layer_decay": 0}}, "optimizer.layer_decay is 0"),
        ({"loss": {"class_weights": "heavy"}}, "loss.class_weights is 'heavy'; expected one of none, balanced or"),
        ({"loss": {"class_weights": [1, -1]}}, "expected positive numbers"),
        ({"epochs": 0}, "epochs is 0"),
        ({"batch": {"rows": 0}}, "batch.rows is 0"),
        ({"patience": -1}, "patience is -1"),
        ({"epoch": 1}, "FinetuneConfig has no epoch"),
    ],
    ids=lambda value: None if isinstance(value, str) else json.dumps(value),
)
def test_settings_out_of_range_are_refused(values: dict[str, Any], message: str) -> None:
    needed = {"task": "classification", "model": "m", "output_dir": "o", "data": {"train": "a"}}
    with pytest.raises(ValueError, match=r".") as error:
        from_mapping(FinetuneConfig, {**needed, **values})
    assert message in str(error.value)


def test_public_names_are_exported_and_settings_do_not_import_torch() -> None:
    code = """
import sys
import bert_fast.finetune as package
package.FinetuneConfig, package.MultitaskConfig
assert "torch" not in sys.modules
assert all(getattr(package, name).__name__ == name for name in package.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bf16_learns(config: FinetuneConfig) -> None:
    result = finetune(with_(config, precision="bf16", epochs=20), report=quiet)
    assert result.metrics["dev"]["accuracy"] >= 0.9
