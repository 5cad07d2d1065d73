"""finetune, predict and evaluate on the command line, from a tiny model to metrics."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from bert_fast.cli.main import main


def test_finetune_prints_what_it_reads_and_the_metrics(
    base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--model", str(base / "model"), "--output_dir", str(tmp_path / "run"), "--epochs", "1"]
    given = ["--data.train", str(base / "rows.csv"), "--data.columns", '{"label": "kind"}', "--progress", "false"]
    options = ["--text.max_length", "8", "--loss.class_weights", "[1.0, 2.0, 1.0]", "--optimizer.decay", "cosine"]
    assert main(["finetune", "classification", *arguments, *given, *options]) == 0
    out, err = capsys.readouterr()
    assert "rows.csv: 120 rows; text = 'sentence', label = 'kind'" in err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"{metrics['dev']['accuracy']:.4f}" in (tmp_path / "run" / "report.html").read_text()
    assert f"dev accuracy           {metrics['dev']['accuracy']:.4f}" in out
    assert "confusion matrix" in out
    settings = json.loads((tmp_path / "run" / "finetune.json").read_text())
    assert settings["loss"]["class_weights"] == [1.0, 2.0, 1.0]
    assert settings["optimizer"]["decay"] == "cosine"
    assert main(["finetune", "classification", *arguments, *given, *options]) == 2
    assert "run exists; choose another folder, or give --overwrite true" in capsys.readouterr().err


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_predict_from_arguments_stdin_and_files(
    finetuned: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    capsys.readouterr()
    assert main(["predict", str(finetuned), "one yes two", "two no one"]) == 0
    predictions = lines(capsys.readouterr().out)
    assert [(line["row"], line["text"], line["label"]) for line in predictions] == [
        (1, "one yes two", "yes"),
        (2, "two no one", "no"),
    ]
    assert sum(predictions[0]["scores"].values()) == pytest.approx(1.0)
    monkeypatch.setattr("sys.stdin", io.StringIO("one yes two\n\ntwo no one\n"))
    assert main(["predict", str(finetuned)]) == 0
    again = lines(capsys.readouterr().out)
    assert [(line["row"], line["label"]) for line in again] == [(1, "yes"), (3, "no")]
    assert again[0]["scores"] == pytest.approx(predictions[0]["scores"])
    monkeypatch.setattr("sys.stdin", io.StringIO('{"sentence": "one maybe two", "id": 7}\n'))
    assert main(["predict", str(finetuned), "--file", "-"]) == 0
    assert lines(capsys.readouterr().out)[0]["label"] == "maybe"
    (tmp_path / "rows.tsv").write_text("id\tsentence\n1\tone no two\n2\t\n3\tone yes one\n")
    output = tmp_path / "found.csv"
    assert main(["predict", str(finetuned), "--file", str(tmp_path / "rows.tsv"), "--output", str(output)]) == 2
    assert "1 of 3 rows have no text (line 3)" in capsys.readouterr().err
    arguments = ["--file", str(tmp_path / "rows.tsv"), "--output", str(output), "--empty", "drop"]
    assert main(["predict", str(finetuned), *arguments]) == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["sentence"], row["label"]) for row in rows] == [
        ("2", "one no two", "no"),
        ("4", "one yes one", "yes"),
    ]


def test_evaluate_gives_the_metrics_of_the_training(
    base: Path, finetuned: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = [json.loads(line) for line in (finetuned / "predictions.dev.jsonl").read_text().splitlines()]
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(line["input"]) + "\n" for line in written))
    files = ["--metrics", str(tmp_path / "metrics.json"), "--output", str(tmp_path / "found.jsonl")]
    capsys.readouterr()
    assert main(["evaluate", str(finetuned), str(tmp_path / "dev.jsonl"), "--columns.label", "kind", *files]) == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    trained_metrics = json.loads((finetuned / "metrics.json").read_text())["dev"]
    assert metrics["accuracy"] == trained_metrics["accuracy"] == 1.0
    assert metrics["confusion_matrix"] == trained_metrics["confusion_matrix"]
    assert metrics["ece"] == pytest.approx(trained_metrics["ece"], abs=1e-6)
    out = capsys.readouterr().out
    assert "accuracy               1.0000" in out
    assert [line["label"] for line in lines((tmp_path / "found.jsonl").read_text())] == [
        line["input"]["kind"] for line in written
    ]
    (tmp_path / "other.jsonl").write_text('{"sentence": "one", "kind": "never"}\n')
    assert main(["evaluate", str(finetuned), str(tmp_path / "other.jsonl"), "--columns", '{"label": "kind"}']) == 2
    assert "labels unseen in training: 'never' (1 rows); expected maybe, no, yes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "classify"], "classify"),
        (["predict", "absent", "a"], "expected a folder written by bert-fast finetune"),
        (["predict", "{base}/model", "a"], "has no bert_fast_task; expected a model written by bert-fast finetune"),
        (["predict", "{base}/model", "a", "--output", "a.txt"], "expected a file name ending in .jsonl, .csv"),
        (["evaluate", "{base}/model", "absent.csv"], "has no bert_fast_task"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--model", "m", "--output_dir", "o", "--data.train", "t"] if arguments[0] == "finetune" else []
    assert main([argument.replace("{base}", str(base)) for argument in arguments] + where) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_options_of_the_task_come_as_a_mapping(base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = "text,label\n" + "one yes,a;b\ntwo no,b\nthree,\none,a\n" * 3
    (tmp_path / "rows.csv").write_text(rows)
    arguments = ["--model", str(base / "model"), "--output_dir", str(tmp_path / "run"), "--steps", "1"]
    settings = ["--data.train", str(tmp_path / "rows.csv"), "--text.max_length", "8", "--progress", "false"]
    assert main(["finetune", "multi-label", *arguments, *settings, "--options.separator", ";"]) == 0
    entry = json.loads((tmp_path / "run" / "config.json").read_text())["bert_fast_task"]
    assert entry["labels"] == ["a", "b"]
    assert entry["options"]["separator"] == ";"
    assert entry["text"]["max_length"] == 8
    capsys.readouterr()
    assert main(["predict", str(tmp_path / "run"), "one"]) == 0
    assert set(lines(capsys.readouterr().out)[0]["scores"]) == {"a", "b"}
