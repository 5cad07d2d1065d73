"""Reports of each kind of task, from the files of runs: marked mistakes, scatter plots, no empty plots, comparisons."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bert_fast.cli.main import main
from bert_fast.finetune.comparison import write_comparison
from bert_fast.finetune.mistakes import Span, _example
from bert_fast.finetune.report import curves, write_report

RUN = {"steps": 4, "epochs": 2.0, "best_step": 2, "stopped_early": False, "tokens_per_second": 9.0}
LOG = [
    {"step": 2, "kind": "train", "loss": 0.5, "lr": 0.1},
    {"step": 4, "kind": "train", "loss": 0.25, "lr": 0.0},
    {"step": 4, "kind": "eval", "loss": 0.5, "f1": 0.5, "accuracy": 0.5},
]
HOSTILE = "cost$x_{$y"


def write_run(
    folder: Path, task: str, metric: str, lines: list[dict[str, Any]], dev: dict[str, Any], **settings: Any
) -> Path:
    """The files of a run."""
    folder.mkdir(parents=True)
    run = {"task": task, "rows": {"train": 1234, "dev": len(lines), "test": None}, **RUN, "main_metric": metric}
    (folder / "metrics.json").write_text(json.dumps({"run": run, "dev": {"loss": 0.5, **dev}}))
    values = {"task": task, "model": "models/base", "output_dir": str(folder), "data": {"train": "secret/path.csv"}}
    (folder / "finetune.json").write_text(json.dumps({**values, **settings}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOG))
    text = "".join(json.dumps({"row": n + 2, **line}, ensure_ascii=False) + "\n" for n, line in enumerate(lines))
    (folder / "predictions.dev.jsonl").write_text(text, encoding="utf-8")
    return folder


class Page(HTMLParser):
    """The marked spans of a page, its tags, and what a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.marks: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []
        assert "script" not in self.tags
        assert all(target.startswith(("#", "data:")) for target in self.fetched)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)
        if tag == "mark":
            self.marks.append((dict(attrs)["class"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "mark" in self.open:
            self.marks[-1] = (self.marks[-1][0], self.marks[-1][1] + ("/" if self.open[-1] == "small" else "") + data)


def page_of(folder: Path) -> tuple[str, Page]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Page(text.replace("<!doctype html>", ""))


LEGEND = [("true", "true"), ("predicted", "predicted")]


def test_entities_are_marked_in_their_sentence(tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {
            "input": {"tokens": ["<b>", "Ada", "of", "Rome"], "tags": ["O", "B-PER", "O", "B-LOC"]},
            "prediction": {"tags": ["O", "B-PER", "I-PER", "O"], "entities": []},
            "error": 0.5,
        },
        {"input": {"tokens": ["a"], "tags": ["O"]}, "prediction": {"tags": ["O"], "entities": []}, "error": 0.0},
    ]
    text, page = page_of(write_run(tmp_path / HOSTILE, "token-classification", "f1", lines, {"f1": 0.5}))
    assert "1 of 2 predictions are wrong" in text
    assert page.marks == [*LEGEND, ("true", "Ada/PER"), ("true", "Rome/LOC"), ("predicted", "Ada of/PER")]
    assert f"token-classification: {HOSTILE}" in text
    assert page.tags.count("svg") == 1


def test_entities_by_characters_and_plain_tags(tmp_path: Path) -> None:
    by_characters: list[dict[str, Any]] = [
        {
            "input": {"text": "Ada\u2028is (here)", "tags": [{"start": 0, "end": 3, "label": "PER"}]},
            "prediction": {"tags": ["O", "O", "B-LOC"], "entities": []},
            "error": 0.4,
        }
    ]
    _, page = page_of(write_run(tmp_path / "a", "token-classification", "f1", by_characters, {"f1": 0.0}))
    assert page.marks == [*LEGEND, ("true", "Ada/PER"), ("predicted", "(here)/LOC")]
    plain: list[dict[str, Any]] = [
        {
            "input": {"tokens": ["a", "b", "c"], "tags": ["DET", "NOUN", "VERB"]},
            "prediction": {"tags": ["DET", "VERB", "VERB"]},
            "error": 1 / 3,
        }
    ]
    _, page = page_of(write_run(tmp_path / "b", "token-classification", "accuracy", plain, {"accuracy": 0.67}))
    assert page.marks == [*LEGEND, ("true", "b/NOUN"), ("predicted", "b/VERB")]


def test_answers_are_marked_in_their_context(tmp_path: Path) -> None:
    context = "x" * 500 + " Ada lives in <Rome> today. " + "y" * 500
    start = context.index("<Rome>")
    lines: list[dict[str, Any]] = [
        {
            "input": {"question": "where <i>?", "context": context,
                      "answers": {"text": ["<Rome>", "in <Rome>"], "answer_start": [start, start - 3]}},
            "prediction": {"answer": "Ada", "start": 501, "end": 504, "probability": 0.5},
            "error": 1.0,
        },
        {
            "input": {"question": "who?", "context": "nobody here", "answers": {"text": [], "answer_start": []}},
            "prediction": {"answer": "nobody", "start": 0, "end": 6, "probability": 0.5},
            "error": 1.0,
        },
    ]  # fmt: skip
    text, page = page_of(write_run(tmp_path / "r", "question-answering", "f1", lines, {"f1": 0.0}))
    # Of the two overlapping answers the first is marked.
    assert page.marks == [*LEGEND, ("true", "in <Rome>"), ("predicted", "Ada"), ("predicted", "nobody")]
    assert "where &lt;i&gt;?" in text
    assert "… " in text
    assert "x" * 101 not in text
    assert "<p>true: <i>none</i></p>" in text


def test_overlapping_and_distant_spans() -> None:
    line = {"row": 1, "error": 1.0}
    html = _example(line, "a" * 5000, [Span(0, 2, "P"), Span(4000, 4002, "Q")], [Span(0, 2, "P")])
    # The span that differs decides what is shown.
    assert html.count('<mark class="true">aa<small>Q</small></mark>') == 1
    assert len(html) < 1000


def test_a_regression_has_predicted_against_true_values(tmp_path: Path) -> None:
    lines = [
        {"input": {"text": "a", "score": str(value)}, "prediction": {"value": value + 0.5}, "error": 0.5}
        for value in range(3)
    ]
    text, page = page_of(write_run(tmp_path / "r", "regression", "mse", lines, {"mse": 0.25}))
    assert "Predicted against true on dev" in text
    assert page.tags.count("svg") == 2
    assert "3 of 3 predictions differ from the true value" in text
    drawn = text[text.index("Predicted against true") : text.index("Worst mistakes")]
    assert drawn.count("<use ") >= 3  # a point a row
    assert "predicted value" in drawn


def test_counts_are_shown_and_no_paths(tmp_path: Path) -> None:
    lines = [{"input": {"text": "a", "label": "p"}, "prediction": {"label": "p"}, "error": 0.0}]
    folder = write_run(tmp_path / "r", "classification", "accuracy", lines, {"accuracy": 1.0})
    text, _ = page_of(folder)
    before_settings = text[: text.index("<h2>Settings")]
    assert "<td>train rows</td><td>1,234</td>" in before_settings
    assert "secret" not in before_settings
    assert "<td>model</td><td>base</td>" in before_settings
    assert str(tmp_path) not in before_settings


def test_no_plot_is_empty() -> None:
    assert "<svg" not in curves([], "f1", 0)
    only_dev = curves([{"step": 3, "kind": "eval", "loss": None, "f1": 0.5}], "f1", 3)
    assert "f1 on dev" in only_dev
    assert "learning rate" not in only_dev
    assert ">loss<" not in only_dev
    one_value = curves([{"step": 3, "kind": "train", "loss": 0.5, "lr": 0.1}], "f1", 3)
    assert "f1 on dev" not in one_value
    assert (
        one_value.count("<use ")
        > curves([{"step": step, "kind": "train", "loss": 0.5, "lr": 0.1} for step in (3, 4)], "f1", 3).count("<use ")
        - 4
    )
    assert curves([{"step": 1, "kind": "eval", "loss": 1.0, "a$b_{$": 1.0}], "a$b_{$", 1).count("<svg") == 1


def test_pages_are_readable_in_the_dark_and_on_a_phone(tmp_path: Path) -> None:
    lines = [{"input": {"text": "a", "label": "p"}, "prediction": {"label": "p"}, "error": 0.0}]
    text, _ = page_of(write_run(tmp_path / "r", "classification", "accuracy", lines, {"accuracy": 1.0}))
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    style = text[text.index("<style>") : text.index("</style>")]
    light, dark = style.split("@media (prefers-color-scheme: dark)")
    names = set(re.findall(r"(--\w+):", light))
    assert names == set(re.findall(r"(--\w+):", dark))
    assert set(re.findall(r"var\((--\w+)\)", style)) <= names
    assert "svg { max-width: 100%" in dark
    assert ".wide { overflow-x: auto }" in dark


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    lines = [{"input": {"text": "a", "label": "p"}, "prediction": {"label": "p"}, "error": 0.0}]
    first = write_run(tmp_path / HOSTILE, "classification", "accuracy", lines, {"accuracy": 0.75}, seed=1, epochs=2)
    second = write_run(tmp_path / "<b>", "classification", "accuracy", lines, {"accuracy": 0.5, "mcc": None}, seed=2)
    return [first, second]


def test_several_runs_are_compared(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = tmp_path / "png"
    assert main(["report", *map(str, runs), "--png", str(pictures)]) == 0
    written = capsys.readouterr().out.splitlines()
    assert written[0] == str(runs[0] / "comparison.html")
    assert {path.name for path in pictures.iterdir()} == {"loss.png", "accuracy.png", "lr.png"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures.iterdir())
    text = (runs[0] / "comparison.html").read_text(encoding="utf-8")
    page = Page(text.replace("<!doctype html>", ""))
    assert page.tags.count("svg") == 3
    assert '<tr><td>accuracy</td><td class="n">0.7500</td><td class="n">0.5000</td></tr>' in text
    assert '<tr><td>mcc</td><td></td><td class="n">undefined</td></tr>' in text
    assert "<tr><td>seed</td><td>1</td><td>2</td></tr>" in text
    assert "<tr><td>epochs</td><td>2</td><td>null</td></tr>" in text
    assert "<td>output_dir</td>" not in text
    assert "<th>&lt;b&gt;</th>" in text
    assert not (runs[0] / "report.html").exists()
    output = tmp_path / "page.html"
    assert write_comparison([runs[0], runs[0]], output) == [output]
    assert f"<th>{runs[0]}</th>" in output.read_text(encoding="utf-8")  # the same name twice: paths
    assert "<p>none</p>" in output.read_text(encoding="utf-8")


def test_runs_of_two_kinds_and_damaged_files_are_refused(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretraining = tmp_path / "pretraining"
    pretraining.mkdir()
    (pretraining / "pretrain.json").write_text("{}")
    assert main(["report", str(runs[0]), str(pretraining)]) == 2
    assert "is a pretraining run and" in capsys.readouterr().err
    (runs[1] / "metrics.json").write_text('{"run": 3, "dev": {}}')
    for arguments in ([str(runs[1])], [str(runs[0]), str(runs[1])]):
        assert main(["report", *arguments]) == 2
        assert f"{runs[1] / 'metrics.json'}: 'run' is 3; expected an object" in capsys.readouterr().err
    for name, text in (
        ("metrics.json", '{"run": {"steps": 3}, "dev": {}}'),
        ("metrics.json", '{"run": {"task": "x", "main_metric": "f1", "best_step": 1}, "dev": {}}'),
        ("predictions.dev.jsonl", '{"row": 1, "input": {}}\n'),
        ("predictions.dev.jsonl", '{"row": 1, "input": {}, "prediction": {"probability": 0.5}, "error": "x"}\n'),
        ("finetune.json", "[]"),
    ):
        before = (runs[0] / name).read_text()
        (runs[0] / name).write_text(text)
        assert main(["report", str(runs[0])]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert str(runs[0]) in error
        (runs[0] / name).write_text(before)
    with (runs[0] / "predictions.dev.jsonl").open("a") as file:
        file.write("{")
    assert main(["report", str(runs[0])]) == 2
    assert f"{runs[0] / 'predictions.dev.jsonl'}, line 2: not JSON" in capsys.readouterr().err
