"""Folds, groups, and sweeps: every combination runs once, the best one is found, finished runs are reused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fast._config import from_mapping
from bert_fast.cli.main import main
from bert_fast.finetune import FinetuneConfig, sweep
from bert_fast.finetune.data import Split, hold_out, take_fold
from bert_fast.finetune.grid import combinations, ranked, with_settings
from bert_fast.models import BertConfig, BertModel
from bert_fast.tasks.io.table import Table


def quiet(_: str) -> None:
    pass


@pytest.fixture
def split() -> Split:
    """80 rows of class a and 23 of class b, with about 20 contexts of different sizes."""
    labels = ["a"] * 80 + ["b"] * 23
    contexts = [f"context {row * row % 20}" for row in range(103)]
    columns = {"text": list(map(str, range(103))), "label": labels, "context": contexts}
    return Split(Table(columns), {"label": "label", "context": "context"})


def test_folds_are_stratified_and_partition_the_rows(split: Split) -> None:
    parts = [take_fold(split, 5, fold, 7) for fold in range(5)]
    assert sorted(text for _, dev in parts for text in dev.table["text"]) == sorted(split.table["text"])
    assert {len(dev.table) for _, dev in parts} == {20, 21}
    assert {dev.table["label"].count("b") for _, dev in parts} <= {4, 5}
    for train, dev in parts:
        assert sorted(train.table["text"] + dev.table["text"]) == sorted(split.table["text"])
    assert take_fold(split, 5, 1, 7)[1].table["text"] == parts[1][1].table["text"]
    assert take_fold(split, 5, 1, 8)[1].table["text"] != parts[1][1].table["text"]
    with pytest.raises(ValueError, match=r"has 103 rows; expected at least data.folds, 104"):
        take_fold(split, 104, 0, 0)


def test_groups_stay_together(split: Split) -> None:
    count = len(set(split.table["context"]))
    train, dev = hold_out(split, 0.3, 0, "context")
    assert not set(train.table["context"]) & set(dev.table["context"])
    assert 0.3 * 103 <= len(dev.table) <= 0.3 * 103 + 26
    seen: list[str] = []
    for fold in range(3):
        train, dev = take_fold(split, 3, fold, 0, "context")
        assert not set(train.table["context"]) & set(dev.table["context"])
        seen += dev.table["text"]
    assert sorted(seen) == sorted(split.table["text"])
    with pytest.raises(ValueError, match=f"has {count} different values of 'context'"):
        take_fold(split, count + 1, 0, 0, "context")
    alike = Split(split.table.with_column("context", ["one"] * 103), split.columns)
    assert len(hold_out(alike, 0.1, 0, "context")[1].table) == 10


def test_combinations_are_the_cartesian_product() -> None:
    assert combinations({"a": [1, 2], "b": ["x", "y"]}) == [
        {"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"},
    ]  # fmt: skip
    assert combinations({}) == [{}]
    for wrong in ([], "abc", 3):
        with pytest.raises(ValueError, match=r"grid: a is .*; expected a list of values"):
            combinations({"a": wrong})  # type: ignore[dict-item]


@pytest.fixture
def config(tmp_path: Path) -> FinetuneConfig:
    words = ["yes", "no", "one", "two", "three", "four"]
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertModel(BertConfig(vocab_size=11, max_position_embeddings=16, initializer_range=0.2, **sizes))
    model.save_pretrained(tmp_path / "base")
    rows = [f"{words[2 + n % 4]} {words[n % 2]} {words[2 + n // 4 % 4]},{words[n % 2]}\n" for n in range(160)]
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(rows))
    values: dict[str, Any] = {
        "task": "classification", "model": str(tmp_path / "base"), "output_dir": str(tmp_path / "sweep"),
        "data": {"train": str(tmp_path / "rows.csv")}, "text": {"max_length": 8}, "epochs": 5, "dropout": 0.0,
        "progress": False, "report": False, "device": "cpu",
    }  # fmt: skip
    return from_mapping(FinetuneConfig, values)


def test_settings_are_replaced_by_dotted_names(config: FinetuneConfig) -> None:
    changed = with_settings(config, {"optimizer.lr": 0.5, "epochs": 2, "options.pooling": "mean", "text.long": "tail"})
    assert (changed.optimizer.lr, changed.epochs, changed.options, changed.text.long) == (
        0.5,
        2,
        {"pooling": "mean"},
        "tail",
    )
    assert changed.optimizer.betas == config.optimizer.betas
    for name in ("optimizer.speed", "lr", "epochs.lr", "optimizer.lr.x"):
        with pytest.raises(ValueError, match=f"grid: unknown setting {name}"):
            with_settings(config, {name: 1})
    with pytest.raises(ValueError, match=r"optimizer.lr is -1"):
        with_settings(config, {"optimizer.lr": -1})


def test_the_best_combination_is_kept_and_finished_runs_are_reused(config: FinetuneConfig) -> None:
    grid = {"optimizer.lr": [1e-7, 1e-2]}
    result = sweep(config, grid, folds=2, report=quiet)
    target = Path(config.output_dir)
    assert json.loads((target / "sweep.json").read_text()) == result
    assert result["best"] == 1
    poor, good = result["runs"]
    assert good["mean"] == pytest.approx(sum(good["values"]) / 2)
    assert good["mean"] > 0.9 > poor["mean"]
    assert [run["rank"] for run in ranked(result)] == [1, 2]
    assert good["folders"] == ["002-fold-1", "002-fold-2"]
    held = [
        [json.loads(line)["row"] for line in (target / name / "predictions.dev.jsonl").read_text().splitlines()]
        for name in good["folders"]
    ]
    assert sorted(held[0] + held[1]) == list(range(2, 162))
    assert (target / "002-fold-1" / "model.safetensors").exists()
    assert not (target / "001-fold-1" / "model.safetensors").exists()
    messages: list[str] = []
    assert sweep(config, grid, folds=2, report=messages.append) == result
    assert sum("its results are reused" in message for message in messages) == 4
    with pytest.raises(ValueError, match=r"001-fold-1 exists with other settings"):
        sweep(config, {"optimizer.lr": [1e-6]}, folds=2, report=quiet)
    with pytest.raises(ValueError, match=r"optimizer.decay|decay is 'step'"):
        sweep(config, {"optimizer.decay": ["linear", "step"]}, report=quiet)


def test_a_folder_that_holds_no_finished_run_is_not_deleted(config: FinetuneConfig) -> None:
    notes = Path(config.output_dir) / "001" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("keep me")
    with pytest.raises(FileExistsError, match="001 exists; choose another folder"):
        sweep(config, {}, report=quiet)
    assert notes.read_text() == "keep me"


def test_a_metric_for_which_lower_is_better(config: FinetuneConfig) -> None:
    result = sweep(with_settings(config, {"metric": "loss"}), {"optimizer.lr": [1e-2, 1e-7]}, keep="all", report=quiet)
    assert result["metric"] == "loss"
    assert result["best"] == 0
    assert (Path(config.output_dir) / "002" / "model.safetensors").exists()


def test_the_command_prints_the_table(
    config: FinetuneConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "sweep.yaml").write_text("grid:\n  optimizer.lr: [1.0e-7, 1.0e-2]\ntext:\n  max_length: 8\n")
    arguments = ["--config", str(tmp_path / "sweep.yaml"), "--model", config.model, "--output_dir", config.output_dir]
    more = ["--data.train", config.data.train, "--progress", "false", "--report", "false", "--epochs", "3"]
    assert main(["sweep", "classification", *arguments, *more]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "dev accuracy"
    assert out[1].endswith("002  optimizer.lr=0.01")
    assert out[2].endswith("001  optimizer.lr=1e-07")
    assert main(["sweep", "classification", *arguments, *more, "--grid", '{"optimizer.rate": [1]}']) == 2
    assert "grid: unknown setting optimizer.rate" in capsys.readouterr().err
