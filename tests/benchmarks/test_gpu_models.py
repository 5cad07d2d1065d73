"""Whole models compared with transformers: the comparison before timing, and the report."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.models import gpu_inference, pretraining
from benchmarks.reports import plots
from benchmarks.runner import whole_models
from benchmarks.runner.devices import Cpu

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
    rows = {
        row.variant: row
        for row in whole_models.measure(SCENARIO, variants, batch, Cpu(), 0.01, gpu_inference.inference)
    }
    assert set(rows) == {"transformers", "transformers, fused", "bert_fast auto"}
    assert all(row.ms and row.fill == pytest.approx(11 / 16) and not row.refused for row in rows.values())
    with torch.no_grad():
        variants["bert_fast auto"].model.bert.encoder.layer[0].attention.self.qkv.weight.mul_(1.5)
    check = partial(whole_models.check, variants, *batch)
    with pytest.raises(SystemExit, match=r"bert_fast auto: .* from float32"):
        check("tiny")


def test_a_training_step_is_compared_and_timed_eager_and_replayed(variants: dict[str, Any]) -> None:
    captures: list[EagerCapture] = []

    def capture() -> EagerCapture:
        captures.append(EagerCapture())
        return captures[-1]

    variants = pretraining.with_graphs(variants, capture)
    ours = variants["bert_fast auto"].model
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    rows = {row.variant: row for row in pretraining.measure_step(SCENARIO, variants, 500, Cpu(), 0.01, 1e12)}
    names = ["transformers", "bert_fast auto", "bert_fast auto, CUDA graph", "transformers, fused"]
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
    with pytest.raises(SystemExit, match=r"the replayed step has loss and norm .* not timed"):
        pretraining.measure_step(SCENARIO, wrong, 500, Cpu(), 0.01, 1e12)


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
