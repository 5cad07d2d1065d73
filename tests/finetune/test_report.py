"""The report of a run: self-contained, escaped, complete and deterministic."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bert_fast._html import table
from bert_fast.cli.main import main
from bert_fast.finetune import report as finetune_report
from bert_fast.finetune.report import missing_package, page, write_report
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.metrics import classification_metrics
from bert_fast.tasks.task import make_task

LABELS = ["<b>", "好 $x", "no"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a run with three labels, of whose three predictions the third is wrong."""
    import numpy as np

    folder = tmp_path_factory.mktemp("run")
    scores = np.array([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    dev = {"loss": 0.5, **classification_metrics([0, 1, 2], scores, LABELS)}
    run = {"task": "classification", "steps": 4, "epochs": 2.0, "best_step": 2, "stopped_early": False,
           "tokens_per_second": None, "main_metric": "accuracy"}  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps({"run": run, "dev": dev}))
    settings = {"model": "base", "output_dir": "runs/<mine>", "data": {"train": "rows.csv"}}
    (folder / "finetune.json").write_text(json.dumps(settings))
    log = [{"step": step, "kind": "train", "loss": 1 / step, "lr": 0.1} for step in range(1, 5)]
    log += [{"step": step, "kind": "eval", "loss": 1 / step, "accuracy": step / 6} for step in (2, 4)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    lines = []
    for number, row in enumerate(scores):
        best = int(row.argmax())
        prediction = {"label": LABELS[best], "probability": row[best], "scores": dict(zip(LABELS, row, strict=True))}
        inputs = {"text": f"<script>alert({number})</script>", "label": LABELS[number]}
        error = 0.0 if best == number else 1 - row[number]
        lines.append({"row": number + 2, "input": inputs, "prediction": prediction, "error": error})
    (folder / "predictions.dev.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Reader(HTMLParser):
    """Collects the unclosed tags, all tags, and the URLs that a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_escaped_and_self_contained(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert "script" not in reader.seen
    assert reader.seen.count("svg") == 3
    assert all(target.startswith(("#", "data:")) for target in reader.fetched)
    assert "classification: &lt;mine&gt;" in text
    assert '<td>accuracy</td><td class="n">0.6667</td>' in text
    assert '<tr><td>&lt;b&gt;</td><td class="n hit">1</td><td class="n">0</td><td class="n">0</td></tr>' in text
    assert "1 of 3 predictions are wrong" in text
    mistakes = text[text.index("Worst mistakes") : text.index("Settings")]
    assert re.findall(r'<tr><td class="n">(\d+)</td><td class="n">([\d.]+)</td><td>([^<]*)', mistakes) == [
        ("4", "0.9000", "&lt;b&gt;")
    ]
    assert write_report(folder).read_text(encoding="utf-8") == text


def test_the_command_writes_the_report_and_prints_its_path(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert main(["report", str(tmp_path)]) == 2
    assert "metrics.json does not exist; expected a folder written by bert-fast finetune" in capsys.readouterr().err


def test_a_task_without_classes_and_errors() -> None:
    run = {"task": "sentence-embedding", "steps": 1, "epochs": 1.0, "best_step": 1, "stopped_early": False,
           "tokens_per_second": 1.0, "main_metric": "mrr"}  # fmt: skip
    settings = {"model": "m", "output_dir": "o", "data": {"train": "t"}}
    lines = [{"row": 1, "input": {"text": "a"}, "prediction": {"rank": 1, "similarity": 0.5}, "error": None}]
    text = page({"run": run, "dev": {"loss": None, "mrr": 1.0}}, settings, [], lines)
    assert '<td>loss</td><td class="n">undefined</td>' in text
    assert "Worst mistakes" not in text
    assert "Calibration" not in text


def test_cells() -> None:
    html = table([["a", "b"], ["x" * 500, 1234.5], [["p", "q"], 0.25]])
    assert "x" * 400 + " …" in html
    assert "x" * 401 not in html
    assert '<td class="n">1,234</td>' in html
    assert '<td>[&quot;p&quot;, &quot;q&quot;]</td><td class="n">0.2500</td>' in html


def test_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_package() == ""
    monkeypatch.setattr(finetune_report.importlib.util, "find_spec", lambda name: None)
    assert missing_package() == "matplotlib"


@pytest.mark.parametrize(
    ("name", "table", "columns", "predictions", "expected"),
    [
        ("classification", {"text": ["a", "b"], "label": ["p", "q"]}, {"text": "text", "label": "label"},
         [{"label": "p", "scores": {"p": 0.9, "q": 0.1}}, {"label": "p", "scores": {"p": 0.8, "q": 0.2}}], [0.0, 0.8]),
        ("multi-label", {"text": ["a", "b"], "label": ["p", "p,q"]}, {"text": "text", "label": "label"},
         [{"scores": {"p": 0.9, "q": 0.1}}, {"scores": {"p": 0.9, "q": 0.3}}], [0.0, 0.4]),
        ("regression", {"text": ["a", "b"], "label": [1.0, 2.0]}, {"text": "text", "label": "label"},
         [{"value": 1.0}, {"value": -1.0}], [0.0, 3.0]),
        ("token-classification", {"tokens": [["a", "b"], ["c", "d"]], "tags": [["O", "B-X"], ["B-X", "O"]]},
         {"tokens": "tokens", "tags": "tags"}, [{"tags": ["O", "B-X"]}, {"tags": ["O", "O"]}], [0.0, 0.5]),
        ("multiple-choice", {"context": ["a", "b"], "choices": [["x", "y"], ["x", "y"]], "label": [0, 1]},
         {"context": "context", "choices": "choices", "label": "label"},
         [{"choice": 0, "probabilities": [0.7, 0.3]}, {"choice": 0, "probabilities": [0.7, 0.3]}], [0.0, 0.7]),
        ("question-answering", {"question": ["q", "q"], "context": ["red cat", "red cat"],
                                "answers": [{"text": ["red"], "answer_start": [0]}] * 2},
         {"question": "question", "context": "context", "answers": "answers"},
         [{"answer": "red"}, {"answer": "red cat"}], [0.0, 1 / 3]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors_of_predictions(
    name: str, table: Any, columns: Any, predictions: list[dict[str, Any]], expected: list[float]
) -> None:
    task, rows = make_task(name), Table(table)
    task.fit(rows, columns)
    assert task.errors(predictions, rows, columns) == pytest.approx(expected)
