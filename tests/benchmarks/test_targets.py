"""Targets, judged from recorded benchmarks."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import targets
from benchmarks.models import pretraining
from bert_fast.kernels._common import cases


def timing(case: str, variant: str, ms: float | None) -> dict[str, Any]:
    return {"case": case, "variant": variant, "ms": ms}


def test_targets_are_judged_by_the_right_peers(tmp_path: Path) -> None:
    forward, backward = "(8, 8) bfloat16 forward", "(8, 8) bfloat16 backward, dropout"
    full, half = "S 512 bfloat16 forward", "S 512 half filled bfloat16 forward"
    dropout = "S 512 bfloat16 forward + backward, dropout"
    reports = {
        "bias_gelu": [
            timing(forward, "bert_fast triton", 1.0),
            timing(forward, "copy of as many bytes", 0.85),
            timing("(9, 9) bfloat16 forward", "eager", 1.0),
            timing(backward, "copy of as many bytes", 0.74),
        ],
        "bias_gelu_triton": [timing(backward, "bert_fast triton", 1.0)],
        "attention": [
            timing(full, "SDPA flash", 2.0),
            timing(full, "varlen_attn", 0.1),
            timing(full, "bert_fast triton", 2.5),
            timing(full, "bert_fast cuda, with bias", 1.0),
            timing(dropout, "SDPA cuDNN", None),
            timing(dropout, "flash varlen op", 2.9),
            timing(dropout, "SDPA efficient", 9.0),
            timing(dropout, "bert_fast triton", 2.0),
            timing(half, "varlen_attn", 1.0),
            timing(half, "SDPA efficient", 1.9),
            timing(half, "bert_fast triton", 1.0),
        ],
        "attention_cuda": [timing(full, "bert_fast cuda", 2.0), timing(full, "SDPA flash", 2.1)],
    }
    about = {"commit": "c", "date": "d"}
    for op, rows in reports.items():
        report = {
            "environment": about,
            "rows": rows,
            "left_out": [f"{half} + backward"] if op.startswith("attention") else [],
        }
        (tmp_path / f"{op}.json").write_text(json.dumps(report))
    entries = {(entry["op"], entry["case"]): entry for entry in targets.judge_folder(tmp_path)}

    def result(op: str, case: str) -> tuple[Any, ...]:
        entry = entries.pop((op, case))
        return entry["result"], entry.get("ratio"), entry.get("to", entry.get("reason"))

    assert result("bias_gelu", forward) == ("met", 0.85, "copy of as many bytes")
    assert result("bias_gelu", "(9, 9) bfloat16 forward")[::2] == (
        "not measured",
        "no implementation of ours was timed",
    )
    assert result("bias_gelu", backward) == ("missed", 0.74, "copy of as many bytes")
    assert result("attention", full) == ("met", 1.0, "SDPA flash")
    assert result("attention", dropout) == ("missed", 1.45, "flash varlen op")
    assert result("attention", half) == ("met", 1.9, "SDPA efficient")
    assert result("attention", f"{half} + backward")[::2] == ("not measured", "out of time")
    assert {entry["reason"] for entry in entries.values()} == {"no report"}
    assert {op for op, _ in entries} == {"add_layer_norm", "embedding_layer_norm", "pretraining"}


def test_every_target_has_a_quick_case_on_a_gpu() -> None:
    names = {"pretraining": [case.name for size in ("base", "large") for case in pretraining.steps_of(size, True)]}
    for target in targets.TARGETS:
        if target.op not in names:
            benchmarks = cases.load(target.op).benchmarks(torch.device("cuda"), True)
            names[target.op] = [plan.name for plan in benchmarks]
        assert any(re.fullmatch(target.cases, name) for name in names[target.op]), target


def test_targets_without_a_report_are_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["targets", str(tmp_path)])
    assert targets.main() == 0
    written = json.loads((tmp_path / "targets.json").read_text())["targets"]
    assert {entry["result"] for entry in written} == {"not measured"}
    anywhere = [target for target in targets.TARGETS if not target.device]
    assert f"0 met, 0 missed, {len(anywhere)} not measured" in capsys.readouterr().out


def step_row(case: str, variant: str, ms: float, tokens: int) -> dict[str, Any]:
    return {"case": case, "variant": variant, "ms": ms, "tokens_per_s": tokens / ms * 1e3}


@pytest.mark.parametrize(("device", "rate"), [("nvidia-h200", [("missed", 0.819)]), ("nvidia-a100", [])])
def test_the_targets_of_a_training_step(device: str, rate: list[Any], tmp_path: Path) -> None:
    folder = tmp_path / device
    folder.mkdir()
    half, full, large = "base S 512 half filled train", "base S 512 train", "large S 512 train"
    rows = [
        step_row(half, "transformers, torch.compile", 70.0, 8192),
        step_row(half, "transformers", 30.0, 8192),
        step_row(half, "bert_fast triton", 25.0, 8192),
        step_row(half, "bert_fast triton, CUDA graph", 20.0, 8192),
        step_row(full, "transformers, torch.compile", 70.0, 16384),
        step_row(full, "bert_fast triton", 40.0, 16384),
        step_row(full, "bert_fast fuse", 10.0, 16384),
        step_row(large, "bert_fast triton, CUDA graph", 50.0, 8192),
    ]
    about = {"commit": "c", "date": "d"}
    (folder / "pretraining.json").write_text(json.dumps({"environment": about, "rows": rows}))
    entries = [entry for entry in targets.judge_folder(folder) if entry["op"] == "pretraining"]
    assert [(entry["result"], entry["ratio"]) for entry in entries if entry["case"] == full] == [("missed", 1.75)]
    assert [(entry["result"], entry["ratio"]) for entry in entries if entry["case"] == half] == [("met", 3.5)]
    of_large = [
        (entry["result"], entry.get("ratio", entry.get("reason"))) for entry in entries if entry["case"] == large
    ]
    assert of_large == [("not measured", "no peer was timed"), *rate]


def inference_row(variant: str, precision: str, ms: float | None, error: float = 1e-6) -> dict[str, Any]:
    case = "(2, 512) infer BERT-base"
    return {"case": case, "variant": f"{variant}, {precision}", "precision": precision, "ms": ms, "error": error}


def test_targets_of_a_processor_compare_with_the_same_or_a_higher_precision(tmp_path: Path) -> None:
    folder = tmp_path / "cpu-toy"
    folder.mkdir()
    rows = [
        inference_row("OpenVINO", "fp32", 110.0),
        inference_row("OpenVINO", "bf16", 60.0),
        inference_row("ONNX Runtime, dynamic", "int8", 90.0, 2e-2),
        inference_row("bert_fast", "fp32", 100.0),
        inference_row("bert_fast", "bf16", 60.0),
        inference_row("bert_fast", "int8", 30.0, 4e-2),
    ]
    about = {"commit": "c", "date": "d"}
    (folder / "cpu_inference.json").write_text(json.dumps({"environment": about, "rows": rows}))
    measured = [entry for entry in targets.judge_folder(folder) if entry["result"] != "not measured"]
    assert [(entry["result"], entry["ratio"], entry["to"]) for entry in measured] == [
        ("met", 1.1, "OpenVINO, fp32"),
        ("missed", 1.0, "OpenVINO, bf16"),
        ("met", 2.0, "OpenVINO, bf16"),
        ("missed", 0.5, "error of ONNX Runtime, dynamic, int8"),
    ]
