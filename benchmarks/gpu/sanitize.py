"""compute-sanitizer over the Triton and CUDA C++ operators.

    python -m benchmarks.gpu.sanitize [--ops attention ...] [--impls triton cuda] [--tools ...] [--jobs 8] [--limit 150]
        [--seconds 200] [--record]

Tools: memcheck (out of bounds, misaligned) and racecheck (shared memory); for CUDA C++ also initcheck (uninitialised
memory) and synccheck (barriers). Each op, implementation and tool gets a process that runs `--run OP --impls IMPL`
under the sanitizer: the samples of `kernels/<op>/cases.py` forward and backward in FP32 and BF16, its `extra` launches,
and its `hostile` calls with invalid indices and lengths, which may raise but must not touch memory that is not theirs.
torch's caching allocator is off, so that each tensor is an allocation whose ends the sanitizer knows. A Triton kernel
of the op that is never launched is a failure.

The runs are in order of worth: memcheck and synccheck of attention's CUDA kernels first. racecheck and initcheck don't
know of every asynchronous copy and product of Hopper, so what they find in attention's CUDA kernels is reported and
does not count. The report is rewritten after every run.

Without the tool or a device the result is "not run", never "passed". Exit code 0: every run that counts passed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.bench.devices import environment, machine_of
from bert_fast.bench.runner import RESULTS, write
from bert_fast.kernels._common import cases, dispatch
from bert_fast.kernels._common.cases import Sample
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.testing import operators, outputs_and_gradients

TOOLS = {"triton": ("memcheck", "racecheck"), "cuda": ("memcheck", "racecheck", "initcheck", "synccheck")}
ERROR_EXIT_CODE = 86  # of the sanitizer, for errors in what it ran
DTYPES = (torch.float32, torch.bfloat16)


def sanitizer() -> str | None:
    """The path of compute-sanitizer."""
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")


def command(tool: str, op: str, impl: str) -> list[str]:
    path = sanitizer()
    assert path is not None
    options = ["--tool", tool, "--error-exitcode", str(ERROR_EXIT_CODE), "--target-processes", "application-only"]
    # Padding after each allocation: an access past the end of one tensor does not hit the start of the next.
    options += ["--padding", "256"] if tool == "memcheck" else []
    return [path, *options, sys.executable, "-m", "benchmarks.gpu.sanitize", "--run", op, "--impls", impl]


def run_sample(sample: Sample, impl: str, dtype: torch.dtype, device: str) -> None:
    """Forward, and backward if the op has gradients."""

    def call(**inputs: Tensor) -> Any:
        return sample.call(impl=impl, **inputs)

    inputs = sample.cast(dtype, device)
    with torch.no_grad():
        outs = call(**inputs)
    if sample.gradients:
        douts = tuple(torch.randn_like(out) for out in (outs if isinstance(outs, tuple) else (outs,)))
        dtypes = {name: x.dtype for name, x in inputs.items() if x.is_floating_point()}
        outputs_and_gradients(call, inputs, dtypes, douts)


def run_samples(op: str, impl: str, device: str) -> int:
    """Run the op's samples in every dtype; returns their number."""
    samples = [(sample, dtype) for dtype in DTYPES for sample in cases.load(op).samples()]
    for sample, dtype in samples:
        run_sample(sample, impl, dtype, device)
    return len(samples)


def kernels_of(op: str) -> set[str]:
    """The op's Triton kernels as "module.name"; their names end with "kernel", those of device functions do not."""
    root = Path(dispatch.__file__).parents[1]
    names = set()
    for path in (*root.glob(f"{op}/triton.py"), *root.glob(f"{op}/triton/[!_]*.py")):
        module = ".".join(("bert_fast.kernels", *path.relative_to(root).with_suffix("").parts))
        for name, value in vars(importlib.import_module(module)).items():
            if name.endswith("kernel") and getattr(getattr(value, "fn", None), "__module__", "") == module:
                names.add(f"{path.stem}.{name}")
    return names


@contextmanager
def launches() -> Iterator[set[str]]:
    """The kernels launched within the block, as "module.name"."""
    from triton.runtime.jit import KernelInterface

    launched: set[str] = set()
    getitem = KernelInterface.__getitem__

    def recording_getitem(kernel: Any, grid: Any) -> Any:
        launched.add(f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}")
        return getitem(kernel, grid)

    KernelInterface.__getitem__ = recording_getitem
    try:
        yield launched
    finally:
        KernelInterface.__getitem__ = getitem


def run_op(op: str, impl: str, device: str) -> int:
    """Everything that runs under the sanitizer; prints one line that `judge` reads."""
    torch.manual_seed(0)
    slot = OPS[op].impls[impl]
    if not slot.availability.ok:
        print(f"{op}: not run: {slot.availability.reason}")
        return 0
    kernels = kernels_of(op) if impl == "triton" else set()
    with launches() if kernels else nullcontext(set()) as launched:
        samples = run_samples(op, impl, device)
        cases.load(op).extra(impl, device)
        calls, raised = run_hostile(op, impl, device)
    missing = sorted(kernels - launched)
    if missing:
        print(f"{op}: never launched: {', '.join(missing)}")
        return 1
    print(
        f"{op}: done: {samples} samples, {calls} hostile calls of which {raised} raised, {len(kernels)} Triton kernels"
    )
    return 0


def run_hostile(op: str, impl: str, device: str) -> tuple[int, int]:
    """The number of hostile calls, and how many of them raised."""
    calls = cases.load(op).hostile(operators(impl), device)
    raised = 0
    for call in calls:
        try:
            call()
        except (ValueError, IndexError, RuntimeError) as error:
            if "CUDA error" in str(error):
                raise
            raised += 1
        if device == "cuda":
            torch.cuda.synchronize()
    return len(calls), raised


def judge(tool: str, op: str, impl: str, code: int, output: str, seconds: float) -> dict[str, Any]:
    """One entry of the report. Passed: the script reached its end, and the sanitizer's summary has no error."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", output)
    done = re.search(rf"^{op}: (done|not run): (.*)$", output, re.MULTILINE)
    entry: dict[str, Any] = {"op": op, "impl": impl, "tool": tool, "seconds": round(seconds, 1), "exit_code": code}
    if done and done[1] == "not run":
        return entry | {"result": "not run", "reason": done[2]}
    if re.search(r"Device not supported|Unable to find|No such file|not supported on this", output) and not done:
        return entry | {"result": "not run", "reason": _last_line(output)}
    if code == 0 and done and summary and int(summary[-1]) == 0:
        return entry | {"result": "passed", "reason": done[2]}
    never = re.search(rf"^{op}: (never launched: .*)$", output, re.MULTILINE)
    return entry | {
        "result": "failed",
        "reason": never[1] if never else f"{summary[-1]} errors" if summary else "no summary: " + _last_line(output),
        "output": output[-6000:],
    }


def _last_line(output: str) -> str:
    lines = [line for line in output.strip().splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no output"


def sanitize(tool: str, op: str, impl: str, limit: float) -> dict[str, Any]:
    """Run an implementation of an op under a tool, for at most `limit` seconds."""
    begin = time.perf_counter()
    process = subprocess.Popen(
        command(tool, op, impl),
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        seconds = round(time.perf_counter() - begin, 1)
        return {
            "op": op, "impl": impl, "tool": tool, "seconds": seconds, "exit_code": None,
            "result": "not run", "reason": f"stopped after {limit:.0f} s",
        }  # fmt: skip
    return judge(tool, op, impl, process.returncode, output, time.perf_counter() - begin)


def counts(tool: str, op: str, impl: str) -> bool:
    """False where the tool may report hazards that are none."""
    return (op, impl) != ("attention", "cuda") or tool in ("memcheck", "synccheck")


def runs_of(ops: list[str], impls: list[str], tools: list[str]) -> list[tuple[str, str, str]]:
    """(tool, op, impl) of what exists, in order of worth."""
    runs = [
        (tool, op, impl)
        for impl in impls
        for tool in TOOLS[impl]
        for op in ops
        if tool in tools and getattr(OPS[op].impls.get(impl), "device", None) is not None
    ]
    worth = {"memcheck": 0, "synccheck": 1, "racecheck": 2, "initcheck": 3}
    return sorted(runs, key=lambda run: (not counts(*run), run[1:] != ("attention", "cuda"), run[2], worth[run[0]]))


def sanitize_all(
    runs: list[tuple[str, str, str]], options: argparse.Namespace, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Run them concurrently within the time; `save` is called with the entries after each."""
    end = time.perf_counter() + options.seconds

    def one(run: tuple[str, str, str]) -> dict[str, Any]:
        left = min(options.limit, end - time.perf_counter())
        tool, op, impl = run
        if left > 1:
            return sanitize(tool, op, impl, left)
        return {"op": op, "impl": impl, "tool": tool, "result": "not run", "reason": "out of time"}

    entries: list[dict[str, Any]] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for future in as_completed([pool.submit(one, run) for run in runs]):
            entries.append(future.result())
            show(entries[-1])
            save(entries)
    return entries


def show(entry: dict[str, Any]) -> None:
    """Print a line for an entry, and the end of its output if it failed."""
    print(
        f"{entry['op']:<21} {entry['impl']:<7} {entry['tool']:<10} {entry['result']:<8} {entry['reason']}", flush=True
    )
    if entry["result"] == "failed":
        print("    " + "\n    ".join(entry["output"].splitlines()[-25:]), flush=True)


def missing() -> str:
    """The reason why nothing can run here, or ""."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if sanitizer() is None:
        return "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin; it comes with the CUDA toolkit"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description="compute-sanitizer over the Triton and CUDA kernels")
    parser.add_argument("--ops", nargs="+", choices=sorted(OPS), default=sorted(OPS))
    parser.add_argument("--impls", nargs="+", choices=sorted(TOOLS), default=sorted(TOOLS))
    parser.add_argument("--tools", nargs="+", choices=TOOLS["cuda"], default=list(TOOLS["cuda"]))
    parser.add_argument("--jobs", type=int, default=8, help="processes at a time")
    parser.add_argument("--limit", type=float, default=150, help="seconds for one op under one tool")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="for all of them; the last ones are left out"
    )
    parser.add_argument("--record", action="store_true", help="write results/<device>/sanitizer.json")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--run", choices=sorted(OPS), help="run one op and impl in this process, for the sanitizer")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda", help="of --run; cpu with TRITON_INTERPRET=1"
    )
    options = parser.parse_args()
    if options.run:
        return run_op(options.run, options.impls[0], options.device)
    runs = runs_of(options.ops, options.impls, options.tools)

    def save(entries: list[dict[str, Any]]) -> None:
        if options.record:
            write({"environment": environment(machine_of(None)), "results": entries}, "sanitizer", options.results)

    reason = missing()
    if reason:
        entries = [
            {"op": op, "impl": impl, "tool": tool, "result": "not run", "reason": reason} for tool, op, impl in runs
        ]
        for entry in entries:
            show(entry)
        save(entries)
    else:
        entries = sanitize_all(runs, options, save)
    counted = [entry for entry in entries if counts(entry["tool"], entry["op"], entry["impl"])]
    return 0 if all(entry["result"] == "passed" for entry in counted) else 1


if __name__ == "__main__":
    sys.exit(main())
