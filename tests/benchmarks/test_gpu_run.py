"""The scripts for a GPU, without one: the steps of both commands, their limits, and the verdicts of the sanitizer."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import launches, sanitize
from benchmarks.gpu import run as gpu
from bert_fast.kernels import available_impls
from bert_fast.kernels._common.cases import Sample
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.testing import Comparison


@pytest.fixture
def logs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(gpu, "LOGS", tmp_path)
    return tmp_path


def step(name: str, code: str, share: float) -> gpu.Step:
    def run(options: gpu.Options, limit: float) -> list[gpu.Outcome]:
        return [gpu.run(name, [sys.executable, "-c", code], limit)]

    return gpu.Step(name, share, False, run)


def test_the_run_continues_after_a_failure_and_names_what_was_stopped(
    logs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 2.0)  # a busy machine takes a second to end a process, and longer to start one
    polite = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('partial')"
    stubborn = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('on', flush=True)\ntime.sleep(60)"
    )
    steps = [
        step("broken", "print('the reason'); raise SystemExit(3)", 5.0),
        step("polite", polite, 5.0),
        step("stubborn", stubborn, 5.0),
        step("good", "print('fine')", 9.0),
    ]
    counts: list[int] = []
    outcomes = gpu.run_steps(steps, gpu.Options(False, logs), 24.0, lambda outcomes: counts.append(len(outcomes)))
    assert [outcome.result for outcome in outcomes] == ["failed", "stopped", "stopped", "passed"]
    assert outcomes[0].detail == "exit code 3; the reason"
    assert [outcome.detail.partition("; ")[2] for outcome in outcomes[1:3]] == ["partial", "on"]
    assert all(outcome.seconds < 8 for outcome in outcomes)
    assert counts == [1, 2, 3, 4]
    assert "    the reason" in capsys.readouterr().out
    assert "1 of 4 passed" in gpu.table(outcomes)
    (late,) = gpu.run_steps([steps[-1]], gpu.Options(False, logs), 0.0)
    assert (late.result, late.detail) == ("not run", "out of time")


def test_a_run_without_a_device_reports_it_and_runs_nothing(
    logs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(sys, "argv", ["gpu", "bench", "--out", str(logs / "out")])
    assert gpu.main() == 2
    printed = capsys.readouterr()
    assert "no CUDA device: torch.cuda.is_available() is False" in printed.err
    assert printed.out == ""
    assert not list(logs.iterdir())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "cannot import torch" in gpu.device_here()[1]


def test_a_run_is_packed_after_each_step(logs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    (results / "gpu-x").mkdir(parents=True)
    old = results / "gpu-x" / "old.json"
    old.write_text("{}")
    os.utime(old, (1e9, 1e9))
    writes = f"open({str(results / 'gpu-x' / 'new.json')!r}, 'w').write('1')"
    steps = (step("one", writes, 1.0), step("two", "raise SystemExit(1)", 1.0))
    monkeypatch.setattr(gpu, "COMMANDS", {"check": steps})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "bert_fast" / "verified").mkdir(parents=True)
    (tmp_path / "bert_fast" / "verified" / "gpu-x.json").write_text("record")
    flags = ["--seconds", "60", "--results", str(results), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu", "check", *flags])
    assert gpu.main() == 1
    with tarfile.open(out / "gpu_check.tar.gz") as archive:
        names = archive.getnames()
        summary = archive.extractfile("build/gpu/summary_check.txt")
        assert summary is not None
        assert re.search(rb"^one +passed .*\ntwo +failed", summary.read(), re.MULTILINE)
    for name in ("benchmarks/results/gpu-x/new.json", "bert_fast/verified/gpu-x.json", "build/gpu/one.log"):
        assert names.count(name) == 1, name
    assert "benchmarks/results/gpu-x/old.json" not in names


@pytest.mark.parametrize(
    ("carried", "broken", "names"),
    [
        (True, (), ["installation", "import after installation"]),
        (True, ("import after installation",), ["build", "import after build"]),
        (False, (), ["build", "import after build"]),
        (False, ("build",), ["build", "build without kernels"]),
        (False, ("import after build",), ["build", "import after build"]),
    ],
    ids=["carried", "carried for another torch", "built", "too slow", "built for another device"],
)
def test_the_cuda_kernels_are_kept_or_built_and_must_import(
    carried: bool, broken: tuple[str, ...], names: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environments: dict[str, dict[str, str]] = {}

    def run(name: str, command: list[str], limit: float, environment: dict[str, str] | None = None) -> gpu.Outcome:
        environments[name] = environment or {}
        assert "--no-index" in command or command[-1] == "90"
        assert limit > 0
        return gpu.Outcome(name, "failed" if name in broken else "passed", 1.0)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "PREBUILT", tmp_path / "prebuilt")
    (tmp_path / "bert_fast").mkdir()
    if carried:
        (tmp_path / "prebuilt").mkdir()
        (tmp_path / "prebuilt" / "_CUDA.abi3.so").touch()
        (tmp_path / "bert_fast" / "_CUDA.abi3.so").write_text("old")
        loaded = (tmp_path / "bert_fast" / "_CUDA.abi3.so").open()
    outcomes = gpu.build(gpu.Options(False, tmp_path, "90"), 90.0)
    if carried:
        assert loaded.read() == "old"  # as a process that has loaded the module still sees it
        loaded.close()
    assert [outcome.name for outcome in outcomes] == names
    assert ("keep" in [e.get("BERT_FAST_NATIVE") for e in environments.values()]) == carried
    assert (tmp_path / "bert_fast" / "_CUDA.abi3.so").exists() == carried
    if "build" in names:
        assert environments["build"]["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    if "build without kernels" in names:
        assert environments["build without kernels"]["BERT_FAST_NATIVE"] == "0"


@pytest.mark.parametrize(
    ("report", "capability", "expected"),
    [
        (None, "90", "no report of a build"),
        ({"_CUDA": {"built": False, "reason": "no nvcc"}}, "90", "bert_fast._CUDA is not built: no nvcc"),
        ({"_CUDA": {"built": True, "architectures": ["80", "100"], "sources": {}}}, "90", "this device needs 90a"),
        (
            {"_CUDA": {"built": True, "architectures": ["90a"], "sources": {"toy": "0" * 16}}},
            "90",
            "bert_fast._CUDA was built from other sources of toy",
        ),
    ],
)
def test_a_build_without_code_for_the_device_or_of_other_sources_is_a_failure(
    report: dict[str, object] | None, capability: str, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "bert_fast").mkdir()
    (tmp_path / "bert_fast" / "_CUDA.py").touch()  # an empty module in its place
    (tmp_path / "bert_fast" / "__init__.py").touch()
    for folder in ("common", "toy"):
        (tmp_path / "csrc" / folder).mkdir(parents=True)
    for name in ("common/dropout.h", "common/tensor.h", "toy/cuda.cu"):
        (tmp_path / "csrc" / name).write_text(name)
    shutil.copy(gpu.ROOT / "csrc" / "build_flags.py", tmp_path / "csrc")
    if report is not None:
        (tmp_path / "bert_fast" / "_build_info.json").write_text(json.dumps(report))
    command = [sys.executable, "-c", gpu.IMPORTS, capability]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert expected in done.stderr
    sources = {"toy": runpy.run_path(str(tmp_path / "csrc" / "build_flags.py"))["cuda_sources_hash"](tmp_path, "toy")}
    built = {"_CUDA": {"built": True, "architectures": ["80", "90a"], "sources": sources}}
    (tmp_path / "bert_fast" / "_build_info.json").write_text(json.dumps(built))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "bert_fast._CUDA imports, with code for 80, 90a\n")


@pytest.mark.parametrize("limit", [13.0, 200.0])
def test_a_benchmark_stops_before_its_limit(limit: float, tmp_path: Path) -> None:
    flags = gpu.recorded(gpu.Options(False, tmp_path), limit)
    assert float(flags[flags.index("--budget") + 1]) + gpu.GRACE <= limit
    assert "--quick" in flags
    assert "--quick" not in gpu.recorded(gpu.Options(True, tmp_path), limit)


def test_the_steps_fit_the_lease() -> None:
    assert sum(step.share for step in gpu.COMMANDS["check"]) <= 300
    assert sum(step.share for step in gpu.COMMANDS["bench"]) <= 390


@pytest.mark.parametrize("rehearsal", [False, True])
def test_every_command_of_the_steps_exists(rehearsal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands: dict[str, list[str]] = {}

    def run(name: str, command: list[str], *_: object) -> gpu.Outcome:
        commands[name] = command
        return gpu.Outcome(name, "passed", 0.0)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "PREBUILT", tmp_path / "none")  # else its modules replace those of this process
    (tmp_path / ("cpu-x" if rehearsal else "nvidia-x")).mkdir()
    for steps in gpu.COMMANDS.values():
        for step in steps:
            step.run(gpu.Options(False, tmp_path, "90", rehearsal), step.share)
    modules = {name: command[2:4] for name, command in commands.items() if command[1] == "-m"}
    # Not pip: looking it up makes setuptools leave the standard library's distutils to it for the rest of the process.
    ours = {module for module, _ in modules.values() if module.startswith(("benchmarks", "bert_fast"))}
    assert all(importlib.util.find_spec(module) for module in ours)
    expected = {
        "launches",
        "tests of Hopper",
        "verify",
        "tests",
        "sanitizer",
        "pretraining",
        "inference",
        "targets",
        "plots",
    }
    assert expected <= commands.keys()
    if not rehearsal:
        of_ops = {
            (command[5], command[command.index("--impls") + 1]) for command in commands.values() if "--impls" in command
        }
        assert {op for op, _ in of_ops} == set(gpu.FIRST_OPS) | set(gpu.LAST_OPS) < set(available_impls())
        assert {op for op, impl in of_ops if impl == "cuda"} == set(gpu.CUDA_OPS)
        own = {op for op in available_impls() if "cuda" in OPS[op].impls and not OPS[op].impls["cuda"].built_on}
        assert set(gpu.CUDA_OPS) == own


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator's run of what a GPU launches")
def test_a_planted_wrong_kernel_is_named_and_the_other_ops_still_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare = launches.compare_sample

    def wrong(sample: Sample, impl: str, device: str, dtype: torch.dtype) -> list[Comparison]:
        rows = compare(sample, impl, device, dtype)
        return [row._replace(ours=row.ours + 1) for row in rows] if "qkv" in sample.inputs else rows

    monkeypatch.setattr(launches, "compare_sample", wrong)
    monkeypatch.setattr(sys, "argv", ["launches", "--device", "cpu"])
    assert launches.main() == 1
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines.pop("attention").startswith("failed: RuntimeError: out: error 1")
    assert lines == {"add_layer_norm": "ok", "bias_gelu": "ok"}


# Python imports it at the start of every process: padding's kernel fails, and the pretraining benchmark hangs.
PLANTED = """
import sys
if "bench" in sys.orig_argv and "padding" in sys.orig_argv:
    import dataclasses
    from bert_fast.kernels import available_impls
    from bert_fast.kernels._common.dispatch import OPS
    def fails():
        raise RuntimeError("planted")
    OPS["padding"].impls["cpu"] = dataclasses.replace(OPS["padding"].impls["cpu"], call=fails)
elif "benchmarks.models.pretraining" in sys.orig_argv:
    import time
    time.sleep(600)
"""


@pytest.mark.skipif(not available_impls()["padding"]["cpu"].ok, reason="needs the compiled CPU kernels")
def test_a_planted_failing_kernel_and_a_planted_hang_lose_no_result(
    logs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rehearsal of `bench` end to end, with a failing step, a hanging one and a good one."""
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "sitecustomize.py").write_text(PLANTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "planted"), prepend=os.pathsep)
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    steps = (
        gpu.Step("failing", 100, True, partial(gpu.benchmarks, ("padding",))),
        gpu.Step("hanging", 12, True, partial(gpu.whole_model, "pretraining")),
        gpu.Step("good", 100, True, partial(gpu.benchmarks, ("lamb",))),
        gpu.Step("targets", 100, False, partial(gpu.after_benchmarks, "targets")),
    )
    monkeypatch.setattr(gpu, "COMMANDS", {"bench": steps})
    monkeypatch.setattr(gpu, "stand_ins", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu", "bench", "--rehearse", "--out", str(tmp_path / "out")])
    assert gpu.main() == 1
    printed = capsys.readouterr().out
    clock = [(name, float(at)) for name, at in re.findall(r"== gpu: (\w+), at (\d+) s, for at most", printed)]
    assert [name for name, _ in clock] == ["failing", "hanging", "good", "targets"]
    assert [at for _, at in clock] == sorted(at for _, at in clock)
    results = {line.split("  ")[0]: line for line in printed.splitlines() if not line.startswith(("==", " "))}
    assert re.search(r"failed .* s  exit code 1", results["benchmark padding cpu"])
    assert re.search(r"stopped .* s  after", results["pretraining"])
    with tarfile.open(tmp_path / "out" / "gpu_bench.tar.gz") as archive:
        names = {Path(name).name: name for name in archive.getnames()}
        report = json.load(archive.extractfile(names["padding_cpu.json"]))  # type: ignore[arg-type]
        assert {"lamb_cpu.json", "targets.json", "summary_bench.txt", "pretraining.log"} <= names.keys()
    peers = [row for row in report["rows"] if row["variant"] == "eager"]
    assert peers
    assert all(row["ms"] for row in peers)
    assert report["failures"]
    assert all("RuntimeError: planted" in failure for failure in report["failures"])


def test_the_sanitizer_begins_with_what_matters_and_leaves_out_false_hazards() -> None:
    runs = sanitize.runs_of(sorted(available_impls()), ["cuda", "triton"], list(sanitize.TOOLS["cuda"]))
    assert runs[:2] == [("memcheck", "attention", "cuda"), ("synccheck", "attention", "cuda")]
    assert set(runs[-2:]) == {("racecheck", "attention", "cuda"), ("initcheck", "attention", "cuda")}
    assert [run for run in runs if not sanitize.counts(*run)] == runs[-2:]
    assert len(runs) == len(set(runs))


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "toy: done: 4 cases\n========= ERROR SUMMARY: 0 errors", "passed"),
        (86, "toy: done: 4 cases\n========= ERROR SUMMARY: 3 errors", "failed"),
        (0, "toy: done: 4 cases\n= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", "passed"),
        (0, "toy: done: 4 cases\n= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)", "failed"),
        (1, "Traceback\nRuntimeError: x\n========= ERROR SUMMARY: 0 errors", "failed"),
        (0, "========= ERROR SUMMARY: 0 errors", "failed"),
        (1, "toy: never launched: triton._fwd_kernel\n========= ERROR SUMMARY: 0 errors", "failed"),
        (1, "========= Error: Device not supported", "not run"),
        (0, "toy: not run: not built\n========= ERROR SUMMARY: 0 errors", "not run"),
    ],
    ids=["clean", "errors", "no hazards", "hazards", "raised", "ended early", "one missed", "no support", "no kernels"],
)
def test_the_sanitizer_passes_only_what_ran_to_its_end(code: int, output: str, expected: str) -> None:
    assert sanitize.judge("memcheck", "toy", "triton", code, output, 1.0)["result"] == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's run of what compute-sanitizer runs on a GPU")
def test_the_sanitizer_launches_every_kernel_of_an_op(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitize, "DTYPES", (torch.float32,))
    kernels = {f"triton._{name}_kernel" for name in ("count", "write", "gather", "scatter")}
    assert sanitize.kernels_of("padding") == kernels
    assert sanitize.run_op("padding", "triton", "cpu") == 0
    assert re.search(r"padding: done: 1 samples, 3 hostile calls .*, 4 Triton kernels", capsys.readouterr().out)
    monkeypatch.setattr(sanitize, "run_samples", lambda *_: 0)  # the hostile calls gather and scatter
    assert sanitize.run_op("padding", "triton", "cpu") == 1
    message = "padding: never launched: triton._count_kernel, triton._write_kernel"
    assert message in capsys.readouterr().out


def test_without_a_device_the_sanitizer_reports_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["sanitize", "--ops", "attention"])
    assert sanitize.main() == 1
    lines = capsys.readouterr().out.splitlines()
    tools = {tuple(line.split()[1:3]) for line in lines}
    assert tools == {(impl, tool) for impl in ("cuda", "triton") for tool in sanitize.TOOLS[impl]}
    assert all(re.match(r"attention +\w+ +\w+ +not run +no CUDA device", line) for line in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the emulator's run of what compute-sanitizer runs on a GPU")
def test_the_sanitizer_runs_the_cuda_kernels_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitize, "DTYPES", (torch.float32,))
    assert sanitize.run_op("attention", "cuda", "cpu") == 0
    assert re.search(r"attention: done: \d+ samples, 7 hostile calls of which 0 raised", capsys.readouterr().out)
