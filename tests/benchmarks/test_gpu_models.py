"""Whole models compared with transformers: the comparison before timing, and the report."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import gpu_inference, pretraining
from benchmarks.models.gpu_inference import inference
from benchmarks.reports import plots
from benchmarks.runner import whole_models
from benchmarks.runner.whole_models import measure
from bert_fast.bench.devices import Cpu

SCENARIO = whole_models.Scenario("tiny S 8 train", [8, 3], 8)


class EagerCapture:
    """A capture for the CPU: replaying calls the function again."""

    def __init__(self, scale: float = 1.0) -> None:
        self.recorded, self._scale = 0, scale

    def warm_up(self, function: Callable[[], None]) -> None:
        function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        work = function.__self__._train_step  # type: ignore[attr-defined]

        def replay() -> None:
            function()
            work.verdict.mul_(self._scale)

        return replay


@pytest.fixture
def variants() -> dict[str, Any]:
    return whole_models.models("tiny", torch.device("cpu"), ())[0]


def test_inference_is_compared_with_transformers_and_timed(variants: dict[str, Any]) -> None:
    batch = whole_models.batches(SCENARIO, 500, torch.device("cpu"))
    rows = {row.variant: row for row in measure(SCENARIO, variants, batch, Cpu(), 0.01, inference)}
    assert set(rows) == {"transformers", "bert_fast fuse", "bert_fast auto"}
    assert all(row.ms and row.fill == pytest.approx(11 / 16) and not row.refused for row in rows.values())
    with torch.no_grad():
        variants["bert_fast auto"].model.bert.encoder.layer[0].attention.self.qkv.weight.mul_(1.5)
    refused = {
        row.variant: row.refused for row in measure(SCENARIO, variants, batch, Cpu(), 0.01, inference) if not row.ms
    }
    assert list(refused) == ["bert_fast auto"]
    assert re.match(r"wrong: .* from float32, above", refused["bert_fast auto"])


def test_a_training_step_is_compared_and_timed_eager_and_replayed(variants: dict[str, Any]) -> None:
    captures: list[EagerCapture] = []

    def capture() -> EagerCapture:
        captures.append(EagerCapture())
        return captures[-1]

    variants = pretraining.with_graphs(variants, capture)
    ours = variants["bert_fast auto"].model
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    rows = {row.variant: row for row in pretraining.measure_step(SCENARIO, variants, 500, Cpu(), 0.01, 1e12)}
    names = ["transformers", "bert_fast auto", "bert_fast auto, CUDA graph", "bert_fast fuse"]
    assert list(rows) == names
    assert [capture.recorded for capture in captures] == [1]
    times = {name: row.ms for name, row in rows.items() if row.ms}
    assert len(times) == 4
    for name, row in rows.items():
        assert row.tokens_per_s == pytest.approx(11e3 / times[name])
        assert row.mfu == pytest.approx(rows["transformers"].mfu * times["transformers"] / times[name])  # type: ignore[operator]
        assert row.ratio_to_best_peer == pytest.approx(times["transformers"] / times[name])
    assert all(torch.equal(p, before[name]) for name, p in ours.named_parameters())


def test_a_replayed_step_that_differs_is_not_timed(variants: dict[str, Any]) -> None:
    wrong = pretraining.with_graphs(variants, lambda: EagerCapture(1.001))
    rows = {row.variant: row for row in pretraining.measure_step(SCENARIO, wrong, 500, Cpu(), 0.01, 1e12)}
    refused = rows["bert_fast auto, CUDA graph"].refused
    assert refused.startswith("RuntimeError: the replayed step has loss and norm")
    assert all(row.ms for row in rows.values() if not row.refused)
    assert len(rows) == 4


def test_a_failing_variant_of_ours_loses_no_row_and_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--size", "tiny", "--device", "cpu", "--quick", "--record", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_inference", *flags])
    reports: list[list[str]] = []

    class Broken(whole_models.Ours):
        def hidden(self, *batch: Any) -> torch.Tensor:
            reports.append([path.read_text() for path in tmp_path.glob("*/gpu_inference.json")])
            raise RuntimeError("launch of a kernel: invalid device function")

    models = whole_models.models

    def with_a_broken_one(*arguments: Any) -> Any:
        variants, vocabulary = models(*arguments)
        return {"bert_fast cuda": Broken(variants["bert_fast auto"].model, "auto"), **variants}, vocabulary

    monkeypatch.setattr(whole_models, "models", with_a_broken_one)
    assert gpu_inference.main() == 1
    assert "failed: tiny S 32 infer, bert_fast cuda: RuntimeError: launch of a kernel" in capsys.readouterr().err
    (file,) = tmp_path.glob("*/gpu_inference.json")
    report = json.loads(file.read_text())
    assert [row["variant"] for row in report["rows"] if row["refused"]] == ["bert_fast cuda"] * 2
    assert len(report["failures"]) == 2
    assert [bool(texts) for texts in reports] == [False, True]  # the second case finds the first one recorded


def test_compiled_peers_are_timed_after_everything_else_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--size", "tiny", "--device", "cpu", "--quick", "--record", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_inference", *flags])
    monkeypatch.setattr(whole_models, "compiles_at", lambda size, options: (32,))
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    timed: list[tuple[str, list[str]]] = []

    def measure_and_note(scenario: whole_models.Scenario, variants: dict[str, Any], *rest: Any) -> Any:
        timed.append((scenario.name, list(variants)))
        return measure(scenario, variants, *rest)

    monkeypatch.setattr(gpu_inference, "measure", measure_and_note)
    assert gpu_inference.main() == 0
    compiled = ["transformers, torch.compile" in names for _, names in timed]
    assert compiled == [False, False, True, True]
    (file,) = tmp_path.glob("*/gpu_inference.json")
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 8  # the second timing of a case replaces the first


def test_pretraining_is_recorded_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--size", "tiny", "--device", "cpu", "--quick", "--record", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["pretraining", *flags])
    assert pretraining.main() == 0
    assert "| tiny S 32 half filled train | bert_fast auto |" in capsys.readouterr().out
    (file,) = tmp_path.glob("*/pretraining.json")
    report = json.loads(file.read_text())
    assert {row["case"] for row in report["rows"]} == {"tiny S 32 half filled train", "tiny S 32 train"}
    assert all(row["mfu"] > 0 and row["tokens_per_s"] > 0 for row in report["rows"])
    assert {"transformers", "commit", "torch"} <= report["environment"].keys()
    assert [path.name for path in plots.draw_folder(file.parent)] == ["pretraining.svg"]
