"""Recorded benchmarks compared, drawn and exported: by `bert-fast bench` and in Python."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bert_fast.bench import export, page
from bert_fast.bench.compare import compare, load
from bert_fast.bench.devices import Cpu
from bert_fast.bench.model import DTYPES
from bert_fast.bench.samples import summary
from bert_fast.cli.main import main
from bert_fast.kernels._common import cases

ROW = {"op": "bias_gelu", "case": "(8, 8) forward", "variant": "bert_fast cpu", "refused": ""}


def row(ms: float | None, low: float | None = None, high: float | None = None, **more: Any) -> dict[str, Any]:
    return {**ROW, "ms": ms, "ms_low": low, "ms_high": high, **more}


def write(path: Path, *rows: dict[str, Any], **environment: Any) -> Path:
    about = {"device": "cpu-x", "threads": 2, "busy": False, **environment}
    path.write_text(json.dumps({"schema": "bert_fast.bench/1", "environment": about, "ceilings": {}, "rows": rows}))
    return path


@pytest.mark.parametrize(
    ("old", "new", "verdict"),
    [
        (row(1.0, 0.9, 1.1), row(1.5, 1.4, 1.6), "slower"),
        (row(1.5, 1.4, 1.6), row(1.0, 0.9, 1.1), "faster"),
        (row(1.0, 0.9, 1.3), row(1.5, 1.2, 1.6), "same"),  # the intervals overlap
        (row(1.0, 0.99, 1.01), row(1.04, 1.03, 1.05), "same"),  # less than the threshold
        (row(1.0), row(1.2), "slower"),  # of a file without intervals
        (row(1.0, 0.9, 1.1), row(None, refused="wrong"), "now refused"),
        (row(None, refused="wrong"), row(1.0, 0.9, 1.1), "now timed"),
        (row(None, refused="wrong"), row(None, refused="wrong"), "refused"),
    ],
)
def test_the_verdict_follows_the_intervals_and_the_threshold(
    old: dict[str, Any], new: dict[str, Any], verdict: str, tmp_path: Path
) -> None:
    files = write(tmp_path / "old.json", old), write(tmp_path / "new.json", new)
    (change,) = compare(load(files[0]), load(files[1]), 0.05)
    assert change.verdict == verdict
    assert main(["bench", "compare", *map(str, files)]) == int(verdict in ("slower", "now refused"))


def test_a_slower_peer_is_shown_and_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = write(tmp_path / "old.json", row(1.0, 0.9, 1.1, variant="eager"), row(1.0, 0.9, 1.1), row(1.0, case="b"))
    new = write(tmp_path / "new.json", row(2.0, 1.9, 2.1, variant="eager"), row(1.0, 0.9, 1.1), row(1.0, case="b"))
    assert main(["bench", "compare", str(old), str(new)]) == 0
    out = capsys.readouterr().out
    assert "1 slower, 2 same" in out
    assert "eager  1.000 (0.900 to 1.100)  2.000 (1.900 to 2.100)  2.000  slower" in out


def test_a_variant_that_is_gone_is_worse_and_one_that_is_new_is_not(tmp_path: Path) -> None:
    one = write(tmp_path / "one.json", row(1.0, 0.9, 1.1))
    two = write(tmp_path / "two.json", row(1.0, 0.9, 1.1), row(1.0, 0.9, 1.1, variant="bert_fast mine"))
    assert main(["bench", "compare", str(one), str(two)]) == 0
    assert main(["bench", "compare", str(two), str(one)]) == 1


def test_folders_and_three_files_are_compared_with_the_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "recorded"
    folder.mkdir()
    write(folder / "bias_gelu.json", {k: v for k, v in row(1.0, 0.9, 1.1).items() if k != "op"})  # the file's name
    (folder / "other.json").write_text('{"targets": []}')
    middle = write(tmp_path / "middle.json", row(3.0, 2.9, 3.1), device="cpu-y", busy=True)
    last = write(tmp_path / "last.json", row(2.0, 1.9, 2.1))
    html = tmp_path / "page.html"
    assert main(["bench", "compare", str(folder), str(middle), str(last), "--html", str(html)]) == 1
    captured = capsys.readouterr()
    assert "recorded -> " in captured.out
    assert "1 slower" in captured.out
    assert "1 faster" in captured.out
    assert "device is cpu-y in one and cpu-x in the other" in captured.err
    assert "other processes used the machine in the first" in captured.err
    text = html.read_text()
    assert text.count("<table>") >= 3
    assert "slower" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "bench compare got 0 files; expected two or more"),
        (["a.json"], "bench compare got 1 file; expected two or more"),
        (["missing.json", "report.json"], "missing.json"),
        (["text.json", "report.json"], "text.json"),
        (["list.json", "report.json"], "list.json is [1, 2]; expected an object"),
        (["rows.json", "report.json"], "rows.json is no report of bert-fast bench"),
        (["report.json", "attention.json"], "no op is in both: bias_gelu and attention"),
        (["empty", "report.json"], "empty has no JSON file with rows of a benchmark"),
        (["report.json", "report.json", "--threshold", "-1"], "--threshold is -1.0; expected a relative difference"),
    ],
)
def test_what_cannot_be_compared_is_named(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("not JSON")
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "rows.json").write_text('{"environment": {}, "rows": [{"case": 1}]}')
    (tmp_path / "empty").mkdir()
    write(tmp_path / "report.json", row(1.0))
    write(tmp_path / "attention.json", row(1.0, op="attention"))
    assert main(["bench", "compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bert-fast bench: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_interval_of_the_median_holds_it_with_the_stated_probability() -> None:
    torch.manual_seed(0)
    inside = [
        s.low <= 0.5 <= s.high for s in (summary(times) for times in torch.rand(2000, 25).tolist())
    ]  # the median of a uniform distribution is 0.5
    assert 0.94 <= sum(inside) / len(inside) <= 0.98
    assert summary([3.0]) == (3.0, 3.0, 3.0, 0.0, 0, 1)
    assert summary([1.0, 2.0, 3.0, 4.0, 100.0])[:2] == (3.0, 1.0)
    assert summary([1.0, 2.0, 3.0, 4.0, 100.0]).outliers == 1


def test_bench_kernels_writes_a_report_and_a_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"copy_gbytes_per_s": 1e3, "read_gbytes_per_s": 1e3, "fp32_gemm_gflops": 1e5, "bf16_gemm_gflops": 1e5}
    monkeypatch.setattr(Cpu, "ceilings", lambda _: limits)  # other tests use the machine
    output, html = tmp_path / "out.json", tmp_path / "out.html"
    arguments = ["bias_gelu", "--device", "cpu", "--match", r"^\(128, 3072\) float32 forward", "--impls", "cpu"]
    files = ["--output", str(output), "--html", str(html)]
    assert main(["bench", "kernels", *arguments, "--quick", "--seconds", "0.02", *files]) == 0
    assert "bias_gelu: 2 of 2 cases" in capsys.readouterr().out
    report = json.loads(output.read_text())
    assert report["schema"] == "bert_fast.bench/1"
    assert {"torch", "commit", "threads", "busy", "date"} <= report["environment"].keys()
    timed = [entry for entry in report["rows"] if entry["variant"] == "bert_fast cpu"]
    assert [entry["op"] for entry in timed] == ["bias_gelu"] * 2
    for entry in timed:
        assert entry["ms_low"] <= entry["ms"] <= entry["ms_high"]
        assert entry["peak_mbytes"] >= 128 * 3072 * 4 / 2**20
        assert entry["calls"] >= 5
        assert entry["length"] == 128
    text = html.read_text()
    assert "<svg" in text
    assert not re.search(r'(src|href)="http', text)
    assert main(["bench", "compare", str(output), str(output)]) == 0


def test_the_documented_fields_are_those_of_a_row() -> None:
    from dataclasses import fields

    from bert_fast.bench.runner import Row
    from tests.sources import ROOT

    documented = re.findall(r"^\| `([a-z_, `]+)` \|", (ROOT / "docs/benchmarks.md").read_text(), re.MULTILINE)
    names = {name for cell in documented for name in re.findall(r"[a-z_]+", cell)}
    assert {field.name for field in fields(Row)} <= names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "gelu"], "--ops has gelu; expected some of"),
        (["kernels", "bias_gelu", "--impls", "fastest"], "--impls has fastest; expected some of"),
        (["kernels", "bias_gelu", "--match", "nothing like it", "--device", "cpu"], "fits 'nothing like it'"),
        (["kernels", "bias_gelu", "--match", "(", "--device", "cpu"], "--match is '('"),
        (["model"], "bench model got no model"),
        (["model", "x", "--shapes", "8"], "--shapes has '8'; expected sequences x tokens"),
        (["model", "x", "--precisions", "int4"], "int4"),
        (["kernel"], "did you mean 'kernels'?"),
        (["export"], "the op is ''; expected one of"),
        (["export", "lamb"], "the op is 'lamb'; expected one of"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_model_is_timed_in_each_precision(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cpu, "ceilings", lambda _: {"copy_gbytes_per_s": 1e3, "fp32_gemm_gflops": 1e5})
    from bert_fast.models import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=40,
    )  # fmt: skip
    BertModel(config).save_pretrained(tmp_path / "model")
    arguments = ["bench", "model", str(tmp_path / "model"), "--device", "cpu", "--seconds", "0.02"]
    output = tmp_path / "model.json"
    assert main([*arguments, "--shapes", "1x8", "4x32-half", "--output", str(output)]) == 0
    rows = json.loads(output.read_text())["rows"]
    variants = [f"transformers, {name}" for name in ("fp32", "bf16")] + [f"bert_fast, {name}" for name in DTYPES]
    expected = {(f"{shape} infer", variant) for shape in ("1x8", "4x32-half") for variant in variants}
    assert {(entry["case"], entry["variant"]) for entry in rows} == expected
    assert all(entry["ms"] for entry in rows)
    capsys.readouterr()
    assert main([*arguments, "--shapes", "1x41"]) == 2
    assert "--shapes has 1x41; the model takes up to 40 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("op", export.OPS)
def test_an_exported_definition_computes_what_the_op_computes(op: str) -> None:
    definition = json.loads(export.exported(op, "flashinfer-trace", "float32"))
    torch.manual_seed(0)
    sample = next(sample for sample in cases.load(op).samples() if "dropout 0.1" not in sample.name)
    inputs = {**sample.cast(torch.float32)}
    if op == "linear":
        inputs = {"x": torch.randn(5, 8), "weight": torch.randn(6, 8), "bias": torch.randn(6)}
    namespace: dict[str, Any] = {}
    exec(definition["reference"], namespace)
    given = {name: inputs[name] for name in definition["inputs"]}
    out = namespace["run"](**given)
    assert list(definition["outputs"]) == ["out"]
    shape = definition["outputs"]["out"]["shape"]
    assert out.dim() == len(shape or [])
    sizes: dict[str, int] = {}
    for name, spec in definition["inputs"].items():
        assert len(spec["shape"]) == given[name].dim()
        for axis, size in zip(spec["shape"], given[name].shape, strict=True):
            assert sizes.setdefault(axis, size) == size
    assert [sizes[axis] for axis in shape or []] == list(out.shape)
    assert set(definition["axes"]) == set(sizes)


@pytest.mark.parametrize("op", export.OPS)
def test_an_exported_benchmark_runs_and_verifies_our_kernels(op: str, tmp_path: Path) -> None:
    text = export.exported(op, "hf-kernels", "float32").replace("T = 8192", "T = 256")
    for large, small in (("30522", "50"), ("3072", "32"), ("768", "16")):
        text = text.replace(large, small)
    script = tmp_path / "benchmark_it.py"
    script.write_text(text)
    run = (
        "import sys, torch; from pathlib import Path\n"
        "from kernels.cli import benchmark as b; import bert_fast.kernels as k\n"
        "(found,) = b.discover_benchmark_classes(Path(sys.argv[1]), Path(sys.argv[1]).parent)\n"
        "made = found(); made.kernel = k; torch.manual_seed(0); made.setup()\n"
        f"made.benchmark_{op}()\n"
        f"assert torch.allclose(made.out, made.verify_{op}(), atol=1e-2)\n"
    )
    done = subprocess.run([sys.executable, "-c", run, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pytest_benchmark_compares_with_a_saved_run(tmp_path: Path) -> None:
    from tests.sources import ROOT

    command = [
        sys.executable, "-m", "pytest", "benchmarks", "-q", "-p", "no:cacheprovider", "--benchmark-enable",
        "--benchmark-max-time", "0.02", "--benchmark-min-rounds", "2", "--benchmark-storage", str(tmp_path),
        "--bench-op", "bias_gelu", "--bench-impl", "cpu", "--bench-match", r"^\(128, 3072\) float32 forward$",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    for more, shown in (("--benchmark-autosave", "1 passed"), ("--benchmark-compare", "(NOW)")):
        done = subprocess.run([*command, more], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert shown in done.stdout
        assert "test_kernel[bias_gelu-(128, 3072) float32 forward-cpu]" in done.stdout


def test_a_page_names_failures_and_a_busy_machine() -> None:
    report = {
        "environment": {"device": "cpu <x>", "busy": True},
        "ceilings": {"copy_gbytes_per_s": 10.0},
        "rows": [row(None, refused="wrong: <error>")],
        "failures": ["case, bert_fast cpu: wrong"],
    }
    text = page.of_report(report)
    assert "Other processes used the processor" in text
    assert "failed: case, bert_fast cpu: wrong" in text
    assert "wrong: &lt;error&gt;" in text
    assert "<x>" not in text
