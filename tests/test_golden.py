"""Recorded results: they are kept, and a changed definition, kernel or file is seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bert_fast import golden
from bert_fast.cli.main import main
from bert_fast.kernels.bias_gelu.op import OP


def test_the_recorded_results_are_kept() -> None:
    rows = golden.check()
    assert [row for row in rows if not row.ok] == []
    assert len(rows) > 300
    assert golden.FILE.stat().st_size < 300_000


@pytest.fixture
def only_bias_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "OPS", {"bias_gelu": OP})
    monkeypatch.setattr(golden, "HEADS", ())
    monkeypatch.setattr(golden, "training_curve", lambda: torch.zeros(20))


def other_results(factor: float) -> Any:
    """`sample_triples` of kernels and definitions whose results are `factor` times what they were."""
    right = golden.sample_triples

    def triples(*args: Any) -> Any:
        return {
            name: (triple._replace(ours=triple.ours * factor, truth=triple.truth * factor), comparison)
            for name, (triple, comparison) in right(*args).items()
        }

    return triples


def test_other_results_are_seen(only_bias_gelu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "golden.safetensors"
    golden.update(path)
    assert all(row.ok and not row.distance for row in golden.check(path))
    monkeypatch.setattr(golden, "sample_triples", other_results(1 + 1e-10))
    assert {row.name.rsplit("/", 1)[-1] for row in golden.check(path) if not row.ok} == {"float64"}
    monkeypatch.setattr(golden, "sample_triples", other_results(1.5))
    moved = {row.name for row in golden.check(path) if not row.ok}
    assert {"bias_gelu/erf/out/float32", "bias_gelu/erf/out/bfloat16", "bias_gelu/tanh/dx/float64"} <= moved
    assert {row.name for row in golden.update(path)} >= moved
    assert all(row.ok for row in golden.check(path))


def test_a_result_that_is_missing_or_new_is_named(only_bias_gelu: None, tmp_path: Path) -> None:
    path = tmp_path / "golden.safetensors"
    golden.update(path)
    tensors, tolerances, about = golden.read(path)
    tensors["bias_gelu/exact/out/float32"] = tensors.pop("bias_gelu/erf/out/float32")
    save_file(tensors, path, {"tolerances": golden.json.dumps(tolerances), "about": golden.json.dumps(about)})
    notes = {row.name: row.note for row in golden.check(path) if not row.ok}
    assert notes == {
        "bias_gelu/erf/out/float32": "not recorded",
        "bias_gelu/exact/out/float32": "recorded, but no longer computed",
    }


def test_the_training_curve_shows_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = golden.read()[0]["training curve/float32"]
    tiny_model = golden.tiny_model

    def other_model(*args: Any, **options: Any) -> Any:
        model = tiny_model(*args, **options)
        with torch.no_grad():
            model.bert.embeddings.LayerNorm.bias.add_(1e-3)
        return model

    monkeypatch.setattr(golden, "tiny_model", other_model)
    with torch.random.fork_rng(devices=[]):
        other = golden.Value(golden.training_curve(), golden.CURVE_TOLERANCE)
    assert float((other.elements - recorded).abs().max()) > 10 * golden.CURVE_TOLERANCE


def test_the_command(
    only_bias_gelu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "golden.safetensors"
    for function in (golden.check, golden.update, golden.read):
        monkeypatch.setattr(function, "__defaults__", (path,))
    assert main(["verify", "--golden"]) != 0
    assert "--update-golden writes it" in capsys.readouterr().err
    monkeypatch.setattr(golden, "is_checkout", lambda: True)
    assert main(["verify", "--update-golden"]) == 0
    assert main(["verify", "--golden"]) == 0
    assert "results are within their tolerance" in capsys.readouterr().out
    monkeypatch.setattr(golden, "sample_triples", other_results(1.5))
    assert main(["verify", "--golden"]) == 1
    assert "bias_gelu/erf/out/float32" in capsys.readouterr().out
    assert main(["verify", "--update-golden"]) == 0
    assert "beyond their tolerance; recorded in" in capsys.readouterr().out
    monkeypatch.setattr(golden, "is_checkout", lambda: False)
    assert main(["verify", "--update-golden"]) == 2
    assert main(["verify", "--golden", "--ops", "attention"]) == 2
