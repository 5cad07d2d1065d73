"""Kernels that look faster than they are, and one that is slow: each is caught."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bert_fast import kernels
from bert_fast.bench import compare, fair, runner
from bert_fast.bench.devices import Cpu
from bert_fast.bench.kernels import case_of, plans
from bert_fast.bench.runner import Case
from bert_fast.kernels._common.benchmarks import Benchmark, Plan, normal
from bert_fast.kernels.bias_gelu import bias_gelu

CPU = torch.device("cpu")
LIMITS = {"copy_gbytes_per_s": 1e6, "fp32_gemm_gflops": 1e9, "bf16_gemm_gflops": 1e9}
Kernel = Callable[[Tensor, Tensor, str], Tensor]


def right(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return torch.nn.functional.gelu(x + bias, approximate=approximate)


class ReplaysItsLastResult:
    """Computes the first call alone."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        if self.last is None or self.last.shape != x.shape:
            self.last = right(x, bias, approximate)
        return self.last.clone()


class RemembersByAddress:
    """Computes a result once for each input in memory."""

    def __init__(self) -> None:
        self.results: dict[int, Tensor] = {}

    def __call__(self, x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        if x.data_ptr() not in self.results:
            self.results[x.data_ptr()] = right(x, bias, approximate)
        return self.results[x.data_ptr()].clone()


class SkipsWorkAfterTheCheck:
    """Leaves out half of the rows from the second call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        self.calls += 1
        if self.calls == 1:
            return right(x, bias, approximate)
        half = len(x) // 2
        return torch.cat([right(x[:half], bias, approximate), torch.zeros_like(x[half:])])


def wrong(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return torch.nn.functional.gelu(x, approximate=approximate) + bias


class Slow:
    """Right, and `seconds` later than it could be."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        time.sleep(self.seconds)
        return right(x, bias, approximate)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Cpu:
    monkeypatch.setattr(Cpu, "ceilings", lambda _: dict(LIMITS))
    monkeypatch.setattr(Cpu, "cache_bytes", lambda _: 40_000)
    return Cpu()


@pytest.fixture
def planted() -> Iterator[Callable[[Kernel], None]]:
    """Registers a kernel of bias_gelu as "planted"."""
    names: list[str] = []

    def register(kernel: Kernel) -> None:
        if names:
            kernels.unregister("bias_gelu", names.pop())
        kernels.register("bias_gelu", "planted", lambda x, bias, approximate, **_: kernel(x, bias, approximate))
        names.append("planted")

    yield register
    for name in names:
        kernels.unregister("bias_gelu", name)


def benchmark() -> Benchmark:
    inputs = (normal(CPU, 64, 48), normal(CPU, 48))
    return Benchmark(bias_gelu, inputs, {}, 1e-5, traffic=2 * inputs[0].nbytes)


def case() -> Case:
    made = case_of("bias_gelu", CPU, benchmark(), ["planted"])
    return replace(made, again=lambda: case_of("bias_gelu", CPU, benchmark(), ["planted"]))


def row_of(machine: Cpu) -> runner.Row:
    (row,) = runner.measure("case", case(), machine, LIMITS, 0.02)
    return row


def test_an_honest_kernel_is_timed(machine: Cpu, planted: Callable[[Kernel], None]) -> None:
    planted(right)
    row = row_of(machine)
    assert (row.refused, row.variant) == ("", "bert_fast planted")
    assert row.ms is not None
    assert row.ms_low is not None
    assert row.ms_low <= row.ms <= (row.ms_high or 0.0)
    assert (row.calls or 0) >= 5


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (ReplaysItsLastResult, "wrong in a timed call: error"),
        (RemembersByAddress, "wrong where its inputs were changed in place: error"),
        (SkipsWorkAfterTheCheck, "wrong in a timed call: error"),
        (lambda: wrong, "wrong: error"),
    ],
)
def test_a_kernel_that_cheats_is_refused(
    kernel: Callable[[], Kernel], reason: str, machine: Cpu, planted: Callable[[Kernel], None]
) -> None:
    planted(kernel())
    row = row_of(machine)
    assert row.ms is None
    assert row.refused.startswith(reason)
    assert runner.failures([row])


def test_a_kernel_that_fails_on_other_inputs_is_refused(machine: Cpu, planted: Callable[[Kernel], None]) -> None:
    seen: set[int] = set()

    def fails(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        seen.add(x.data_ptr())
        if len(seen) > len(fair.cases(case(), machine)):
            raise RuntimeError("no more memory for results")
        return right(x, bias, approximate)

    planted(fails)
    assert row_of(machine).refused == "after the timing: RuntimeError: no more memory for results"


def test_nothing_is_faster_than_the_ceilings(
    machine: Cpu, planted: Callable[[Kernel], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(right)
    limits = {**LIMITS, "copy_gbytes_per_s": 1e-4}
    (row,) = runner.measure("case", case(), machine, limits, 0.02)
    assert row.ms is not None  # measured again, the ceiling is higher: the machine was busy before
    monkeypatch.setattr(Cpu, "ceilings", lambda _: limits)
    (row,) = runner.measure("case", case(), machine, limits, 0.02)
    assert row.ms is None
    assert row.refused.startswith("impossible: ")
    assert "GB/s, and the ceiling of this run is 0" in row.refused


def test_the_inputs_of_a_case_are_together_larger_than_the_caches(machine: Cpu) -> None:
    made = fair.cases(case(), machine)
    assert len(made) == 4 * 40_000 // (2 * 64 * 48 * 4) + 1
    inputs = [one.variants["bert_fast planted"].inputs[0] for one in made if one.variants]
    assert not inputs  # nothing is registered here
    fixed = replace(case(), again=None)
    assert fair.cases(fixed, machine) == [fixed]


@pytest.mark.parametrize("which", ["forward", "backward", "forward + backward"])
def test_every_pass_has_other_inputs_in_each_case(which: str, machine: Cpu) -> None:
    def made() -> Benchmark:
        return replace(benchmark(), which=which, dout=normal(CPU, 64, 48))

    first, second = (case_of("bias_gelu", CPU, made(), ["cpu"]).variants["bert_fast cpu"] for _ in range(2))
    assert len(first.inputs) == (2 if which == "forward" else 3)
    for mine, others in zip(first.inputs, second.inputs, strict=True):
        assert mine.data_ptr() != others.data_ptr()
        assert not torch.equal(mine, others)
    plan = Plan("case", lambda: replace(case_of("bias_gelu", CPU, made(), ["cpu"]), again=None))
    assert not runner.run("bias_gelu", [plan], machine, 0.01).get("failures")


def test_a_slower_kernel_is_marked_in_the_comparison(machine: Cpu, planted: Callable[[Kernel], None]) -> None:
    def report(seconds: float) -> compare.Report:
        planted(Slow(seconds))
        return runner.run("bias_gelu", [Plan("case", case)], machine, 0.05)

    before, after = report(0.002), report(0.02)
    (change,) = compare.compare(before, after, 0.05)
    assert change.verdict == "slower"
    assert change.ratio is not None
    assert change.ratio > 3
    assert compare.worse([change])
    (back,) = compare.compare(after, before, 0.05)
    assert (back.verdict, compare.worse([back])) == ("faster", [])


@pytest.mark.parametrize("op", ["add_layer_norm", "attention", "linear"])
def test_an_op_passes_the_second_comparison(op: str, machine: Cpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(fair, "MOST", 2)
    first = min(plans(op, CPU, True, ["cpu"]), key=lambda plan: ("1 x" not in plan.name, len(plan.name)))
    rows = runner.measure(first.name, first.make(), machine, LIMITS, 0.01)
    assert [row.refused for row in rows] == [""] * len(rows)
