"""Folds, groups, and sweeps: every combination runs once, the best one is found, finished runs are reused."""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bert_fast._config import from_mapping
from bert_fast._lock import OutputBusyError, exclusive
from bert_fast.cli.main import main
from bert_fast.finetune import FinetuneConfig, RunInterruptedError, sweep
from bert_fast.finetune.data import Split, hold_out, take_fold
from bert_fast.finetune.grid import combinations, plan, with_settings
from bert_fast.finetune.loop import Finetuner
from bert_fast.finetune.sweep_page import ranked, read_sweep, write_sweep_page
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


def test_seeds_are_runs_of_one_combination(config: FinetuneConfig) -> None:
    """Mean and sample standard deviation, computed by the statistics module."""
    grid = {"optimizer.lr": np.array([1e-7, 1e-2]), "seed": [3, 1, 2]}
    assert [combination.folders for combination in plan(config, grid, 2)][1][:3] == [
        "002-seed-3-fold-1", "002-seed-3-fold-2", "002-seed-1-fold-1",
    ]  # fmt: skip
    result = sweep(with_settings(config, {"epochs": 2}), grid, report=quiet)
    assert [run["settings"] for run in result["runs"]] == [{"optimizer.lr": 1e-7}, {"optimizer.lr": 1e-2}]
    target = Path(config.output_dir)
    for number, run in enumerate(result["runs"], 1):
        assert run["folders"] == [f"{number:03d}-seed-{seed}" for seed in (3, 1, 2)]
        metrics = [json.loads((target / name / "metrics.json").read_text()) for name in run["folders"]]
        values = [one["dev"]["accuracy"] for one in metrics]
        assert run["values"] == values
        assert run["n"] == 3
        assert run["mean"] == pytest.approx(statistics.mean(values))
        assert run["std"] == pytest.approx(statistics.stdev(values))
        settings = [json.loads((target / name / "finetune.json").read_text()) for name in run["folders"]]
        assert [one["seed"] for one in settings] == [3, 1, 2]
    assert len({tuple(run["values"]) for run in result["runs"]}) == 2
    assert result["best"] == 1
    assert {name for name in os.listdir(target) if (target / name / "model.safetensors").exists()} == {
        "002-seed-3", "002-seed-1", "002-seed-2",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"seed is \[1, 1\]; expected different seeds"):
        plan(config, {"seed": [1, 1]}, 0)


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_an_interrupted_sweep_goes_on(overwrite: bool, config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its third of four runs; finished ones are reused, the interrupted one resumes, and the result is the same."""
    grid = {"optimizer.lr": [1e-3, 1e-2], "seed": [0, 1]}
    config = with_settings(config, {"steps": 6, "overwrite": overwrite})
    whole = sweep(with_settings(config, {"output_dir": config.output_dir + "-whole"}), grid, report=quiet)
    if overwrite:  # an old sweep with other settings
        sweep(with_settings(config, {"steps": 2}), grid, report=quiet)
    target = Path(config.output_dir)
    train_step, count = Finetuner.train_step, 0

    def interrupted(self: Finetuner, batches: Any) -> Any:
        nonlocal count
        count += 1
        if count == 15:
            signal.raise_signal(signal.SIGTERM)
        return train_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "train_step", interrupted)
        with pytest.raises(RunInterruptedError):
            sweep(config, grid, report=quiet)
    partial = read_sweep(target)
    assert not partial["complete"]
    assert [len(run["values"]) for run in partial["runs"]] == [2, 0]
    write_sweep_page(target)
    assert "has not finished" in (target / "report.html").read_text()
    messages: list[str] = []
    result = sweep(config, grid, report=messages.append)
    assert result == whole
    assert [text.split("/")[-1] for text in messages if "reused" in text] == [
        f"001-seed-{seed} exists; its results are reused" for seed in (0, 1)
    ]
    assert any("002-seed-0.unfinished" in text and "at step 3 of 6" in text for text in messages)
    weights = [Path(f"{config.output_dir}{x}", "002-seed-0", "model.safetensors") for x in ("", "-whole")]
    assert weights[0].exists() == weights[1].exists()
    if overwrite:  # a finished one starts again
        messages.clear()
        assert sweep(config, grid, report=messages.append) == whole
        assert not any("reused" in text for text in messages)


def test_an_unfinished_run_with_other_settings_is_refused(
    config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where `finetune` alone would go on with another learning rate."""
    train_step = Finetuner.train_step

    def interrupted(self: Finetuner, batches: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return train_step(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Finetuner, "train_step", interrupted)
        with pytest.raises(RunInterruptedError):
            sweep(config, {"optimizer.lr": [1e-3]}, report=quiet)
    with pytest.raises(ValueError, match=r"001.unfinished exists with other settings \(optimizer.lr 0.001 -> 0.01\)"):
        sweep(config, {"optimizer.lr": [1e-2]}, report=quiet)


def test_two_sweeps_in_one_folder(config: FinetuneConfig) -> None:
    with exclusive(Path(config.output_dir), what="sweep"), pytest.raises(OutputBusyError, match="another sweep"):
        sweep(config, {}, report=quiet)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("metrics.json", {"dev": 3}, r"metrics.json: 'dev' is 3; expected an object"),
        ("metrics.json", {"run": {}}, r"metrics.json: run has no 'main_metric'"),
        ("finetune.json", None, r"finetune.json is not valid JSON"),
    ],
)
def test_damaged_files_are_named(name: str, change: Any, message: str, config: FinetuneConfig) -> None:
    sweep(with_settings(config, {"steps": 1}), {}, report=quiet)
    path = Path(config.output_dir) / "001" / name
    path.write_text("{" if change is None else json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        sweep(with_settings(config, {"steps": 1}), {}, report=quiet)


def test_the_page(config: FinetuneConfig) -> None:
    """Every combination, best first, with mean, deviation and n; settings are escaped; runs are linked."""
    target = Path(config.output_dir)
    (target / "001-seed-0").mkdir(parents=True)
    (target / "001-seed-0" / "report.html").write_text("")
    runs = [
        {"settings": {"text.long": "<b>$x_{$", "optimizer.lr": lr}, "values": values, "n": len(values), "rank": rank,
         "mean": mean, "std": std, "folders": [f"00{number}-seed-{seed}" for seed in range(len(values))]}
        for number, lr, values, mean, std, rank in (
            (1, 1e-5, [0.5, 0.75], 0.625, 0.1768, 2), (2, 3e-5, [0.9, 1.0], 0.95, 0.0707, 1),
            (3, 1e-4, [None], None, None, 3),
        )
    ]  # fmt: skip
    result = {"metric": "accuracy", "folds": 0, "complete": True, "overwrite": False, "best": 1, "runs": runs}
    (target / "sweep.json").write_text(json.dumps(result))
    text = write_sweep_page(target).read_text()
    assert "<b>$x" not in text
    assert text.index("0.9500") < text.index("0.6250") < text.index("undefined")
    assert "0.9000, 1.0000" in text
    assert "sample std" in text
    assert '<a href="001-seed-0/report.html">001-seed-0</a>' in text
    assert "<li>002-seed-0</li>" in text
    assert text.count("<svg") == 2, "the values, and the metric by learning rate"
    assert not re.search(r"<(script|link|img)", text)
    (target / "sweep.json").write_text(json.dumps({**result, "runs": [{**runs[0], "values": ["<b>"]}]}))
    with pytest.raises(ValueError, match=r"sweep\.json: run 1: 'values' is"):
        write_sweep_page(target)


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
    more[more.index("--report") + 1] = "true"
    seeds = ["--output_dir", f"{config.output_dir}-seeds", "--grid", '{"seed": [0, 1]}']
    assert main(["sweep", "classification", *arguments, *more, *seeds]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "dev accuracy, mean ± sample standard deviation of the n runs"
    assert re.fullmatch(r"\d\.\d{4} ± \d\.\d{4} \(n = 2\)  001-seed-0  default settings", out[1])
    assert Path(f"{config.output_dir}-seeds", "report.html").is_file()
    assert main(["sweep", "classification", *arguments, *more, "--grid", '{"optimizer.rate": [1]}']) == 2
    assert "grid: unknown setting optimizer.rate" in capsys.readouterr().err
