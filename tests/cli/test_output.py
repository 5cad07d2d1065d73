"""What commands write: every column, atomically, before they print; quiet when nobody reads; safe in a spreadsheet."""

from __future__ import annotations

import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from bert_fast.cli.main import main
from bert_fast.cli.output import FORMATS, prediction_lines, write_predictions
from bert_fast.tasks.io.table import Table

PREDICTIONS = [
    {"label": "p", "probability": 0.75, "scores": {"p": 0.75, "q": 0.25}},
    {"label": "q", "probability": 0.5, "scores": {"p": 0.5, "q": 0.5}},
]
TABLE = Table({"id": ["a1", "b2"], "text": ["one", "two"], "label": ["p", "p"], "row": [7, 8]}, "t", [2, 3])


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_every_column_is_kept_and_none_is_overwritten() -> None:
    lines = prediction_lines(TABLE, PREDICTIONS)
    assert lines[0] == {"row": 2, "id": "a1", "text": "one", "input_label": "p", "input_row": 7, **PREDICTIONS[0]}
    table = Table({"label": ["x"], "input_label": ["y"], "text": ["z"]})
    assert prediction_lines(table, [{"label": "p"}])[0] == {
        "row": 1, "input_input_label": "x", "input_label": "y", "text": "z", "label": "p",
    }  # fmt: skip
    # The id that question-answering repeats in its predictions is written once.
    assert prediction_lines(Table({"id": ["q1"]}), [{"id": "q1", "answer": "a"}]) == [
        {"row": 1, "id": "q1", "answer": "a"}
    ]


def test_one_column_per_class() -> None:
    lines = prediction_lines(TABLE, PREDICTIONS, class_columns=True)
    assert lines[1]["probability_p"] == 0.5
    assert "scores" not in lines[1]
    with pytest.raises(ValueError, match="--class_columns is set; expected a task that predicts classes"):
        prediction_lines(TABLE, [{"value": 1.0}] * 2, class_columns=True)


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_hold_the_same_rows(suffix: str, tmp_path: Path) -> None:
    table = Table({
        "id": [1, 2], "text": ["a,\"b\"\nc", "\u2028\x85 d"], "day": [datetime.date(2024, 1, 2), None],
        "mixed": [1, "x"], "list": [["p", "q"], []],
    })  # fmt: skip
    path = tmp_path / f"out{suffix}"
    write_predictions(table, PREDICTIONS, str(path), class_columns=True)
    rows = read(path)
    assert [row["text"] for row in rows] == table["text"]
    assert [str(row["id"]) for row in rows] == ["1", "2"]
    assert str(rows[0]["day"]) == "2024-01-02"
    assert [float(row["probability_q"]) for row in rows] == [0.25, 0.5]
    assert str(rows[1]["mixed"]) == "x"
    listed = rows[0]["list"]
    assert (json.loads(listed) if isinstance(listed, str) else listed) == ["p", "q"]
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


def test_a_lone_surrogate_is_escaped(tmp_path: Path) -> None:
    table = Table({"text": ["a\ud800", "好"]})
    for suffix in (".jsonl", ".csv"):
        write_predictions(table, PREDICTIONS, str(tmp_path / f"o{suffix}"))
        assert "好" in (tmp_path / f"o{suffix}").read_text(encoding="utf-8")
    assert read(tmp_path / "o.jsonl")[0]["text"] == "a\ud800"


FORMULAS = ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", " =1", "\uff1d1", '=HYPERLINK("http://x")', "-"]
HARMLESS = ["a=1", "-1.5", "+3", "-1e-5", "'=1", "", " a"]


def test_formulas_are_quoted_on_request(tmp_path: Path) -> None:
    texts = [*FORMULAS, *HARMLESS]
    table = Table({"=text": texts})
    predictions = [{"label": text, "value": -1.0} for text in texts]
    path = tmp_path / "out.csv"
    write_predictions(table, predictions, str(path))
    assert [row["=text"] for row in read(path)] == texts
    write_predictions(table, predictions, str(path), quote_formulas=True)
    rows = read(path)
    assert [row["'=text"] for row in rows] == ["'" + text for text in FORMULAS] + HARMLESS
    assert [row["label"] for row in rows] == ["'" + text for text in FORMULAS] + HARMLESS
    assert {row["value"] for row in rows} == {"-1.0"}
    write_predictions(table, predictions, str(tmp_path / "out.jsonl"), quote_formulas=True)
    assert [row["label"] for row in read(tmp_path / "out.jsonl")] == texts


def test_predict_keeps_ids_and_labels(finetuned: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.tsv").write_text("id\tsentence\tlabel\tnote\nx1\tone yes two\tno\tn1\nx2\ttwo no one\tno\tn2\n")
    output = tmp_path / "out.csv"
    arguments = ["predict", str(finetuned), "--file", str(tmp_path / "rows.tsv"), "--output", str(output)]
    assert main([*arguments, "--class-columns"]) == 0
    rows = read(output)
    assert list(rows[0]) == [
        "row", "id", "sentence", "input_label", "note", "label", "probability",
        "probability_maybe", "probability_no", "probability_yes",
    ]  # fmt: skip
    assert [(row["id"], row["input_label"], row["label"], row["note"]) for row in rows] == [
        ("x1", "no", "yes", "n1"),
        ("x2", "no", "no", "n2"),
    ]
    assert sum(float(rows[0][f"probability_{label}"]) for label in ("maybe", "no", "yes")) == pytest.approx(1.0)


@pytest.fixture(scope="module")
def pairs(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of pairs, for one step."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = "".join(f"r{n},one,{'one' if n % 2 else 'two'},{'same' if n % 2 else 'other'}\n" for n in range(20))
    (folder / "pairs.csv").write_text("id,sentence1,sentence2,label\n" + rows)
    where = ["--model", str(base / "model"), "--output-dir", str(folder / "run"), "--train", str(folder / "pairs.csv")]
    assert main(["finetune", "classification", *where, "--max-length", "16", "--steps", "1", "--no-progress"]) == 0
    return folder


def test_pairs_from_arguments_lines_and_columns(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    def predicted(*arguments: str) -> list[tuple[str, str, float]]:
        capsys.readouterr()
        assert main(["predict", str(pairs / "run"), *arguments, "--pair"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        names = ("text", "text_pair") if "text" in lines[0] else ("sentence1", "sentence2")
        return [(line[names[0]], line[names[1]], round(line["probability"], 4)) for line in lines]

    expected = predicted("one", "two", "one", "one")
    assert [pair[:2] for pair in expected] == [("one", "two"), ("one", "one")]
    assert expected[0][2] != expected[1][2]
    assert predicted("one\ttwo", "one\tone") == expected
    assert predicted("--pair", "one", "two", "--device", "cpu", "one", "one") == expected, "between options"
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ttwo\none\tone\n"))
    assert predicted() == expected
    (tmp_path / "pairs.txt").write_text("one\ttwo\none\tone\n")
    assert predicted("--file", str(tmp_path / "pairs.txt")) == expected
    (tmp_path / "rows.csv").write_text("sentence1,sentence2,id\none,two,1\none,one,2\n")
    assert predicted("--file", str(tmp_path / "rows.csv")) == expected


def test_pairs_that_are_none_are_refused(
    pairs: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.csv").write_text("text,id\none,1\n")
    for arguments, message in (
        ([str(pairs / "run"), "one"], "arguments, row 1: 1 texts separated by tabs; expected 2, since --pair is set"),
        ([str(pairs / "run"), "a\tb\tc"], "3 texts separated by tabs"),
        ([str(pairs / "run"), "--file", str(tmp_path / "rows.csv")], "no column for text_pair among text, id"),
    ):
        assert main(["predict", *arguments, "--pair"]) == 2
        assert message in capsys.readouterr().err


def closed_pipe(arguments: list[str], *, stderr_too: bool = False) -> tuple[int, str]:
    """Exit code and stderr of a command whose reader has ended before it writes."""
    import os

    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "bert_fast.cli", *arguments],
        stdout=writer,
        stderr=writer if stderr_too else subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize("stderr_too", [False, True], ids=["stdout", "stdout and stderr"])
def test_files_are_complete_when_nobody_reads(base: Path, finetuned: Path, tmp_path: Path, stderr_too: bool) -> None:
    rows = str(base / "rows.csv")
    files = ["--metrics", str(tmp_path / "m.json"), "--output", str(tmp_path / "p.jsonl")]
    code, error = closed_pipe(
        ["evaluate", str(finetuned), rows, "--columns.label", "kind", *files], stderr_too=stderr_too
    )
    assert code == 141
    assert json.loads((tmp_path / "m.json").read_text())["accuracy"] > 0.5
    assert len(read(tmp_path / "p.jsonl")) == 120
    assert "Traceback" not in error
    assert "Broken" not in error


@pytest.mark.parametrize("command", ["predict", "finetune", "help"])
def test_commands_are_quiet_when_nobody_reads(command: str, base: Path, finetuned: Path, tmp_path: Path) -> None:
    arguments = {
        "predict": ["predict", str(finetuned), "one"],
        "finetune": ["finetune", "classification", "--model", str(base / "model"), "--output-dir", str(tmp_path / "r"),
                     "--train", str(base / "rows.csv"), "--columns.label", "kind", "--max-length", "8", "--steps", "1"],
        "help": ["pretrain", "--help"],
    }[command]  # fmt: skip
    code, error = closed_pipe(arguments)
    assert code == (0 if command == "help" else 141)  # argparse ignores that nobody reads its help
    assert (tmp_path / "r" / "model.safetensors").is_file() == (command == "finetune")
    assert "Traceback" not in error
    assert "Broken" not in error


# Runs command lines whose files may have 100 bytes: what a full disk does, after everything is imported.
LIMITED = """
import json, resource, signal, sys, tempfile
import bert_fast.models, bert_fast.tasks.prediction, bert_fast.finetune.comparison, matplotlib.figure, pyarrow.parquet
import bert_fast.tasks.explain, captum.attr, transformers
from bert_fast.cli.main import main
tempfile.gettempdir()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.dont_write_bytecode = True  # Python cuts a .pyc at the limit without an error
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
for arguments in json.loads(sys.argv[1]):
    print(arguments[-1], main(arguments), file=sys.stderr)
"""


def test_a_full_disk_names_the_file_and_keeps_the_old_one(base: Path, finetuned: Path, tmp_path: Path) -> None:
    rows = str(base / "rows.csv")
    predict = ["predict", str(finetuned), "--file", rows, "--output"]
    evaluate = ["evaluate", str(finetuned), rows, "--columns.label", "kind", "--metrics"]
    embed = ["embed", str(finetuned), "one", "two", "three", "--output"]
    commands = {
        **dict.fromkeys(("p.jsonl", "p.csv", "p.parquet"), predict),
        "m.json": evaluate,
        **dict.fromkeys(("v.npy", "v.jsonl", "v.parquet"), embed),
        "e.html": ["explain", str(finetuned), "one", "--steps", "2", "--output"],
        "r.html": ["report", str(finetuned), "--output"],
        "c.html": ["report", str(finetuned), str(finetuned), "--output"],
    }
    for name in commands:
        (tmp_path / name).write_text("old")
    lines = [[*command, str(tmp_path / name)] for name, command in commands.items()]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, json.dumps(lines)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    for name in commands:
        assert f"{tmp_path / name} can't be written: the file would exceed the limit" in done.stderr
        assert f"{tmp_path / name} 2\n" in done.stderr
        assert (tmp_path / name).read_text() == "old"
    assert {entry.name for entry in tmp_path.iterdir()} == set(commands)


def test_outputs_may_be_devices(base: Path, finetuned: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", str(finetuned), str(base / "rows.csv"), "--columns.label", "kind", "--metrics"]
    assert main([*arguments, "/dev/null"]) == 0
    assert not Path("/dev/null").is_file()
    assert main([*arguments, "/dev/full"]) == 2
    assert "/dev/full can't be written: the disk is full" in capfd.readouterr().err


def test_labels_and_texts_reach_no_terminal(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["\x1b[31mred", "\u202ex\nfake  1.0000"]
    rows = [{"text": ("one", "two")[n % 2], "label": labels[n % 2]} for n in range(40)]
    (tmp_path / "a\x1bb.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = ["--model", str(base / "model"), "--output-dir", str(tmp_path / "run\x9b"), "--no-progress"]
    data = ["--train", str(tmp_path / "a\x1bb.jsonl"), "--max-length", "8", "--steps", "1"]
    assert main(["finetune", "classification", *where, *data]) == 0
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert not set(text) & set("\x1b\x9b\u202e")
    assert "\\u001b[31mred" in captured.out
    assert not any(line.startswith("fake") for line in captured.out.splitlines())
    assert main(["predict", str(tmp_path / "run\x9b"), "one\x1b[2J"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == "one\x1b[2J"


def test_no_input_is_overwritten(
    base: Path, finetuned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, texts = tmp_path / "rows.csv", tmp_path / "texts.txt"
    rows.write_text((base / "rows.csv").read_text())
    texts.write_text("one\n")
    (tmp_path / "link.csv").symlink_to(rows)
    before = rows.read_text()
    model = str(base / "model")
    for command in (
        ["predict", str(finetuned), "--file", str(rows), "--output", str(tmp_path / "link.csv")],
        ["evaluate", str(finetuned), str(rows), "--columns.label", "kind", "--output", str(rows)],
        ["evaluate", str(finetuned), str(rows), "--columns.label", "kind", "--metrics", str(rows)],
        ["explain", str(finetuned), "--file", str(texts), "--output", str(texts)],
        ["embed", model, "--file", str(tmp_path / "link.npy"), "--output", str(tmp_path / "link.npy")],
    ):
        if command[0] == "embed":
            (tmp_path / "link.npy").symlink_to(texts)
        assert main(command) == 2
        assert "which is read; expected another file" in capsys.readouterr().err
    assert (rows.read_text(), texts.read_text()) == (before, "one\n")
