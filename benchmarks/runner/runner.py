"""The one benchmark runner: variants interleaved in one process, medians, ceilings and errors measured in the same run.

    python -m benchmarks.ops.<op> [--device cpu|cuda] [--quick] [--record] [--budget SECONDS] [--results FOLDER]
    python -m benchmarks.ops.<op> --warm     compile and check every case, time nothing

A case that is wrong is not timed: each variant's result is compared with float64 first. A wrong result of ours ends the
run with nothing reported; a peer that can't run a case, or gets it wrong, is listed as refused, with the reason. The
table that is printed and the JSON under `benchmarks/results/<device>/` carry the environment they were measured in.
`devices.py` says how calls are timed.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner.devices import Call, Machine, environment, machine_of, reason
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.kernels._common.library import simulated
from bert_fast.testing import max_error

RESULTS = Path(__file__).parents[1] / "results"
OURS = "bert_fast"  # variants whose name starts so are ours, the others are peers
YARDSTICK = "copy of as many bytes"  # neither: what a plain copy takes for the floor's bytes, timed in the same way
GEMMS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "bf16"}  # whose product is the ceiling
PRECISIONS = ("int8", "bf16", "fp32")  # from the lowest up


@dataclass(frozen=True)
class Setting:
    """Where the cases are to be made, and whether there is little time."""

    device: torch.device
    quick: bool

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def ours(self, op: str, dtype: torch.dtype) -> list[str]:
        """Our implementations of `op` that run here, the eager reference left out: it is what peers are."""
        return [
            impl
            for impl, slot in OPS[op].impls.items()
            if slot.availability.ok
            and slot.device == self.device.type
            and (slot.dtypes is None or dtype in slot.dtypes)
            and not simulated(impl)
        ]

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Normal random numbers on the device, drawn in float32 and rounded."""
        return torch.randn(shape, device=self.device).to(dtype)

    def rng_state(self) -> Tensor:
        """A fixed state of the dropout generator: drawing one is not part of what is timed."""
        return torch.tensor([1234, 5678], device=self.device)


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    run: what is timed; returns a tensor or a tuple of them.
    result: what it returned -> what is compared with the truth; not timed.
    comparable: False where the result is random, i.e. a peer with a dropout mask of its own.
    precision: one of `PRECISIONS` where variants of a case differ in it: it decides which matrix product is the
        ceiling, and a peer stands beside ours of the same or a lower precision only.
    tolerance: in the place of the case's.
    """

    run: Call
    result: Callable[[Any], Tensor] = lambda found: found
    comparable: bool = True
    precision: str = ""
    tolerance: float | None = None


@dataclass(frozen=True)
class Case:
    """One size of one operation: the ways to compute it, and what is right.

    traffic: bytes that have to be read and written; flops: floating-point operations that have to be done. Both are the
    floor's, not what a variant does. `tolerance` is on the largest absolute error over the largest value of `truth`.
    `dtype` decides which matrix product is the ceiling; `graph` is False where a variant waits for the device; `tokens`
    are the real ones of a batch, where a case is a whole model.
    """

    variants: Mapping[str, Variant | Call]
    truth: Tensor
    tolerance: float
    traffic: int = 0
    flops: int = 0
    dtype: torch.dtype = torch.float32
    graph: bool = True
    tokens: int = 0

    def variant(self, label: str) -> Variant:
        given = self.variants[label]
        return given if isinstance(given, Variant) else Variant(given)


@dataclass(frozen=True)
class Plan:
    """A case by name, made when its turn comes, so that one case at a time is in memory."""

    name: str
    make: Callable[[], Case]


@dataclass(frozen=True)
class Row:
    """One variant of one case. Where it was refused, `refused` says why and there are no figures."""

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


@dataclass
class Checked:
    """What the check before timing found of a case's variants, by name."""

    runs: dict[str, Call] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    peaks: dict[str, float | None] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def forward_and_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor | None
) -> Callable[[], Tensor]:
    """A variant: the forward pass without gradients where `dout` is None, else forward + backward, giving dx."""
    if dout is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves, wanted = _leaves(inputs)
    return lambda: torch.autograd.grad(function(*leaves), wanted, dout)[0]


def backward(function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor) -> Callable[[], Tensor]:
    """A variant: the backward pass alone, again and again from one forward pass, giving dx."""
    leaves, wanted = _leaves(inputs)
    saved: list[Tensor] = []

    def run() -> Tensor:
        if not saved:  # the first call is the check, on the stream that is timed
            saved.append(function(*leaves))
        return torch.autograd.grad(saved[0], wanted, dout, retain_graph=True)[0]

    return run


def passes(function: Callable[..., Tensor], inputs: Sequence[Tensor], dout: Tensor, which: str) -> Callable[[], Tensor]:
    """A variant by the name of what it does: "forward", "backward" or "forward + backward"."""
    if which == "backward":
        return backward(function, inputs, dout)
    return forward_and_backward(function, inputs, None if which == "forward" else dout)


def _leaves(inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    return leaves, [x for x in leaves if x.requires_grad]


def checked(name: str, case: Case, machine: Machine) -> Checked:
    """Run every variant once and compare. Raises where one of ours is wrong or raises; peers are refused."""
    scale = float(case.truth.abs().max()) or 1.0
    found = Checked()
    for label in case.variants:
        variant = case.variant(label)
        mine = label.startswith(OURS)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")  # torch says in warnings why a backend of SDPA refuses
            try:
                result, peak = machine.with_peak(variant.run)
                error = max_error(variant.result(result), case.truth) / scale if variant.comparable else None
            except Exception as problem:
                if mine:
                    raise
                found.refused[label] = "; ".join([reason(problem), *_why(said)])
                machine.release()
                continue
        tolerance = case.tolerance if variant.tolerance is None else variant.tolerance
        if error is not None and not error <= tolerance:
            wrong = f"error {error:.3g} over {tolerance:.3g}"
            if mine:
                raise SystemExit(f"{name}, {label}: {wrong}; nothing was reported")
            found.refused[label] = f"wrong: {wrong}"
            continue
        found.runs[label], found.errors[label], found.peaks[label] = variant.run, error, peak
    return found


def _why(said: Sequence[warnings.WarningMessage]) -> list[str]:
    """What torch's warnings add to a refusal: not that other backends are off, which is our doing."""
    lines = dict.fromkeys(str(warning.message).partition(" (Triggered")[0] for warning in said)
    return [line for line in lines if "disabled" not in line and "not used because" not in line][:2]


def measure(name: str, case: Case, machine: Machine, limits: Mapping[str, float], seconds: float) -> list[Row]:
    """Check every variant, then time those that ran in turns for about `seconds`."""
    found = checked(name, case, machine)
    runs = dict(found.runs)
    if machine.device.type == "cuda" and case.traffic and not case.flops:
        source = torch.randint(0, 256, (case.traffic // 2,), dtype=torch.uint8, device=machine.device)
        target = torch.empty_like(source)
        runs[YARDSTICK] = lambda: target.copy_(source)
    timing = machine.interleaved(runs, seconds, case.graph) if runs else None
    medians = timing.seconds if timing else {}
    precisions = {label: case.variant(label).precision for label in case.variants}
    peers = {label: median for label, median in medians.items() if not label.startswith(OURS) and label != YARDSTICK}
    rows = []
    for label in [*case.variants, YARDSTICK]:
        precision = precisions.get(label, "")
        if label in found.refused:
            rows.append(Row(name, label, refused=found.refused[label], precision=precision))
        elif label in medians:
            median = medians[label]
            gbytes, gflops = case.traffic / median / 1e9, case.flops / median / 1e9
            product = limits.get(
                f"{precision or GEMMS.get(case.dtype, 'fp32')}_gemm_gflops", limits["fp32_gemm_gflops"]
            )
            beside = [median for peer, median in peers.items() if at_least(precisions[peer], precision)]
            rows.append(
                Row(
                    name,
                    label,
                    ms=median * 1e3,
                    gbytes_per_s=gbytes,
                    gflops=gflops,
                    share_of_ceiling=gflops / product if case.flops else gbytes / limits["copy_gbytes_per_s"],
                    error=found.errors.get(label),
                    ratio_to_best_peer=min(beside) / median if beside else None,
                    peak_mbytes=found.peaks.get(label),
                    timing=timing.method if timing else "",
                    precision=precision,
                    tokens_per_s=case.tokens / median if case.tokens else None,
                )
            )
    return rows


def at_least(precision: str, other: str) -> bool:
    """Whether a precision is the same as another one, or higher; unnamed ones are the same."""
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


def run(
    op: str, plans: Sequence[Plan], machine: Machine, seconds: float, budget: float = float("inf")
) -> dict[str, Any]:
    """Measure the plans, those for which the budget has time left; the report that `--record` writes."""
    begin = time.perf_counter()
    limits = machine.ceilings()
    machine.release()
    rows: list[Row] = []
    left_out = []
    for index, plan in enumerate(plans):
        if time.perf_counter() - begin > budget:
            left_out.append(plan.name)
            continue
        try:
            rows += measure(plan.name, plan.make(), machine, limits, seconds)
        except KeyboardInterrupt:  # what was measured so far is worth its report
            left_out += [later.name for later in plans[index:]]
            break
        machine.release()
    about = environment(machine)
    rounded = {name: round(value, 1) for name, value in limits.items()}
    print(f"{op}: {json.dumps({**about, **rounded})}\n{table(rows)}")
    if left_out:
        print(f"not measured, the time was over: {'; '.join(left_out)}")
    print(f"{op}: {len(plans) - len(left_out)} of {len(plans)} cases in {time.perf_counter() - begin:.0f} s")
    return {
        "environment": about,
        "ceilings": limits,
        "rows": [asdict(row) for row in rows],
        **({"left_out": left_out} if left_out else {}),
    }


def warm(plans: Sequence[Plan], machine: Machine) -> None:
    """Check every case and time none: afterwards what they compile lies in the caches of Triton and inductor."""
    for plan in plans:
        checked(plan.name, plan.make(), machine)
        machine.release()


def write(report: Mapping[str, Any], name: str, results: Path = RESULTS) -> Path:
    """Write a report as `<results>/<device>/<name>.json`."""
    file = results / report["environment"]["device"] / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n")
    return file


def prepare_compiler() -> None:
    """Settings without which a compiled peer would not be timed at its best, or not at all."""
    # Each case is a size of its own; past the limit a peer would run eagerly.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    torch._functorch.config.donated_buffer = False  # type: ignore[attr-defined]  # `backward` runs one graph many times


def arguments(what: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    parser.add_argument("--quick", action="store_true", help="fewer cases and less time for each")
    parser.add_argument("--record", action="store_true", help="write the JSON")
    parser.add_argument("--warm", action="store_true", help="compile and check, time nothing")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that holds a folder for each device")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no case is begun")
    return parser


def main(op: str, plans: Callable[[Setting], Sequence[Plan]]) -> None:
    """Run an op's cases and print the table."""
    parser = arguments(f"benchmark of {op}")
    options = parser.parse_args()
    torch.manual_seed(0)
    prepare_compiler()
    try:
        machine = machine_of(options.device)
    except ValueError as error:
        parser.error(str(error))
    on_gpu = machine.device.type == "cuda"
    seconds = (0.1 if on_gpu else 0.2) if options.quick else (0.3 if on_gpu else 2.0)
    chosen = plans(Setting(machine.device, options.quick))
    with machine.active():
        if options.warm:
            warm(chosen, machine)
            return
        report = run(op, chosen, machine, seconds, options.budget)
    if options.record:
        file = write(report, op, options.results)
        print(f"written: {file}")
