"""`benchmarks.gpu.verify` on the CPU kernels: results from processes, a planted wrong, dying and hanging kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import verify
from bert_fast.kernels import available_impls
from bert_fast.verification import Part, Result, parts, verify_part

FP32 = Part("bias_gelu", "cpu", "cpu", torch.float32)
BF16, FP16 = (FP32._replace(dtype=dtype) for dtype in (torch.bfloat16, torch.float16))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[list[Result]]:
    calls: list[list[Result]] = []

    def record(results: list[Result]) -> str:
        calls.append(results)
        return "a file"

    monkeypatch.setattr(verify, "record", record)
    return calls


@pytest.mark.skipif(not available_impls()["bias_gelu"]["cpu"].ok, reason="the CPU kernels are not built")
def test_the_results_are_those_of_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.run([FP32, BF16], jobs=2, limit=60) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = [verify.line(result) for part in (FP32, BF16) for result in verify_part(part)]
    assert sorted(lines[:-1]) == sorted(expected)
    assert lines[-1] == f"{len(expected)} of {len(expected)} cases ok"


def test_an_implementation_is_recorded_when_its_last_process_ends(
    monkeypatch: pytest.MonkeyPatch, recorded: list[list[Result]], capsys: pytest.CaptureFixture[str]
) -> None:
    dtypes = (torch.float32, torch.bfloat16)
    selected = [Part(op, "triton", "cuda", dtype) for dtype in dtypes for op in ("a", "b")]

    def verified(part: Part, limit: float, folder: Path) -> list[Result]:
        fails = part.op == "b" and part.dtype == torch.bfloat16
        return [Result(*part[:3], str(part.dtype), "small", (), "RuntimeError: no" * fails)]

    monkeypatch.setattr(verify, "verified", verified)
    assert verify.run(selected, jobs=1, limit=1) == 1
    assert sorted((group[0].op, len(group), all(r.ok for r in group)) for group in recorded) == [
        ("a", 2, True),
        ("b", 2, False),
    ]
    output = capsys.readouterr().out
    assert output.index("recorded") < output.index("RuntimeError: no")  # a's record does not wait for b
    assert output.endswith("3 of 4 cases ok\n")


@pytest.mark.parametrize(
    ("program", "problem"),
    [
        (
            "#!/bin/sh\necho CUDA error: misaligned address >&2\nexit 134\n",
            "exit code 134: CUDA error: misaligned address",
        ),
        ("#!/bin/sh\nsleep 60\n", "stopped after 1 s"),
    ],
    ids=["dies", "hangs"],
)
def test_a_process_that_dies_or_hangs_is_a_failed_case(
    program: str, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: list[list[Result]]
) -> None:
    python = tmp_path / "python"
    python.write_text(program.replace("sleep", "exec sleep"))
    python.chmod(0o755)
    monkeypatch.setattr(verify.sys, "executable", str(python))
    (result,) = verify.verified(FP32, 1.0, tmp_path)
    assert (result.ok, result.error) == (False, problem)


def test_only_what_runs_on_a_gpu_is_selected_by_default() -> None:
    assert parts(["bias_gelu"], ["cpu"]) == [FP32, BF16, FP16] or not available_impls()["bias_gelu"]["cpu"].ok
    with pytest.raises(ValueError, match="impls has gpu"):
        parts(None, ["gpu"])
