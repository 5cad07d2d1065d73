"""The benchmarks' own machinery on toy cases: what is timed, refused, aborted, written, drawn and orchestrated."""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tarfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu import run as gpu
from benchmarks.gpu import sanitize as gpu_sanitize
from benchmarks.gpu import targets
from benchmarks.models import fuse_speed, pretraining
from benchmarks.ops.attention_peers import Batch, peers, truth
from benchmarks.reports import plots
from benchmarks.runner import runner
from benchmarks.runner.devices import Cpu, machine_of
from benchmarks.runner.lengths import half_filled
from benchmarks.runner.runner import Case, Plan, Setting, Variant

BENCHES = sorted(gpu.ops() + list(gpu.CPU_OPS))
LIMITS = {"copy_gbytes_per_s": 10.0, "fp32_gemm_gflops": 100.0, "bf16_gemm_gflops": 400.0}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    monkeypatch.setattr(Cpu, "ceilings", lambda _: dict(LIMITS))
    return Cpu()


def waits(seconds: float, result: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        time.sleep(seconds)
        return result

    return run


def refuses() -> Tensor:
    raise RuntimeError("this backend takes no mask\nand more lines")


X = torch.tensor([1.0, -2.0, 4.0])


def toy(**more: Callable[[], Tensor] | Variant) -> Case:
    variants = {"eager": waits(0.004, X), "bert_fast toy": waits(0.002, X + 1e-6), **more}
    return Case(variants, X.double(), 1e-5, traffic=10_000_000)


def test_medians_shares_and_ratios_are_those_of_the_clock(machine: Cpu) -> None:
    eager, ours = runner.measure("toy", toy(), machine, LIMITS, 0.05)
    assert (eager.variant, ours.variant, ours.timing) == ("eager", "bert_fast toy", "calls")
    assert eager.ms is not None
    assert ours.ms is not None
    assert 4 <= eager.ms < 40
    assert 2 <= ours.ms < eager.ms
    assert ours.gbytes_per_s == pytest.approx(10.0 / ours.ms)
    assert ours.share_of_ceiling == pytest.approx(1.0 / ours.ms)
    assert ours.ratio_to_best_peer == pytest.approx(eager.ms / ours.ms)
    assert ours.error == pytest.approx(1e-6 / 4, rel=0.1)


@pytest.mark.parametrize(("dtype", "product"), [(torch.float32, 100.0), (torch.float16, 400.0)], ids=str)
def test_flops_are_held_against_the_product_of_the_dtype(machine: Cpu, dtype: torch.dtype, product: float) -> None:
    case = Case({"eager": waits(0.001, X)}, X, 0.0, flops=10**8, dtype=dtype)
    (row,) = runner.measure("toy", case, machine, LIMITS, 0.01)
    assert row.gflops is not None
    assert row.share_of_ceiling == pytest.approx(row.gflops / product)


def test_a_wrong_result_of_ours_ends_the_run(machine: Cpu) -> None:
    with pytest.raises(SystemExit, match=r"toy, bert_fast wrong: error .* nothing was reported"):
        runner.measure("toy", toy(**{"bert_fast wrong": waits(0.0, X + 1)}), machine, LIMITS, 0.01)
    with pytest.raises(RuntimeError, match="takes no mask"):
        runner.measure("toy", toy(**{"bert_fast broken": refuses}), machine, LIMITS, 0.01)
    not_a_number = waits(0.0, X * float("nan"))
    with pytest.raises(SystemExit, match="nothing was reported"):
        runner.measure("toy", toy(**{"bert_fast nan": not_a_number}), machine, LIMITS, 0.01)


def test_a_peer_that_cannot_or_is_wrong_is_listed_with_the_reason(machine: Cpu) -> None:
    case = toy(flash=refuses, other=waits(0.0, X + 1), random=Variant(waits(0.001, -X), comparable=False))
    rows = {row.variant: row for row in runner.measure("toy", case, machine, LIMITS, 0.01)}
    assert rows["flash"].refused == "RuntimeError: this backend takes no mask"
    assert rows["other"].refused.startswith("wrong: error 0.25")
    assert rows["flash"].ms is rows["other"].ms is None
    assert rows["random"].error is None
    assert rows["random"].ms is not None
    assert "refused: RuntimeError: this backend" in runner.table(list(rows.values()))


def test_a_report_is_written_and_says_what_was_left_out(machine: Cpu, tmp_path: Path) -> None:
    plans = [Plan("(1, 3) float32 forward", toy), Plan("(2, 3) float32 forward", toy)]
    report = runner.run("toy", plans, machine, 0.01)
    file = runner.write(report, "toy", tmp_path)
    read = json.loads(file.read_text())
    assert file.parent.name == read["environment"]["device"]
    assert read["ceilings"] == LIMITS
    assert [row["case"] for row in read["rows"]] == [plan.name for plan in plans for _ in range(2)]
    assert {"torch", "commit", "date", "threads"} <= read["environment"].keys()
    late = runner.run("toy", plans, machine, 0.01, budget=0.0)
    assert late["left_out"] == [plan.name for plan in plans]


@pytest.mark.parametrize("name", BENCHES)
@pytest.mark.parametrize("on_gpu", [False, True], ids=["cpu", "gpu"])
def test_every_benchmark_names_its_cases_apart(name: str, on_gpu: bool) -> None:
    setting = Setting(torch.device("cuda" if on_gpu else "cpu"), quick=False)
    plans_of = importlib.import_module(f"benchmarks.{name}").plans
    names = [plan.name for plan in plans_of(setting)]
    quick = [plan.name for plan in plans_of(Setting(setting.device, quick=True))]
    assert bool(names) != (on_gpu and name in gpu.CPU_OPS)
    assert len(set(names)) == len(names)
    assert set(quick) <= set(names)


def test_half_filled_batches_have_the_stated_mean() -> None:
    lengths = half_filled(100, 512)
    assert lengths.count(512) == 23
    assert sum(lengths) / 100 == pytest.approx(254, abs=0.5)
    assert min(lengths) >= 1


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_peers_of_attention_compute_attention(backward: bool) -> None:
    lengths = [5, 9, 1]
    batch = Batch(torch.randn(15, 3, 2, 8), torch.randn(15, 2, 8), lengths)
    expected = truth(batch, backward)
    found = peers(batch, 0.0, backward, compiled=False)
    math = found["SDPA math (eager)"]
    torch.testing.assert_close(math.result(math.run()).double(), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(NotImplementedError, match="no dropout"):
        peers(batch, 0.1, backward, compiled=False)["varlen_attn"].run()


def test_asking_for_a_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine_of(None).device.type == "cpu"
    with pytest.raises(ValueError, match="no CUDA device"):
        machine_of("cuda")


def report_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    about = {"device": "toy", "torch": "0", "commit": "c", "date": "d"}
    return {"environment": about, "ceilings": LIMITS, "rows": rows}


def test_plots_draw_every_report_of_a_folder(tmp_path: Path) -> None:
    cells = {"gbytes_per_s": 0.0, "refused": ""}
    rows = [
        {"case": "S 8 forward", "variant": "bert_fast toy", "ms": 0.5, "gflops": 80.0, **cells},
        {"case": "S 8 forward", "variant": "peer", "ms": None, "gflops": None, **cells},
        {"case": "S 8 forward + backward", "variant": "peer", "ms": 123.4, "gflops": 40.0, **cells},
    ]
    (tmp_path / "toy.json").write_text(json.dumps(report_of(rows)))
    (tmp_path / "sanitizer.json").write_text(json.dumps({"results": []}))
    (file,) = plots.draw_folder(tmp_path)
    text = file.read_text()
    assert file.name == "toy.svg"
    for said in ("0.500 ms", "123 ms", "refused", "bert_fast toy", "S 8", "forward + backward", "bf16 GEMM"):
        assert said in text, said
    assert len(text) < 100_000


def test_plots_without_matplotlib_say_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(sys, "argv", ["plots"])
    assert plots.main() == 1
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "toy: done: 4 cases\n========= ERROR SUMMARY: 0 errors", "passed"),
        (86, "toy: done: 4 cases\n========= ERROR SUMMARY: 3 errors", "failed"),
        (0, "toy: done: 4 cases\n= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        (0, "toy: done: 4 cases\n= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", "failed"),
        (1, "Traceback\nRuntimeError: x\n========= ERROR SUMMARY: 0 errors", "failed"),
        (0, "========= ERROR SUMMARY: 0 errors", "failed"),
        (1, "toy: never launched: triton_kernels._fwd_kernel\n========= ERROR SUMMARY: 0 errors", "failed"),
        (1, "========= Error: Device not supported", "not run"),
        (0, "toy: not run: not built yet\n========= ERROR SUMMARY: 0 errors", "not run"),
    ],
    ids=["clean", "errors", "no hazards", "hazards", "raised", "ended early", "one missed", "no support", "no kernels"],
)
def test_the_sanitizer_passes_only_what_ran_to_its_end(code: int, output: str, expected: str) -> None:
    assert gpu_sanitize.judge("memcheck", "toy", "triton", code, output, 1.0)["result"] == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's run of what compute-sanitizer runs on a GPU")
def test_the_sanitizer_launches_every_kernel_of_a_op(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_sanitize, "DTYPES", (torch.float32,))
    kernels = {f"triton_kernels._{name}_kernel" for name in ("count", "write", "gather", "scatter")}
    assert gpu_sanitize.kernels_of("padding") == kernels
    assert gpu_sanitize.run_op("padding", "triton", "cpu") == 0
    assert re.search(r"padding: done: 1 cases, 3 malformed calls .*, 4 Triton kernels", capsys.readouterr().out)
    monkeypatch.setattr(gpu_sanitize, "verified_cases", lambda *_: 0)  # the malformed calls gather and scatter
    assert gpu_sanitize.run_op("padding", "triton", "cpu") == 1
    said = "padding: never launched: triton_kernels._count_kernel, triton_kernels._write_kernel"
    assert said in capsys.readouterr().out


def test_without_a_device_the_sanitizer_says_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_sanitize", "--ops", "attention"])
    assert gpu_sanitize.main() == 1
    lines = capsys.readouterr().out.splitlines()
    tools = [tuple(line.split()[1:3]) for line in lines]
    assert tools == [(impl, tool) for impl in ("cuda", "triton") for tool in gpu_sanitize.TOOLS[impl]]
    assert all(re.match(r"attention +\w+ +\w+ +not run +no CUDA device", line) for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator's run of what compute-sanitizer runs on a GPU")
def test_the_sanitizer_runs_the_cuda_kernels_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_sanitize, "DTYPES", (torch.float32,))
    assert gpu_sanitize.run_op("attention", "cuda", "cpu") == 0
    assert re.search(r"attention: done: \d+ cases, 7 malformed calls of which 0 refused", capsys.readouterr().out)


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    return tmp_path


def step(name: str, code: str, share: float) -> gpu.Step:
    def run(options: gpu.Options, limit: float) -> list[gpu.Outcome]:
        return [gpu.run(name, [sys.executable, "-c", code], limit)]

    return gpu.Step(name, share, False, run)


def test_the_gpu_run_goes_on_after_a_failure_and_names_what_was_cut(
    logs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 2.0)  # a busy machine takes a second to end a process, and more to begin one
    polite = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('what it had')"
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True)\ntime.sleep(60)"
    )
    steps = [
        step("broken", "print('the reason'); raise SystemExit(3)", 5.0),
        step("polite", polite, 5.0),
        step("stubborn", stubborn, 5.0),
        step("good", "print('fine')", 9.0),
    ]
    so_far: list[int] = []
    outcomes = gpu.run_steps(steps, gpu.Options(False, logs), 24.0, lambda found: so_far.append(len(found)))
    assert [outcome.result for outcome in outcomes] == ["failed", "cut", "cut", "passed"]
    assert outcomes[0].detail == "exit code 3; the reason"
    assert [outcome.detail.partition("; ")[2] for outcome in outcomes[1:3]] == ["what it had", "on"]
    assert all(outcome.seconds < 8 for outcome in outcomes)
    assert so_far == [1, 2, 3, 4]
    assert "    the reason" in capsys.readouterr().out
    assert "1 of 4 passed" in gpu.table(outcomes)
    (late,) = gpu.run_steps([steps[-1]], gpu.Options(False, logs), 0.0)
    assert (late.result, late.detail) == ("not run", "the time was over")


def test_a_gpu_run_without_a_device_says_so_and_runs_nothing(
    logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu", "--out", str(logs / "out")])
    assert gpu.main() == 2
    said = capsys.readouterr()
    assert "no CUDA device was found" in said.err
    assert said.out == ""
    assert not list(logs.iterdir())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "can't import torch" in gpu.missing()


def test_a_run_is_packed_after_each_step(logs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    (results / "gpu-x").mkdir(parents=True)
    old = results / "gpu-x" / "old.json"
    old.write_text("{}")
    os.utime(old, (1e9, 1e9))
    writes = f"open({str(results / 'gpu-x' / 'new.json')!r}, 'w').write('1')"
    monkeypatch.setattr(gpu, "STEPS", (step("one", writes, 1.0), step("two", "raise SystemExit(1)", 1.0)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bert_fast" / "verified").mkdir(parents=True)
    (tmp_path / "bert_fast" / "verified" / "gpu-x.json").write_text("record")
    monkeypatch.setattr(sys, "argv", ["gpu", "--results", str(results), "--out", str(out)])
    assert gpu.main() == 1
    with tarfile.open(out / "gpu.tar.gz") as archive:
        names = archive.getnames()
        summary = archive.extractfile("build/gpu/summary.txt")
        assert summary is not None
        assert re.search(rb"^one +passed .*\ntwo +failed", summary.read(), re.MULTILINE)
    for name in ("benchmarks/results/gpu-x/new.json", "bert_fast/verified/gpu-x.json", "build/gpu/one.log"):
        assert names.count(name) == 1, name
    assert "benchmarks/results/gpu-x/old.json" not in names


@pytest.mark.parametrize(("code", "natives"), [(0, [None]), (1, [None, "0"])], ids=["built", "no compiler"])
def test_a_build_that_fails_is_followed_by_one_without_native_code(
    code: int, natives: list[str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[str | None] = []

    def run(name: str, command: list[str], limit: float, environment: dict[str, str]) -> gpu.Outcome:
        seen.append(environment.get("BERT_FAST_NATIVE"))
        assert "--no-index" in command
        assert limit >= 25
        return gpu.Outcome(name, "passed" if seen[-1] == "0" or code == 0 else "failed", 1.0)

    monkeypatch.setattr(gpu, "run", run)
    outcomes = gpu.build(gpu.Options(False, tmp_path), 90.0)
    assert seen == natives
    assert len(outcomes) == len(natives)
    assert outcomes[-1].result == "passed"


@pytest.mark.parametrize("limit", [13.0, 200.0])
def test_a_benchmark_stops_before_its_limit(limit: float, tmp_path: Path) -> None:
    flags = gpu.recorded(gpu.Options(False, tmp_path), limit)
    assert float(flags[flags.index("--budget") + 1]) + gpu.GRACE <= limit
    assert "--quick" in flags
    assert "--quick" not in gpu.recorded(gpu.Options(True, tmp_path), limit)


def test_the_shares_of_the_gpu_run_are_less_than_nine_minutes() -> None:
    assert sum(step.share for step in gpu.STEPS) <= 525


def test_warming_up_checks_every_case_and_times_none(machine: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cpu, "interleaved", lambda *_: pytest.fail("timed"))
    made: list[str] = []
    plans = [Plan(name, lambda name=name: made.append(name) or toy()) for name in ("a", "b")]  # type: ignore[misc,func-returns-value]
    runner.warm(plans, machine)
    assert made == ["a", "b"]
    with pytest.raises(SystemExit, match="nothing was reported"):
        runner.warm([Plan("c", lambda: toy(**{"bert_fast wrong": waits(0.0, X + 1)}))], machine)


def test_an_interrupt_leaves_a_report_of_what_was_measured(machine: Cpu) -> None:
    def interrupted() -> Case:
        raise KeyboardInterrupt

    plans = [Plan("a", toy), Plan("b", interrupted), Plan("c", toy)]
    report = runner.run("toy", plans, machine, 0.01)
    assert {row["case"] for row in report["rows"]} == {"a"}
    assert report["left_out"] == ["b", "c"]


def timing(case: str, variant: str, ms: float | None, share: float = 0.0) -> dict[str, Any]:
    return {"case": case, "variant": variant, "ms": ms, "share_of_ceiling": share}


def test_targets_are_judged_by_the_right_peers(tmp_path: Path) -> None:
    forward, backward = "(8, 8) bfloat16 forward", "(8, 8) bfloat16 backward, dropout"
    full, half = "S 512 bfloat16 forward", "S 512 half filled bfloat16 forward"
    dropout = "S 512 bfloat16 forward + backward, dropout"
    reports = {
        "bias_gelu": [
            timing(forward, "bert_fast triton", 1.0, 0.85),
            timing(forward, "copy of as many bytes", 0.9, 0.99),
            timing("(9, 9) bfloat16 forward", "eager", 1.0, 0.9),
            timing(backward, "bert_fast triton", 1.0, 0.74),
        ],
        "attention": [
            timing(full, "SDPA flash", 2.0),
            timing(full, "varlen_attn", 0.1),
            timing(full, "bert_fast triton", 2.5),
            timing(full, "bert_fast cuda", 2.0),
            timing(full, "bert_fast cuda, with bias", 1.0),
            timing(dropout, "SDPA cuDNN", None),
            timing(dropout, "flash varlen op", 2.9),
            timing(dropout, "SDPA efficient", 9.0),
            timing(dropout, "bert_fast triton", 2.0),
            timing(half, "varlen_attn", 1.0),
            timing(half, "SDPA efficient", 1.9),
            timing(half, "bert_fast triton", 1.0),
        ],
    }
    about = {"commit": "c", "date": "d"}
    for op, rows in reports.items():
        report = {"environment": about, "rows": rows, "left_out": [f"{half} + backward"] if op == "attention" else []}
        (tmp_path / f"{op}.json").write_text(json.dumps(report))
    entries = {(entry["op"], entry["case"]): entry for entry in targets.judge_folder(tmp_path)}

    def result(op: str, case: str) -> tuple[Any, ...]:
        entry = entries.pop((op, case))
        return entry["result"], entry.get("ratio"), entry.get("to", entry.get("reason"))

    assert result("bias_gelu", forward) == ("met", 0.85, "copy bandwidth")
    assert result("bias_gelu", "(9, 9) bfloat16 forward")[::2] == (
        "not measured",
        "no implementation of ours was timed",
    )
    assert result("bias_gelu", backward) == ("missed", 0.74, "copy bandwidth")
    assert result("attention", full) == ("met", 1.0, "SDPA flash")
    assert result("attention", dropout) == ("missed", 1.45, "flash varlen op")
    assert result("attention", half) == ("met", 1.9, "SDPA efficient")
    assert result("attention", f"{half} + backward")[::2] == ("not measured", "the time was over")
    assert {entry["reason"] for entry in entries.values()} == {"the op has no report"}
    assert {op for op, _ in entries} == {"add_layer_norm", "embedding_layer_norm", "pretraining"}


def test_every_target_has_a_quick_case_on_a_gpu() -> None:
    setting = Setting(torch.device("cuda"), quick=True)
    names = {"pretraining": [case.name for size in ("base", "large") for case in pretraining.steps_of(size, True)]}
    for target in targets.TARGETS:
        if target.op not in names:
            plans = importlib.import_module(f"benchmarks.ops.{target.op}").plans(setting)
            names[target.op] = [plan.name for plan in plans]
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


@pytest.mark.parametrize("kind", ["infer", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_is_timed_before_and_after_it_is_fused(dtype: torch.dtype, kind: str, machine: Cpu) -> None:
    size = fuse_speed.Size("tiny", 1, 24, 32, heads=2, vocabulary=50, batch=3, seqlen=8)
    assert size.flops([8, 8]) == 2 * size.flops([8])
    case = fuse_speed.case(Setting(machine.device, quick=True), size, " half filled", dtype, kind)
    rows = runner.measure("tiny", case, machine, LIMITS, 0.01)
    assert [row.variant for row in rows] == ["transformers", "bert_fast fuse"]
    assert all(row.ms and row.error is not None and not row.refused for row in rows)
    ours = case.variants["bert_fast fuse"]
    assert isinstance(ours, Variant)
    wrong = Variant(ours.run, lambda found: ours.result(found) * 1.2)
    with pytest.raises(SystemExit, match="nothing was reported"):
        runner.measure("tiny", replace(case, variants={"bert_fast fuse": wrong}), machine, LIMITS, 0.01)


def test_every_case_of_fuse_is_named_once() -> None:
    names = [plan.name for plan in fuse_speed.plans(Setting(torch.device("cuda"), quick=False))]
    assert len(set(names)) == len(names) == 16
    assert {plots.split(name)[1] for name in names} == {"infer", "train"}
