"""`make gpu`: everything that a GPU can prove, with no network, in under nine minutes.

    python -m benchmarks.gpu [--steps build,tests,verify,sanitizer,benchmarks,peers,plots] [--full] [--seconds 525]

Each step is a process of its own with a limit: its share of the time, and what the steps before it left. A step that
fails or is cut does not stop the next; the exit code is 0 where every step that was asked for passed. The output of
each goes to build/gpu/<step>.log. This file needs nothing but Python, so that it can report a build that failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "gpu"
TAIL = 25  # lines of a failed step's output that are shown
ATTENTION_WEIGHT = 3  # of the benchmarks' time, in shares of another room's
MARGIN = 12  # seconds before its limit at which a benchmark begins no further case, so that it can still write


@dataclass(frozen=True)
class Step:
    """One part of the run: its share of the time in seconds, whether it needs a device, and how to run it."""

    name: str
    share: float
    needs_gpu: bool
    run: Callable[[Options, float], list[Outcome]]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    full: bool
    results: Path


@dataclass(frozen=True)
class Outcome:
    """A line of the summary."""

    name: str
    result: str  # passed, failed, cut or not run
    seconds: float
    detail: str = ""


def run(name: str, command: list[str], limit: float, environment: dict[str, str] | None = None) -> Outcome:
    """Run a command for at most `limit` seconds; all of its processes end with it."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{name.replace(' ', '_')}.log"
    begin = time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=max(1.0, limit))
        except (subprocess.TimeoutExpired, KeyboardInterrupt) as stopped:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if isinstance(stopped, KeyboardInterrupt):
                raise
            return Outcome(name, "cut", time.perf_counter() - begin, f"after {limit:.0f} s; {last_line(log)}")
    result = "passed" if code == 0 else "failed"
    return Outcome(name, result, time.perf_counter() - begin, last_line(log) if code == 0 else f"exit code {code}")


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:100] if lines else ""


def module(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def build(options: Options, limit: float) -> list[Outcome]:
    flags = ("-qq", "--no-index", "--no-deps", "--no-build-isolation", "--editable", ".")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return [run("build", module("pip", "install", *flags), limit, {"PATH": path})]


def tests(options: Options, limit: float) -> list[Outcome]:
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    return [run("tests", module("pytest", "-q", "--durations=15", *parallel), limit)]


def verify(options: Options, limit: float) -> list[Outcome]:
    return [run("verify", module("bert_fast.cli.main", "verify", "--record"), limit)]


def sanitizer(options: Options, limit: float) -> list[Outcome]:
    each = str(max(20, int(limit / 2) - 5))  # two waves of processes
    flags = ("--record", "--limit", each, "--results", str(options.results))
    return [run("sanitizer", module("benchmarks.gpu_sanitize", *flags), limit)]


def rooms() -> list[str]:
    """The rooms that have a benchmark, the one with the most cases first."""
    found = sorted(path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py"))
    return sorted(found, key=lambda room: room != "attention")


def recorded(options: Options, limit: float) -> list[str]:
    """The options of a benchmark that is to end within `limit`."""
    flags = ["--device", "cuda", "--record", "--results", str(options.results)]
    flags += ["--budget", f"{max(5.0, limit - MARGIN):.0f}"]
    return flags if options.full else [*flags, "--quick"]


def benchmarks(options: Options, limit: float) -> list[Outcome]:
    """One process a room: a fault of one room's kernels, which ends the process, leaves the others their turn."""
    found: list[Outcome] = []
    end = time.perf_counter() + limit
    weights = {room: ATTENTION_WEIGHT if room == "attention" else 1 for room in rooms()}
    for room in rooms():
        left = max(1.0, end - time.perf_counter())
        own = left * weights[room] / sum(weights.values())
        del weights[room]
        found.append(run(f"benchmark {room}", module(f"benchmarks.bench_{room}", *recorded(options, own)), own))
        show(found[-1])
    return found


def peers(options: Options, limit: float) -> list[Outcome]:
    return [run("peers", module("benchmarks.gpu_peers", *recorded(options, limit - 2 * MARGIN)), limit)]


def plots(options: Options, limit: float) -> list[Outcome]:
    folders = [str(path) for path in sorted(options.results.glob("*")) if path.is_dir()]
    return [run("plots", module("benchmarks.plots", *folders), limit)]


STEPS = (
    Step("build", 60, False, build),
    Step("tests", 150, False, tests),
    Step("verify", 30, True, verify),
    Step("sanitizer", 70, True, sanitizer),
    Step("benchmarks", 120, True, benchmarks),
    Step("peers", 80, True, peers),
    Step("plots", 15, False, plots),
)


def has_gpu() -> bool:
    """Whether torch sees a CUDA device, asked in a process of its own."""
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def show(outcome: Outcome) -> None:
    """A line for an outcome, and the end of its log where it failed."""
    print(f"== gpu: {outcome.name}: {outcome.result}, {outcome.seconds:.0f} s  {outcome.detail}", flush=True)
    log = LOGS / f"{outcome.name.replace(' ', '_')}.log"
    if outcome.result in ("failed", "cut") and log.exists():
        print("    " + "\n    ".join(log.read_text(errors="replace").splitlines()[-TAIL:]), flush=True)


def run_steps(steps: list[Step], options: Options, seconds: float, gpu: bool) -> list[Outcome]:
    """Every step in turn. What a step leaves of its share goes to those after it, in proportion to theirs."""
    end = time.perf_counter() + seconds
    found: list[Outcome] = []
    for index, step in enumerate(steps):
        if step.needs_gpu and not gpu:
            found.append(Outcome(step.name, "not run", 0.0, "no CUDA device: torch.cuda.is_available() is False"))
            show(found[-1])
            continue
        left = end - time.perf_counter()
        limit = left * step.share / sum(later.share for later in steps[index:])
        print(f"== gpu: {step.name}, at most {limit:.0f} s", flush=True)
        outcomes = step.run(options, limit)
        if [outcome.name for outcome in outcomes] == [step.name]:
            show(outcomes[0])
        found += outcomes
    return found


def table(outcomes: list[Outcome], seconds: float) -> str:
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{o.name:<{width}}  {o.result:<8} {o.seconds:6.0f} s  {o.detail}" for o in outcomes]
    passed = sum(outcome.result == "passed" for outcome in outcomes)
    return "\n".join([*lines, f"{'in all':<{width}}  {passed} of {len(outcomes)} passed, {seconds:.0f} s"])


def main() -> int:
    names = ",".join(step.name for step in STEPS)
    parser = argparse.ArgumentParser(description="everything that a GPU can prove")
    parser.add_argument("--steps", default=names, help=f"some of {names}")
    parser.add_argument("--seconds", type=float, default=525, help="for all of it")
    parser.add_argument("--full", action="store_true", help="the benchmarks' full set of cases: give it more seconds")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parsed = parser.parse_args()
    asked = parsed.steps.split(",")
    unknown = sorted(set(asked) - set(names.split(",")))
    if unknown:
        parser.error(f"--steps has {', '.join(unknown)}; expected some of {names}")
    begin = time.perf_counter()
    steps = [step for step in STEPS if step.name in asked]
    outcomes = run_steps(steps, Options(parsed.full, parsed.results), parsed.seconds, has_gpu())
    print(f"\n{table(outcomes, time.perf_counter() - begin)}")
    print(f"logs: {LOGS}")
    return 0 if all(outcome.result == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
