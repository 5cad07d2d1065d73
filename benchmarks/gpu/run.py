"""`make gpu`: everything that a GPU can show, without network, in under nine minutes.

    python -m benchmarks.gpu.run [--steps build,tests,...] [--out FOLDER] [--full] [--seconds 525]

Each step is a process with a time limit: its share of the time, plus what earlier steps left. A step that fails or
exceeds its limit does not stop the next. The exit code is 0 if every requested step passed, 1 if one did not, 2 without
a CUDA device. Each step's output is build/gpu/<step>.log, the final table build/gpu/summary.txt. With `--out`
everything that the run wrote is also packed into FOLDER/gpu.tar.gz after each step, for unpacking in another checkout.
This file needs only Python, so that it can report a broken build.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build" / "gpu"
TAIL = 25  # lines shown of a failed step's output
CPU_OPS = {"linear_int8"}  # ops without GPU kernels
ATTENTION_WEIGHT = 3  # attention's share of the benchmarks' time, relative to another op's
MARGIN = 8  # seconds before its limit after which a benchmark begins no case, so that it can still write
GRACE = 5.0  # seconds between the interrupt, on which pytest and the benchmarks report what they have, and the kill
PLAIN = 25.0  # seconds of the build's limit reserved for a build without the CPU kernels
# One compiler thread a process: eight processes compile at once in the warm-up, and the timed runs use their caches.
COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
MODELS = {"pretraining": "benchmarks.models.pretraining", "inference": "benchmarks.models.gpu_inference"}
AFTERWARDS = {"targets": "benchmarks.gpu.targets", "plots": "benchmarks.reports.plots"}  # read the recorded results
COMMAND_LINE_TESTS = ("tests/cli", "tests/pretrain/test_kill.py")
VERIFY = """
from types import SimpleNamespace
from bert_fast.cli.verify import run
raise SystemExit(run(SimpleNamespace(ops=None, impls=None, seed=0, record=True)))
"""


@dataclass(frozen=True)
class Options:
    """The parsed command line."""

    full: bool
    results: Path


@dataclass(frozen=True)
class Outcome:
    """A line of the summary."""

    name: str
    result: str  # passed, failed, stopped or not run
    seconds: float
    detail: str = ""


@dataclass(frozen=True)
class Step:
    """One part of the run: its share of the time in seconds, whether it needs a device, and how to run it."""

    name: str
    share: float
    needs_gpu: bool
    run: Callable[[Options, float], list[Outcome]]


def log_of(name: str) -> Path:
    return LOGS / f"{name.replace(' ', '_')}.log"


def run(name: str, command: list[str], limit: float, environment: dict[str, str] | None = None) -> Outcome:
    """Run a command for at most `limit` seconds, then end all of its processes."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = log_of(name)
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
        stopped = not ends_in(process, limit - GRACE)
        if stopped:
            process.send_signal(signal.SIGINT)
            ends_in(process, GRACE)
            end_group(process)
    seconds = time.perf_counter() - begin
    detail = last_line(log)
    if stopped:
        return Outcome(name, "stopped", seconds, f"after {limit:.0f} s; {detail}")
    if process.returncode:
        return Outcome(name, "failed", seconds, f"exit code {process.returncode}; {detail}")
    return Outcome(name, "passed", seconds, detail)


def ends_in(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Whether the process ends within `seconds`; a KeyboardInterrupt here ends it too."""
    try:
        process.wait(timeout=max(0.5, seconds))
    except subprocess.TimeoutExpired:
        return False
    except KeyboardInterrupt:
        end_group(process)
        raise
    return True


def end_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last non-empty line of a log; of a benchmark's, the line that counts its cases."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    counts = [line for line in lines if re.search(r": \d+ of \d+ cases in ", line)]
    return (counts or lines or [""])[-1][:110]


def module(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def build(options: Options, limit: float) -> list[Outcome]:
    """With the CPU kernels; if that fails, without them, since no later step could run otherwise."""
    flags = ("-qq", "--no-index", "--no-deps", "--no-build-isolation", "--editable", ".")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    outcomes = [run("build", module("pip", "install", *flags), limit - PLAIN, {"PATH": path})]
    if outcomes[0].result != "passed":
        plain = {"PATH": path, "BERT_FAST_NATIVE": "0"}
        outcomes.append(run("build without CPU kernels", module("pip", "install", *flags), PLAIN, plain))
    return outcomes


def has_command_line() -> bool:
    """Whether the package that bert-fast's command line needs is installed; the kernels do not need it."""
    return importlib.util.find_spec("jsonargparse") is not None


def tests(options: Options, limit: float) -> list[Outcome]:
    """The kernels' tests, which run on the device, then the others."""
    count = min(8, os.cpu_count() or 1)
    parallel = ["-n", str(count)] if importlib.util.find_spec("xdist") else []
    left_out = () if has_command_line() else COMMAND_LINE_TESTS
    others = [f"--ignore={path}" for path in ("tests/kernels", *left_out)]
    end = time.perf_counter() + limit
    outcomes = []
    for name, which, share in (("tests kernels", ["tests/kernels"], 0.6), ("tests others", ["tests", *others], 1.0)):
        command = module("pytest", "-q", "--durations=15", *parallel, *which)
        outcomes.append(run(name, command, share * (end - time.perf_counter()), {"OMP_NUM_THREADS": "2"}))
    if left_out:
        detail = f"jsonargparse is not installed: {', '.join(left_out)}"
        outcomes.append(Outcome("tests command line", "not run", 0.0, detail))
    return outcomes


def verify(options: Options, limit: float) -> list[Outcome]:
    """`bert-fast verify --record`, by a direct call of its function without the command line's package."""
    direct = [sys.executable, "-c", VERIFY]
    command = module("bert_fast.cli.main", "verify", "--record") if has_command_line() else direct
    return [run("verify", command, limit)]


def sanitizer(options: Options, limit: float) -> list[Outcome]:
    each = f"{max(10.0, limit - GRACE - 10):.0f}"  # its processes run concurrently
    flags = ("--record", "--limit", each, "--results", str(options.results))
    return [run("sanitizer", module("benchmarks.gpu.sanitize", *flags), limit)]


def ops() -> list[str]:
    """The ops with a benchmark on a GPU, the one with the most cases first."""
    names = {path.parent.name for path in (ROOT / "kernels").glob("*/cases.py")} - {"_common"} - CPU_OPS
    return sorted(sorted(names), key=lambda op: op != "attention")


def benchmark_of(name: str) -> list[str]:
    """The command of an op's or a model's benchmark."""
    return module(MODELS[name]) if name in MODELS else module("benchmarks.ops", name)


def warm_up(options: Options, limit: float) -> list[Outcome]:
    """Compile what the benchmarks need, concurrently; they compile the rest themselves."""
    quick = [] if options.full else ["--quick"]
    names = [*ops(), *MODELS]
    begin = time.perf_counter()

    def warm(name: str) -> Outcome:
        command = [*benchmark_of(name), "--warm", *quick]
        return run(f"warm-up {name}", command, limit, {} if name in MODELS else COMPILER)

    with ThreadPoolExecutor(len(names)) as pool:
        outcomes = dict(zip(names, pool.map(warm, names), strict=True))
    bad = [f"{name} {outcome.result}" for name, outcome in outcomes.items() if outcome.result != "passed"]
    detail = f"{len(names) - len(bad)} of {len(names)} ready" + f" ({', '.join(bad)})" * bool(bad)
    return [Outcome("warm-up", "passed", time.perf_counter() - begin, detail)]


def recorded(options: Options, limit: float) -> list[str]:
    """The options of a benchmark that must end within `limit`."""
    flags = ["--device", "cuda", "--record", "--results", str(options.results)]
    flags += ["--budget", f"{max(4.0, limit - GRACE - MARGIN):.0f}"]
    return flags if options.full else [*flags, "--quick"]


def benchmarks(options: Options, limit: float) -> list[Outcome]:
    """One process per op, so that a fault in one op's kernels does not end the other benchmarks."""
    outcomes: list[Outcome] = []
    end = time.perf_counter() + limit
    weights = {op: ATTENTION_WEIGHT if op == "attention" else 1 for op in ops()}
    for op in ops():
        share = max(1.0, end - time.perf_counter()) * weights[op] / sum(weights.values())
        del weights[op]
        outcomes.append(run(f"benchmark {op}", [*benchmark_of(op), *recorded(options, share)], share, COMPILER))
    return outcomes


def whole_model(name: str, options: Options, limit: float) -> list[Outcome]:
    return [run(name, [*benchmark_of(name), *recorded(options, limit - MARGIN)], limit)]


def after_benchmarks(name: str, options: Options, limit: float) -> list[Outcome]:
    """Run a script over the GPUs' recorded results."""
    folders = sorted(path for path in options.results.glob("*") if path.is_dir() and not path.name.startswith("cpu-"))
    if not folders:
        return [Outcome(name, "not run", 0.0, "no benchmark on a GPU is recorded")]
    return [run(name, module(AFTERWARDS[name], *map(str, folders)), limit)]


# Correctness before speed. `verify` precedes the benchmarks since `auto` relies on its record.
STEPS = (
    Step("build", 90, False, build),
    Step("tests", 110, True, tests),
    Step("verify", 20, True, verify),
    Step("sanitizer", 55, True, sanitizer),
    Step("warm-up", 50, True, warm_up),
    Step("benchmarks", 125, True, benchmarks),
    Step("pretraining", 45, True, partial(whole_model, "pretraining")),
    Step("inference", 15, True, partial(whole_model, "inference")),
    Step("targets", 5, False, partial(after_benchmarks, "targets")),
    Step("plots", 10, False, partial(after_benchmarks, "plots")),
)


def missing() -> str:
    """The reason why nothing can run on a CUDA device here, from a process of its own, or ""."""
    code = "import torch; print(torch.__version__, torch.cuda.is_available())"
    query = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if query.returncode:
        problem = (query.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"{sys.executable} cannot import torch ({problem}); set PYTHON to the Python that has it"
    version, available = query.stdout.split()
    return "" if available == "True" else f"no CUDA device: torch.cuda.is_available() is False in torch {version}"


def show(outcome: Outcome) -> None:
    """Print a line for an outcome, and the end of its log if it failed."""
    print(f"== gpu: {outcome.name}: {outcome.result}, {outcome.seconds:.0f} s  {outcome.detail}", flush=True)
    log = log_of(outcome.name)
    if outcome.result in ("failed", "stopped") and log.exists():
        print("    " + "\n    ".join(log.read_text(errors="replace").splitlines()[-TAIL:]), flush=True)


def run_steps(
    steps: list[Step], options: Options, seconds: float, after: Callable[[list[Outcome]], None] = lambda outcomes: None
) -> list[Outcome]:
    """Run the steps in order. Time that a step leaves goes to those after it, in proportion to their shares."""
    end = time.perf_counter() + seconds
    outcomes: list[Outcome] = []
    for index, step in enumerate(steps):
        left = end - time.perf_counter()
        limit = left * step.share / sum(later.share for later in steps[index:])
        print(f"== gpu: {step.name}, at most {limit:.0f} s", flush=True)
        new = step.run(options, limit) if left > 0 else [Outcome(step.name, "not run", 0.0, "out of time")]
        for outcome in new:
            show(outcome)
        outcomes += new
        after(outcomes)
    return outcomes


def table(outcomes: list[Outcome]) -> str:
    """The summary."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{o.name:<{width}}  {o.result:<8} {o.seconds:6.0f} s  {o.detail}" for o in outcomes]
    passed, seconds = sum(o.result == "passed" for o in outcomes), sum(o.seconds for o in outcomes)
    return "\n".join([*lines, f"{'total':<{width}}  {passed} of {len(outcomes)} passed, {seconds:.0f} s"])


def pack(folder: Path, results: Path, since: float) -> Path:
    """Pack the logs, results, plots and records written after `since` into folder/gpu.tar.gz.

    Its paths are those of a checkout, also of a record that was written to the user's cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bert_fast" / "verified"
    records = "bert_fast/verified"
    sources = ((LOGS, "build/gpu"), (results, "benchmarks/results"), (cache, records), (ROOT / records, records))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "gpu.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for source, name in sources:
            for path in sorted(source.rglob("*")):
                if path.is_file() and path.stat().st_mtime >= since:
                    archive.add(path, f"{name}/{path.relative_to(source)}")
    return file


def main() -> int:
    names = ",".join(step.name for step in STEPS)
    parser = argparse.ArgumentParser(description="everything that a GPU can show")
    parser.add_argument("--steps", default=names, help=f"some of {names}")
    parser.add_argument("--seconds", type=float, default=525, help="for all steps together")
    parser.add_argument("--full", action="store_true", help="every case of the benchmarks; needs more seconds")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, help="a folder for gpu.tar.gz, which has everything that the run wrote")
    parsed = parser.parse_args()
    requested = parsed.steps.split(",")
    unknown = sorted(set(requested) - set(names.split(",")))
    if unknown:
        parser.error(f"--steps has {', '.join(unknown)}; expected some of {names}")
    since = time.time() - 1  # file systems round
    steps = [step for step in STEPS if step.name in requested]
    reason = missing() if any(step.needs_gpu for step in steps) else ""
    if reason:
        print(f"gpu: {reason}; nothing was run", file=sys.stderr)
        return 2
    options = Options(parsed.full, parsed.results.resolve())

    def keep(outcomes: list[Outcome]) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        (LOGS / "summary.txt").write_text(table(outcomes) + "\n")
        if parsed.out:
            pack(parsed.out, options.results, since)

    outcomes = run_steps(steps, options, parsed.seconds - (time.time() - since), keep)
    print(f"\n{table(outcomes)}\nlogs: {LOGS}")
    return 0 if all(outcome.result == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
