"""The one benchmark runner: variants interleaved in one process, medians, ceilings and errors measured in the same run.

A case that is wrong is not timed: each variant's result is compared with float64 first. The table that is printed and
the JSON under `benchmarks/results/<device>/` carry the environment they were measured in.
"""

from __future__ import annotations

import json
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bert_fast
from bert_fast.testing import max_error

RESULTS = Path(__file__).parent / "results"
OURS = "bert_fast"  # variants whose name starts so are ours, the others are peers


@dataclass(frozen=True)
class Case:
    """One size of one operation, and the ways to compute it: each call returns the tensor that is checked.

    traffic: bytes that have to be read and written; flops: floating-point operations that have to be done. Both are the
    floor's, not what a variant does. `tolerance` is on the largest absolute error over the largest value of `truth`.
    """

    name: str
    variants: dict[str, Callable[[], Tensor]]
    truth: Tensor
    tolerance: float
    traffic: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Row:
    case: str
    variant: str
    ms: float
    gbytes_per_s: float
    gflops: float
    share_of_ceiling: float
    error: float
    ratio_to_best_peer: float


def timed(run: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forward_and_backward(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor | None
) -> Callable[[], Tensor]:
    """A variant: the forward pass without gradients where `dout` is None, else forward + backward, giving dx."""
    if dout is None:

        def forward() -> Tensor:
            with torch.no_grad():
                return function(*inputs)

        return forward
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if x.requires_grad]
    return lambda: torch.autograd.grad(function(*leaves), wanted, dout)[0]


def ceilings() -> dict[str, float]:
    """What this machine reaches now: copy bandwidth (GB/s, read + written) and float32 matrix products (GFLOP/s)."""
    source, target = torch.randn(2**25), torch.empty(2**25)
    copy = statistics.median(timed(lambda: target.copy_(source)) for _ in range(9))
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    for _ in range(50):  # threads started, clock up
        a @ b
    product = statistics.median(timed(lambda: a @ b) for _ in range(15))
    return {"copy_gbytes_per_s": 2 * source.nbytes / copy / 1e9, "fp32_gemm_gflops": 2 * 1024**3 / product / 1e9}


def device_name() -> str:
    """A short name of the device for the results folder, e.g. "cpu-amd-epyc-2-threads-avx2"."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
        model = found[1]
    text = f"cpu {model} {torch.get_num_threads()} threads {torch.backends.cpu.get_cpu_capability()}".lower()
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text)).strip("-")


def environment() -> dict[str, Any]:
    """What the numbers depend on."""

    def git(*arguments: str) -> str:
        root = Path(__file__).parents[1]
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "device": device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bert_fast": bert_fast.__version__,
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain") else ""),
        "threads": torch.get_num_threads(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


def measure(case: Case, limits: dict[str, float], seconds: float) -> list[Row]:
    """Check every variant, then time them in turns for about `seconds`."""
    scale = float(case.truth.abs().max())
    errors = {name: max_error(run(), case.truth) / scale for name, run in case.variants.items()}
    for name, error in errors.items():
        if not error <= case.tolerance:
            raise SystemExit(f"{case.name}, {name}: error {error:.3g} over {case.tolerance:.3g}; nothing was reported")
    times: dict[str, list[float]] = {name: [timed(run)] for name, run in case.variants.items()}
    rounds = min(200, max(5, int(seconds / sum(found[0] for found in times.values()))))
    for _ in range(rounds):
        for name, run in case.variants.items():
            times[name].append(timed(run))
    medians = {name: statistics.median(found[1:]) for name, found in times.items()}
    best_peer = min(median for name, median in medians.items() if not name.startswith(OURS))
    rows = []
    for name, median in medians.items():
        gbytes, gflops = case.traffic / median / 1e9, case.flops / median / 1e9
        share = gflops / limits["fp32_gemm_gflops"] if case.flops else gbytes / limits["copy_gbytes_per_s"]
        rows.append(Row(case.name, name, median * 1e3, gbytes, gflops, share, errors[name], best_peer / median))
    return rows


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| case | variant | ms | GB/s | GFLOP/s | of ceiling | error | x best peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r.case} | {r.variant} | {r.ms:.3f} | {r.gbytes_per_s:.1f} | {r.gflops:.1f} | {r.share_of_ceiling:.0%} "
        f"| {r.error:.1e} | {r.ratio_to_best_peer:.2f} |"
        for r in rows
    ]
    return "\n".join(lines)


def main(room: str, cases: Callable[[], list[Case]]) -> None:
    """Run a room's cases and print the table; `--record` writes `results/<device>/<room>.json`, `--quick` is short."""
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = (
        1000  # each case is a size of its own; past the limit a peer would run eagerly
    )
    seconds = 0.2 if "--quick" in sys.argv[1:] else 2.0
    limits = ceilings()
    rows = [row for case in cases() for row in measure(case, limits, seconds)]
    about = environment()
    print(
        f"{room}: {json.dumps({**about, **{name: round(value, 1) for name, value in limits.items()}})}\n{table(rows)}"
    )
    if "--record" in sys.argv[1:]:
        file = RESULTS / about["device"] / f"{room}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        report = {"environment": about, "ceilings": limits, "rows": [asdict(row) for row in rows]}
        file.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: benchmarks/results/{about['device']}/{file.name}")
