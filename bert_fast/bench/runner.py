"""The benchmark runner: variants interleaved in one process, medians, ceilings and errors measured in the same run.

Each variant's result is compared with float64 before it is timed. A variant that raises or is wrong is listed as
refused, with the reason, and not timed; if it is ours the exit code is 1. What was timed is compared again (fair.py).
The printed table and the JSON, which is rewritten after every case, carry the environment of the run. `devices.py`
documents how calls are timed, docs/benchmarks.md the report.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bert_fast._io import write_json
from bert_fast.bench import fair
from bert_fast.bench.devices import CHECKOUT, LOAD, Call, Machine, environment, machine_of, reason
from bert_fast.bench.names import COMPILED, OURS, YARDSTICK
from bert_fast.bench.samples import Summary
from bert_fast.bench.table import print_table
from bert_fast.kernels._common.benchmarks import Plan, first
from bert_fast.testing import max_error

RESULTS = CHECKOUT / "benchmarks" / "results"
SCHEMA = "bert_fast.bench/1"
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
        inputs: the tensors that `run` reads, of the same shapes in every case that `Case.again` makes.
        saves_inputs: whether `run` keeps what it computed from `inputs`, as a forward pass does for the backward pass.
    """

    run: Call
    result: Callable[[Any], Tensor] = first
    comparable: bool = True
    precision: str = ""
    tolerance: float | None = None
    inputs: tuple[Tensor, ...] = ()
    saves_inputs: bool = False


@dataclass(frozen=True)
class Case:
    """One size of one operation: the ways to compute it, and the exact result.

    Args:
        variants: by name.
        exact: returns the result in float64.
        tolerance: on the largest absolute error over the largest value of `exact`.
        traffic, flops: bytes that must be read and written, and floating-point operations that must be done.
        dtype: chooses the matrix product that is the ceiling.
        graph: False where a variant waits for the device.
        tokens: real tokens of the batch, where the case is a whole model.
        call: dtype, pass and size, as a record has them (`kernels/_common/times.py`); None where it has no times.
        resident: bytes that every call reads besides its inputs: the weights of a model.
        length: of the longest sequence, or the number of rows.
        again: makes the same case with other inputs; None where the inputs are the weights of a model, or as large.
    """

    variants: Mapping[str, Variant]
    exact: Callable[[], Tensor]
    tolerance: float
    traffic: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32
    graph: bool = True
    tokens: int = 0
    call: Mapping[str, Any] | None = None
    resident: int = 0
    length: int = 0
    again: Callable[[], Case] | None = None


@dataclass(frozen=True)
class Row:
    """One variant of one case, as docs/benchmarks.md describes it. A refused variant has no figures; `refused` is the
    reason."""

    case: str
    variant: str
    op: str = ""
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    iqr_ms: float | None = None
    outliers: int | None = None
    calls: int | None = None
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
    traffic: int = 0
    flops: int = 0
    length: int = 0
    call: Mapping[str, Any] | None = None  # of the case


@dataclass
class Checked:
    """Results of the comparison before timing, by variant."""

    runs: dict[str, Call] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class Pass(NamedTuple):
    """A call, and the tensors that it reads."""

    run: Callable[[], Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]


def passes(function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor | None, which: str) -> Pass:
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

        return Pass(forward, tuple(inputs))
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    differentiated = [x for x in leaves if x.requires_grad]
    read = (*leaves, dout) if dout is not None else tuple(leaves)
    if which == "forward + backward":
        return Pass(lambda: torch.autograd.grad(function(*leaves), differentiated, dout), read)
    saved: list[Tensor] = []

    def backward() -> tuple[Tensor, ...]:
        if not saved:  # the first call is the comparison, on the stream that is timed
            saved.append(function(*leaves))
        return torch.autograd.grad(saved[0], differentiated, dout, retain_graph=True)

    return Pass(backward, read)


def checked(case: Case, machine: Machine) -> Checked:
    """Run and compare every variant once; those that raise or are wrong are refused."""
    exact = case.exact()
    scale = float(exact.abs().max()) or 1.0
    outcome = Checked()
    for label, variant in case.variants.items():
        with warnings.catch_warnings(record=True) as messages:
            warnings.simplefilter("always")  # torch warns why a backend of SDPA refuses
            try:
                result, peak = machine.with_peak(variant.run)
                error = max_error(variant.result(result), exact) / scale if variant.comparable else None
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
    """Compare every variant, time those that passed, interleaved, for about `seconds`, and compare them again."""
    outcome = checked(case, machine)
    times: dict[str, Summary] = {}
    method = ""
    if outcome.runs:
        cases = fair.cases(case, machine)
        runs = {label: [one.variants[label].run for one in cases] for label in outcome.runs}
        if machine.device.type == "cuda" and case.traffic and not case.flops:
            source = torch.randint(0, 256, (case.traffic // 2,), dtype=torch.uint8, device=machine.device)
            target = torch.empty_like(source)
            runs[YARDSTICK] = [lambda: target.copy_(source)]
        fair.prepare(cases, runs)
        timing = machine.interleaved(runs, seconds, case.graph)
        times, method = timing.times, timing.method
        outcome.refused.update(timing.refused)
        faults = fair.faults(cases, timing, outcome.errors, limits, ceiling_of(case, limits))
        if any(why.startswith(fair.IMPOSSIBLE) for why in faults.values()):  # or others used the machine meanwhile
            higher = {name: max(ceiling, limits.get(name, 0.0)) for name, ceiling in machine.ceilings().items()}
            faults = fair.faults(cases, timing, outcome.errors, higher, ceiling_of(case, higher))
        outcome.refused.update(faults)
    return rows_of(name, case, outcome, times, method, limits)


def ceiling_of(case: Case, limits: Mapping[str, float], precision: str = "") -> float:
    """GFLOP/s of the matrix product in `precision`, or in that of the case."""
    return limits.get(f"{precision or GEMMS.get(case.dtype, 'fp32')}_gemm_gflops", limits["fp32_gemm_gflops"])


def rows_of(
    name: str, case: Case, outcome: Checked, times: Mapping[str, Summary], method: str, limits: Mapping[str, float]
) -> list[Row]:
    """The rows of a case: its variants in order, then the copy."""
    medians = {label: time.median for label, time in times.items() if label not in outcome.refused}
    precisions = {label: variant.precision for label, variant in case.variants.items()}
    peers = {label: median for label, median in medians.items() if not label.startswith(OURS) and label != YARDSTICK}
    rows = []
    for label in [*case.variants, YARDSTICK]:
        precision = precisions.get(label, "")
        if label in outcome.refused:
            rows.append(Row(name, label, refused=outcome.refused[label], precision=precision))
        elif label in medians:
            median = medians[label]
            time = times[label]
            gbytes, gflops = case.traffic / median / 1e9, case.flops / median / 1e9
            product = ceiling_of(case, limits, precision)
            rivals = [median for peer, median in peers.items() if at_least(precisions[peer], precision)]
            rows.append(
                Row(
                    name,
                    label,
                    ms=median * 1e3,
                    ms_low=time.low * 1e3,
                    ms_high=time.high * 1e3,
                    iqr_ms=time.iqr * 1e3,
                    outliers=time.outliers,
                    calls=time.calls,
                    gbytes_per_s=gbytes,
                    gflops=gflops,
                    share_of_ceiling=gflops / product if case.flops else gbytes / limits["copy_gbytes_per_s"],
                    error=outcome.errors.get(label),
                    ratio_to_best_peer=min(rivals) / median if rivals else None,
                    peak_mbytes=outcome.peaks.get(label),
                    timing=method,
                    precision=precision,
                    tokens_per_s=case.tokens / median if case.tokens else None,
                    traffic=case.traffic,
                    flops=case.flops,
                    length=case.length,
                    call=case.call,
                )
            )
    return rows


def at_least(precision: str, other: str) -> bool:
    """Whether `precision` is `other` or higher; an empty name is equal to every precision."""
    return not (precision and other) or PRECISIONS.index(precision) >= PRECISIONS.index(other)


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
    limits: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Measure the plans within `budget` seconds, and print their table.

    On a GPU the peers of torch.compile, which takes seconds a case, come last: their cases are then timed once more.

    Args:
        op: name of the report.
        plans: the cases.
        machine: the device.
        seconds: the time for each case.
        budget: seconds after which no case begins.
        save: called with the report after every case.
        limits: the ceilings, where they are known.

    Returns:
        The report that `--record` writes; `failures` has the refused variants of ours.
    """
    begin = time.perf_counter()
    limits = limits or machine.ceilings()
    machine.release()
    about, on_gpu = environment(machine), machine.device.type == "cuda"
    rows: dict[str, list[Row]] = {}
    left_out = [plan.name for plan in plans]

    def report() -> dict[str, Any]:
        flat = [row for of_case in rows.values() for row in of_case]
        now = {**about, **LOAD.of_others(), **{f"{name}_at_end": mhz for name, mhz in machine.clock().items()}}
        parts = {"left_out": left_out, "failures": failures(flat)}
        filled = {name: list(value) for name, value in parts.items() if value}
        rows_as_json = [asdict(replace(row, op=op)) for row in flat]
        return {"schema": SCHEMA, "environment": now, "ceilings": limits, "rows": rows_as_json, **filled}

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
    result = report()
    print_table(op, result)
    if left_out:
        print(f"not measured, out of time: {'; '.join(left_out)}")
    print(f"{op}: {len(rows)} of {len(plans)} cases in {time.perf_counter() - begin:.0f} s")
    return result


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
    set_up()
    try:
        return options, machine_of(options.device)
    except ValueError as error:
        parser.error(str(error))


def set_up() -> None:
    """A fixed seed, and PyTorch's settings for benchmarks with compiled peers."""
    torch.manual_seed(0)
    # Each case is a size of its own; beyond the limit a peer would run eagerly.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    torch._functorch.config.donated_buffer = False  # "backward" runs one graph many times


def seconds_a_case(machine: Machine, quick: bool) -> float:
    """The time for each case."""
    on_gpu = machine.device.type == "cuda"
    return (0.1 if on_gpu else 0.2) if quick else (0.3 if on_gpu else 2.0)


def main(
    name: str,
    plans: Sequence[Plan],
    options: argparse.Namespace,
    machine: Machine,
    recorded: Callable[[Mapping[str, Any]], None] = lambda report: None,
) -> int:
    """Measure the plans and print the table; 1 if one of ours failed. With `--record` the report is written, and given
    to `recorded`, after every case."""
    seconds = seconds_a_case(machine, options.quick)
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
