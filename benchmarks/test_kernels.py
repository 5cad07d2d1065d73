"""The kernels as pytest-benchmark times them, for its options: --benchmark-compare, --benchmark-save, histograms.

    pytest benchmarks --benchmark-enable --bench-op attention --bench-impl cpu --benchmark-autosave
    pytest benchmarks --benchmark-enable --bench-op attention --bench-impl cpu --benchmark-compare

`bert-fast bench kernels` times the same cases interleaved with their peers. Here too each round has other inputs, and
the result is compared with float64 before and after.
"""

from __future__ import annotations

from itertools import cycle
from typing import Any

import pytest
import torch

from bert_fast.bench import fair, runner
from bert_fast.bench.devices import machine_of
from bert_fast.bench.kernels import plans
from bert_fast.bench.runner import OURS, Case
from bert_fast.kernels import available_impls
from bert_fast.kernels._common.benchmarks import Plan


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    device = torch.device(config.getoption("--bench-device"))
    impls, match = config.getoption("--bench-impl"), config.getoption("--bench-match")
    parameters = [
        pytest.param(plan, impl, id=f"{op}-{plan.name}-{impl}")
        for op in config.getoption("--bench-op") or available_impls()
        for plan in plans(op, device, True, impls, match)
        for impl in implementations_of(plan, impls)
    ]
    metafunc.parametrize(("plan", "impl"), parameters)


def implementations_of(plan: Plan, impls: list[str] | None) -> list[str]:
    """Those that run there, in the dtype of the case; all that are asked for, so that a test says why one doesn't."""
    label = f"{OURS} "
    return impls or [name.removeprefix(label) for name in plan.make().variants if name.startswith(label)]


def test_kernel(plan: Plan, impl: str, benchmark: Any, pytestconfig: pytest.Config) -> None:
    machine = machine_of(pytestconfig.getoption("--bench-device"))
    label = f"{OURS} {impl}"
    case: Case = plan.make()
    outcome = runner.checked(case, machine)
    if label not in outcome.runs:
        pytest.fail(outcome.refused.get(label, f"{impl} does not run here, or not in this dtype"))
    made = fair.cases(case, machine)
    runs = [one.variants[label].run for one in made]
    fair.prepare(made, {label: runs})
    following = cycle(runs)

    def run() -> Any:
        result = next(following)()
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        return result

    benchmark.extra_info.update(error=outcome.errors[label], traffic=case.traffic, flops=case.flops)
    benchmark(run)
    if case.again is not None and outcome.errors[label] is not None:
        assert fair.wrong_on_unseen(case.again(), case, label) == ""
