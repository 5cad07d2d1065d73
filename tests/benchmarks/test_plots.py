"""Plots of recorded benchmarks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.reports import plots

LIMITS = {"copy_gbytes_per_s": 10.0, "fp32_gemm_gflops": 100.0, "bf16_gemm_gflops": 400.0}


def test_every_report_of_a_folder_is_drawn(tmp_path: Path) -> None:
    cells = {"gbytes_per_s": 0.0, "refused": ""}
    rows = [
        {"case": "S 8 forward", "variant": "bert_fast toy", "ms": 0.5, "gflops": 80.0, **cells},
        {"case": "S 8 forward", "variant": "peer", "ms": None, "gflops": None, **cells},
        {"case": "S 8 forward + backward", "variant": "peer", "ms": 123.4, "gflops": 40.0, **cells},
    ]
    about = {"device": "toy", "torch": "0", "commit": "c", "date": "d"}
    (tmp_path / "toy.json").write_text(json.dumps({"environment": about, "ceilings": LIMITS, "rows": rows}))
    (tmp_path / "sanitizer.json").write_text(json.dumps({"results": []}))
    (file,) = plots.draw_folder(tmp_path)
    svg = file.read_text()
    assert file.name == "toy.svg"
    for text in ("0.500 ms", "123 ms", "refused", "bert_fast toy", "S 8", "forward + backward", "bf16 GEMM"):
        assert text in svg, text
    assert len(svg) < 100_000


def test_without_matplotlib_the_message_names_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["plots"])
    assert plots.main() == 1
    assert "pip install matplotlib" in capsys.readouterr().err
