"""The benchmark runner: variants interleaved in one process, medians, ceilings and errors measured in the same run.

Each variant's result is compared with float64 before it is timed. A variant that raises or is wrong is listed as
refused, with the reason, and not timed; if it is ours the exit code is 1. The printed table and the JSON under
`benchmarks/results/<device>/`, which is rewritten after every case, carry the environment of the run. `devices.py`
documents how calls are timed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner.devices import Call, Machine, environment, machine_of, reason
from bert_fast._io import write_json
from bert_fast.kernels._common.benchmarks import Plan, first
from bert_fast.testing import max_error

RESULTS = Path(__file__).parents[1] / "results"
COMPILED = "torch.compile"  # in the names of variants
OURS = "bert_fast"  # variants whose name starts with it are ours, the others are peers
YARDSTICK = "copy of as many bytes"  # neither: a plain copy of the minimal traffic, timed in the same way
GEMMS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}  # whose product is the ceiling
PRECISIONS = ("int8", "bf16", "fp32")  # in ascending order


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Args:
        run: the call that is timed; returns a tensor or a tuple of tensors.
        result: maps what `run` returned to the tensor that is compared; not timed.
        comparable: False where the result is random, i.e. a peer with a dropout mask of its own.
        precision: one of `PRECISIONS` where the variants of a case differ in it: it chooses the matrix product that is
            the ceiling, and a variant of ours is compared with peers of the same or a higher precision.
        tolerance: replaces that of the case.
    """

    run: Call
    result: Callable[[Any], Tensor] = first
    comparable: bool = True
    precision: str = ""
    tolerance: float | None = None


@dataclass(frozen=True)
class Case:
    """One size of one operation: the ways to compute it, and the exact result.

    Args:
        variants: by name.
        exact: the result in float64.
        tolerance: on the largest absolute error over the largest value of `exact`.
        traffic, flops: bytes that must be read and written, and floating-point operations that must be done.
        dtype: chooses the matrix product that is the ceiling.
        graph: False where a variant waits for the device.
        tokens: real tokens of the batch, where the case is a whole model.
        call: dtype, pass and size, as a record has them (`kernels/_common/times.py`); None where it has no times.
    """

    variants: Mapping[str, Variant]
    exact: Tensor
    tolerance: float
    traffic: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32
    graph: bool = True
    tokens: int = 0
    call: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Row:
    """One variant of one case. A refused variant has no figures; `refused` is the reason."""

    case: str
    variant: str
    ms: float | None = None
    gbytes_per_s: float | None = None
    gflops: float | None = None
    share_of_ceiling: float | None = None
    error: float | None = None
    ratio_to_best_peer: float | None = None
    peak_mbytes: float | None = None
    timing: str = ""
    refused: str = ""
    precision: str = ""
    tokens_per_s: float | None = None
    call: Mapping[str, Any] | None = None  # of the case


@dataclass
class Checked:
    """Results of the comparison before timing, by variant."""

    runs: dict[str, Call] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def passes(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor | None, which: str
) -> Callable[[], Tensor | tuple[Tensor, ...]]:
    """A call that computes `which` pass of `function(*inputs)`.

    Args:
        which: "forward" (without gradients, returns the output), "forward + backward", or "backward" (from one forward
            pass that the first call makes); the latter two return the gradients of the floating-point inputs.
        dout: gradient of the output.
    """
    if which == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    differentiated = [x for x in leaves if x.requires_grad]
    if which == "forward + backward":
        return lambda: torch.autograd.grad(function(*leaves), differentiated, dout)
    saved: list[Tensor] = []

    def backward() -> tuple[Tensor, ...]:
        if not saved:  # the first call is the comparison, on the stream that is timed
            saved.append(function(*leaves))
        return torch.autograd.grad(saved[0], differentiated, dout, retain_graph=True)

    return backward


def checked(case: Case, machine: Machine) -> Checked:
    """Run and compare every variant once; those that raise or are wrong are refused."""
    scale = float(case.exact.abs().max()) or 1.0
    outcome = Checked()
    for label, variant in case.variants.items():
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")  # torch warns why a backend of SDPA refuses
            try:
                result, peak = machine.with_peak(variant.run)
                error = max_error(variant.result(result), case.exact) / scale if variant.comparable else None
            except Exception as problem:
                outcome.refused[label] = "; ".join([reason(problem), *_reasons(messages)])
                machine.release()
                continue
        tolerance = case.tolerance if variant.tolerance is None else variant.tolerance
        if error is not None and not error <= tolerance:
            outcome.refused[label] = f"wrong: error {error:.3g} exceeds {tolerance:.3g}"
            continue
        outcome.runs[label], outcome.errors[label], outcome.peaks[label] = variant.run, error, peak
    return outcome


def _reasons(messages: Sequence[warnings.WarningMessage]) -> list[str]:
    """The warnings that explain a refusal, without those about the backends that the peer disables itself."""
    lines = dict.fromkeys(str(warning.message).partition(" (Triggered")[0] for warning in messages)
    return [line for line in lines if "disabled" not in line and "not used because" not in line][:2]


def measure(name: str, case: Case, machine: Machine, limits: Mapping[str, float], seconds: float) -> list[Row]:
    """Compare every variant, then time those that passed, interleaved, for about `seconds`."""
    outcome = checked(case, machine)
    runs = dict(outcome.runs)
    if machine.device.type == "cuda" and case.traffic and not case.flops:
        source = torch.randint(0, 256, (case.traffic // 2,), dtype=torch.uint8, device=machine.device)
        target = torch.empty_like(source)
        runs[YARDSTICK] = lambda: target.copy_(source)
    timing = machine.interleaved(runs, seconds, case.graph) if runs else None
    medians = timing.seconds if timing else {}
    outcome.refused.update(timing.refused if timing else {})
    precisions = {label: variant.precision for label, variant in case.variants.items()}
    peers = {label: median for label, median in medians.items() if not label.startswith(OURS) and label != YARDSTICK}
    rows = []
    for label in [*case.variants, YARDSTICK]:
        precision = precisions.get(label, "")
        if label in outcome.refused:
            rows.append(Row(name, label, refused=outcome.refused[label], precision=precision))
        elif label in medians:
            median = medians[label]
            gbytes, gflops = case.traffic / median / 1e9, case.flops / median / 1e9
            product = limits.get(
                f"{precision or GEMMS.get(case.dtype, 'fp32')}_gemm_gflops", limits["fp32_gemm_gflops"]
            )
            rivals = [median for peer, median in peers.items() if at_least(precisions[peer], precision)]
            rows.append(
                Row(
                    name,
                    label,
                    ms=median * 1e3,
                    gbytes_per_s=gbytes,
                    gflops=gflops,
                    share_of_ceiling=gflops / product if case.flops else gbytes / limits["copy_gbytes_per_s"],
                    error=outcome.errors.get(label),
                    ratio_to_best_peer=min(rivals) / median if rivals else None,
                    peak_mbytes=outcome.peaks.get(label),
                    timing=timing.method if timing else "",
                    precision=precision,
                    tokens_per_s=case.tokens / median if case.tokens else None,
                    call=case.call,
                )
            )
    return rows


def at_least(precision: str, other: str) -> bool:
    """Whether `precision` is `other` or higher; an empty name is equal to every precision."""
    return not (precision and other) or PRECISIONS.index(precision) >= PRECISIONS.index(other)


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    rate = "real tokens/s" if any(row.tokens_per_s for row in rows) else "GB/s"
    lines = [
        f"| case | variant | ms | {rate} | GFLOP/s | of ceiling | error | x best peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.ms is None:
            lines.append(f"| {r.case} | {r.variant} | refused: {r.refused} | | | | | |")
            continue
        error = (
            "own mask" if r.error is None and r.variant != YARDSTICK else "" if r.error is None else f"{r.error:.1e}"
        )
        ratio = "" if r.ratio_to_best_peer is None or r.variant == YARDSTICK else f"{r.ratio_to_best_peer:.2f}"
        rate = f"{r.gbytes_per_s:.1f}" if r.tokens_per_s is None else f"{r.tokens_per_s:,.0f}"
        lines.append(
            f"| {r.case} | {r.variant} | {r.ms:.3f} | {rate} | {r.gflops:.1f} "
            f"| {r.share_of_ceiling:.0%} | {error} | {ratio} |"
        )
    return "\n".join(lines)


def is_compiled(variant: str) -> bool:
    """Whether a variant is compiled by torch.compile."""
    return COMPILED in variant


def failures(rows: Sequence[Any]) -> list[str]:
    """ "case, variant: reason" for each refused row of ours; the rows are those of a report or of `whole_models`."""
    return [f"{r.case}, {r.variant}: {r.refused}" for r in rows if r.refused and r.variant.startswith(OURS)]


def run(
    op: str,
    plans: Sequence[Plan],
    machine: Machine,
    seconds: float,
    budget: float = float("inf"),
    save: Callable[[dict[str, Any]], None] = lambda report: None,
) -> dict[str, Any]:
    """Measure the plans within `budget` seconds.

    On a GPU the peers of torch.compile, which takes seconds a case, come last: their cases are then timed once more.

    Args:
        op: name of the report.
        plans: the cases.
        machine: the device.
        seconds: the time for each case.
        budget: seconds after which no case begins.
        save: called with the report after every case.

    Returns:
        The report that `--record` writes; `failures` has the refused variants of ours.
    """
    begin = time.perf_counter()
    limits = machine.ceilings()
    machine.release()
    about, on_gpu = environment(machine), machine.device.type == "cuda"
    rows: dict[str, list[Row]] = {}
    left_out = [plan.name for plan in plans]

    def report() -> dict[str, Any]:
        flat = [row for of_case in rows.values() for row in of_case]
        parts = {"left_out": left_out, "failures": failures(flat)}
        filled = {name: list(value) for name, value in parts.items() if value}
        return {"environment": about, "ceilings": limits, "rows": [asdict(row) for row in flat], **filled}

    again: list[Plan] = []  # those with compiled peers
    for plan in chain(plans, again):  # `again` grows
        if time.perf_counter() - begin > budget:
            continue
        first_time = plan.name not in rows
        try:
            case = plan.make()
            if first_time and on_gpu and any(map(is_compiled, case.variants)):
                again.append(plan)
                left_out.append(f"{plan.name}, {COMPILED}")
                case = replace(case, variants={k: v for k, v in case.variants.items() if not is_compiled(k)})
            rows[plan.name] = measure(plan.name, case, machine, limits, seconds)
        except KeyboardInterrupt:  # report what was measured so far
            break
        left_out.remove(plan.name if first_time else f"{plan.name}, {COMPILED}")
        save(report())
        machine.release()
    rounded = {name: round(value, 1) for name, value in limits.items()}
    print(f"{op}: {json.dumps({**about, **rounded})}\n{table([row for of_case in rows.values() for row in of_case])}")
    if left_out:
        print(f"not measured, out of time: {'; '.join(left_out)}")
    print(f"{op}: {len(rows)} of {len(plans)} cases in {time.perf_counter() - begin:.0f} s")
    return report()


def warm(plans: Sequence[Plan], machine: Machine) -> list[str]:
    """Compare every case and time none; this fills the caches of Triton and inductor. Returns the failures of ours."""
    failed = []
    for plan in plans:
        refused = checked(plan.make(), machine).refused
        failed += failures([Row(plan.name, label, refused=why) for label, why in refused.items()])
        machine.release()
    return failed


def exit_code(failed: Sequence[str]) -> int:
    """Print the failures of ours; 1 if there are any."""
    for failure in failed:
        print(f"failed: {failure}", file=sys.stderr)
    return int(bool(failed))


def write(report: Mapping[str, Any], name: str, results: Path = RESULTS) -> None:
    """Write a report as `<results>/<device>/<name>.json`, atomically, and print the path."""
    file = file_of(report, name, results)
    write_json(file, report)
    print(f"written: {file}")


def file_of(report: Mapping[str, Any], name: str, results: Path) -> Path:
    """The path of a report."""
    path: Path = results / report["environment"]["device"] / f"{name}.json"
    return path


def arguments(what: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda if there is a device")
    parser.add_argument("--quick", action="store_true", help="fewer cases and less time for each")
    parser.add_argument("--record", action="store_true", help="write the JSON")
    parser.add_argument("--warm", action="store_true", help="compile and compare, time nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder with one folder a device")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case begins")
    return parser


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Machine]:
    """The options and the machine; sets up PyTorch for benchmarks with compiled peers."""
    options = parser.parse_args()
    torch.manual_seed(0)
    # Each case is a size of its own; beyond the limit a peer would run eagerly.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]  # "backward" runs one graph many times
    try:
        return options, machine_of(options.device)
    except ValueError as error:
        parser.error(str(error))


def main(
    name: str,
    plans: Sequence[Plan],
    options: argparse.Namespace,
    machine: Machine,
    recorded: Callable[[Mapping[str, Any]], None] = lambda report: None,
) -> int:
    """Measure the plans and print the table; 1 if one of ours failed. With `--record` the report is written, and given
    to `recorded`, after every case."""
    on_gpu = machine.device.type == "cuda"
    seconds = (0.1 if on_gpu else 0.2) if options.quick else (0.3 if on_gpu else 2.0)
    with machine.active():
        if options.warm:
            return exit_code(warm(plans, machine))
        report = run(name, plans, machine, seconds, options.budget, saving(name, options, recorded))
    if options.record:
        write(report, name, options.results)
    return exit_code(report.get("failures", []))


def saving(
    name: str,
    options: argparse.Namespace,
    recorded: Callable[[Mapping[str, Any]], None] = lambda report: None,
) -> Callable[[Mapping[str, Any]], None]:
    """A function that writes a report where `--record` is given, and then gives it to `recorded`."""

    def save(report: Mapping[str, Any]) -> None:
        if options.record:
            write_json(file_of(report, name, options.results), report)
            recorded(report)

    return save
