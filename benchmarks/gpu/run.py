"""`make gpu`: everything that a GPU can prove, with no network, in under nine minutes.

    python -m benchmarks.gpu.run [--steps build,tests,...] [--out FOLDER] [--full] [--seconds 525]

Each step is a process of its own with a limit: its share of the time, and what the steps before it left. A step that
fails or is cut does not stop the next. The exit code is 0 where every step that was asked for passed, 1 where one did
not, 2 where there is no CUDA device. The output of each is build/gpu/<step>.log, the table at the end
build/gpu/summary.txt. With `--out` everything that the run wrote is also packed into FOLDER/gpu.tar.gz, anew after each
step, to be unpacked in another checkout. This file needs nothing but Python, so that it can report a broken build.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build" / "gpu"
TAIL = 25  # lines of a failed step's output that are shown
ATTENTION_WEIGHT = 3  # of the benchmarks' time, in shares of another op's
MARGIN = 8  # seconds before its limit at which a benchmark begins no further case, so that it can still write
GRACE = 5.0  # seconds between the interrupt, at which pytest and the benchmarks report what they have, and the kill
PLAIN = 25.0  # seconds of the build's limit that are kept for a build without the CPU kernels
# One compiler a process: eight processes compile at a time when they warm up, and the timed runs find it all cached.
COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
MODELS = {"pretraining": "models.pretraining", "peers": "models.gpu_inference"}  # steps that measure whole models
COMMAND_LINE_TESTS = ("tests/cli", "tests/pretrain/test_kill.py")
VERIFY = """
from types import SimpleNamespace
from bert_fast.cli.verify import run
raise SystemExit(run(SimpleNamespace(ops=None, impls=None, seed=0, record=True)))
"""


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
    """Run a command for at most `limit` seconds; all of its processes end with it."""
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
        cut = not ends_in(process, limit - GRACE)
        if cut:
            process.send_signal(signal.SIGINT)
            ends_in(process, GRACE)
            end_group(process)
    seconds = time.perf_counter() - begin
    said = last_line(log)
    if cut:
        return Outcome(name, "cut", seconds, f"after {limit:.0f} s; {said}")
    if process.returncode:
        return Outcome(name, "failed", seconds, f"exit code {process.returncode}; {said}")
    return Outcome(name, "passed", seconds, said)


def ends_in(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for a process; it ends with this one where that is interrupted."""
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
    """The last line of a log that says something; a benchmark's is the one that counts its cases."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    counts = [line for line in lines if re.search(r": \d+ of \d+ cases in ", line)]
    return (counts or lines or [""])[-1][:110]


def module(*arguments: str) -> list[str]:
    return [sys.executable, "-m", *arguments]


def build(options: Options, limit: float) -> list[Outcome]:
    """With the CPU kernels; where that does not end well, without them, since no later step could do anything."""
    flags = ("-qq", "--no-index", "--no-deps", "--no-build-isolation", "--editable", ".")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    found = [run("build", module("pip", "install", *flags), limit - PLAIN, {"PATH": path})]
    if found[0].result != "passed":
        plain = {"PATH": path, "BERT_FAST_NATIVE": "0"}
        found.append(run("build without CPU kernels", module("pip", "install", *flags), PLAIN, plain))
    return found


def has_command_line() -> bool:
    """Whether the package is there that bert-fast's command line is made with, and the kernels do without."""
    return importlib.util.find_spec("jsonargparse") is not None


def tests(options: Options, limit: float) -> list[Outcome]:
    """The kernels' tests, which run on the device, then the others."""
    count = min(8, os.cpu_count() or 1)
    parallel = ["-n", str(count)] if importlib.util.find_spec("xdist") else []
    left_out = () if has_command_line() else COMMAND_LINE_TESTS
    others = [f"--ignore={path}" for path in ("tests/kernels", *left_out)]
    end = time.perf_counter() + limit
    found = []
    for name, which, share in (("tests kernels", ["tests/kernels"], 0.6), ("tests others", ["tests", *others], 1.0)):
        command = module("pytest", "-q", "--durations=15", *parallel, *which)
        outcome = run(name, command, share * (end - time.perf_counter()), {"OMP_NUM_THREADS": "2"})
        found.append(outcome)
    if left_out:
        found.append(Outcome("tests command line", "not run", 0.0, f"jsonargparse is missing: {', '.join(left_out)}"))
    return found


def verify(options: Options, limit: float) -> list[Outcome]:
    """`bert-fast verify --record`, by the function behind it where the command line's package is missing."""
    direct = [sys.executable, "-c", VERIFY]
    command = module("bert_fast.cli.main", "verify", "--record") if has_command_line() else direct
    return [run("verify", command, limit)]


def sanitizer(options: Options, limit: float) -> list[Outcome]:
    each = f"{max(10.0, limit - GRACE - 10):.0f}"  # its processes run at the same time
    flags = ("--record", "--limit", each, "--results", str(options.results))
    return [run("sanitizer", module("benchmarks.gpu.sanitize", *flags), limit)]


CPU_OPS = {"linear_int8"}  # without kernels for a GPU


def ops() -> list[str]:
    """The ops that have a benchmark on a GPU, the one with the most cases first."""
    found = {
        path.stem for path in (ROOT / "benchmarks" / "ops").glob("[a-z]*.py") if not path.stem.endswith("_peers")
    } - CPU_OPS
    return sorted(sorted(found), key=lambda op: op != "attention")


def warm_up(options: Options, limit: float) -> list[Outcome]:
    """Compile what the benchmarks need, all of them at a time. What this does not reach they do themselves."""
    quick = [] if options.full else ["--quick"]
    files = {op: f"ops.{op}" for op in ops()} | MODELS
    begin = time.perf_counter()

    def warm(name: str) -> Outcome:
        command = module(f"benchmarks.{files[name]}", "--warm", *quick)
        return run(f"warm-up {name}", command, limit, {} if name in MODELS else COMPILER)

    with ThreadPoolExecutor(len(files)) as pool:
        found = list(pool.map(warm, files))
    bad = [
        f"{outcome.name.removeprefix('warm-up ')} {outcome.result}" for outcome in found if outcome.result != "passed"
    ]
    detail = f"{len(found) - len(bad)} of {len(found)} ready" + f" ({', '.join(bad)})" * bool(bad)
    return [Outcome("warm-up", "passed", time.perf_counter() - begin, detail)]


def recorded(options: Options, limit: float) -> list[str]:
    """The options of a benchmark that is to end within `limit`."""
    flags = ["--device", "cuda", "--record", "--results", str(options.results)]
    flags += ["--budget", f"{max(4.0, limit - GRACE - MARGIN):.0f}"]
    return flags if options.full else [*flags, "--quick"]


def benchmarks(options: Options, limit: float) -> list[Outcome]:
    """One process an op: a fault of one op's kernels, which ends the process, leaves the others their turn."""
    found: list[Outcome] = []
    end = time.perf_counter() + limit
    weights = {op: ATTENTION_WEIGHT if op == "attention" else 1 for op in ops()}
    for op in ops():
        left = max(1.0, end - time.perf_counter())
        own = left * weights[op] / sum(weights.values())
        del weights[op]
        command = module(f"benchmarks.ops.{op}", *recorded(options, own))
        found.append(run(f"benchmark {op}", command, own, COMPILER))
    return found


def pretraining(options: Options, limit: float) -> list[Outcome]:
    return whole_model("pretraining", options, limit)


def peers(options: Options, limit: float) -> list[Outcome]:
    return whole_model("peers", options, limit)


def whole_model(name: str, options: Options, limit: float) -> list[Outcome]:
    return [run(name, module(f"benchmarks.{MODELS[name]}", *recorded(options, limit - MARGIN)), limit)]


def of_gpus(options: Options) -> list[str]:
    """The results' folders of GPUs."""
    found = sorted(path for path in options.results.glob("*") if path.is_dir() and not path.name.startswith("cpu-"))
    return [str(path) for path in found]


def targets(options: Options, limit: float) -> list[Outcome]:
    return after_benchmarks("targets", options, limit)


def plots(options: Options, limit: float) -> list[Outcome]:
    return after_benchmarks("plots", options, limit)


def after_benchmarks(name: str, options: Options, limit: float) -> list[Outcome]:
    """Run the script `name` over what the benchmarks recorded."""
    folders = of_gpus(options)
    if not folders:
        return [Outcome(name, "not run", 0.0, "no benchmark on a GPU is recorded")]
    return [run(name, module(f"benchmarks.{name}", *folders), limit)]


# What is proven comes before what is measured. `verify` is before the benchmarks since `auto` relies on its record.
STEPS = (
    Step("build", 90, False, build),
    Step("tests", 110, True, tests),
    Step("verify", 20, True, verify),
    Step("sanitizer", 55, True, sanitizer),
    Step("warm-up", 50, True, warm_up),
    Step("benchmarks", 125, True, benchmarks),
    Step("pretraining", 45, True, pretraining),
    Step("peers", 15, True, peers),
    Step("targets", 5, False, targets),
    Step("plots", 10, False, plots),
)


def missing() -> str:
    """Why nothing can run on a CUDA device here, asked in a process of its own; "" where it can."""
    code = "import torch; print(torch.__version__, torch.cuda.is_available())"
    asked = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if asked.returncode:
        problem = (asked.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"{sys.executable} can't import torch ({problem}); PYTHON=... names the Python that has it"
    version, found = asked.stdout.split()
    return (
        "" if found == "True" else f"no CUDA device was found: torch {version} says torch.cuda.is_available() is False"
    )


def show(outcome: Outcome) -> None:
    """A line for an outcome, and the end of its log where it failed."""
    print(f"== gpu: {outcome.name}: {outcome.result}, {outcome.seconds:.0f} s  {outcome.detail}", flush=True)
    log = log_of(outcome.name)
    if outcome.result in ("failed", "cut") and log.exists():
        print("    " + "\n    ".join(log.read_text(errors="replace").splitlines()[-TAIL:]), flush=True)


def run_steps(
    steps: list[Step], options: Options, seconds: float, after: Callable[[list[Outcome]], None] = lambda found: None
) -> list[Outcome]:
    """Every step in turn. What a step leaves of its share goes to those after it, in proportion to theirs."""
    end = time.perf_counter() + seconds
    found: list[Outcome] = []
    for index, step in enumerate(steps):
        left = end - time.perf_counter()
        limit = left * step.share / sum(later.share for later in steps[index:])
        print(f"== gpu: {step.name}, at most {limit:.0f} s", flush=True)
        outcomes = step.run(options, limit) if left > 0 else [Outcome(step.name, "not run", 0.0, "the time was over")]
        for outcome in outcomes:
            show(outcome)
        found += outcomes
        after(found)
    return found


def table(outcomes: list[Outcome]) -> str:
    """The summary."""
    width = max(len(outcome.name) for outcome in outcomes)
    lines = [f"{o.name:<{width}}  {o.result:<8} {o.seconds:6.0f} s  {o.detail}" for o in outcomes]
    passed, seconds = sum(o.result == "passed" for o in outcomes), sum(o.seconds for o in outcomes)
    return "\n".join([*lines, f"{'in all':<{width}}  {passed} of {len(outcomes)} passed, {seconds:.0f} s"])


def pack(folder: Path, results: Path, since: float) -> Path:
    """Pack the logs, results, plots and records that were written since then into folder/gpu.tar.gz.

    The paths in it are those of a checkout; a record too that went to the user's cache, for want of a checkout.
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
    parser = argparse.ArgumentParser(description="everything that a GPU can prove")
    parser.add_argument("--steps", default=names, help=f"some of {names}")
    parser.add_argument("--seconds", type=float, default=525, help="for all of it")
    parser.add_argument("--full", action="store_true", help="the benchmarks' full set of cases: give it more seconds")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, help="a folder for gpu.tar.gz, which has everything that the run wrote")
    parsed = parser.parse_args()
    asked = parsed.steps.split(",")
    unknown = sorted(set(asked) - set(names.split(",")))
    if unknown:
        parser.error(f"--steps has {', '.join(unknown)}; expected some of {names}")
    since = time.time() - 1  # file systems round
    steps = [step for step in STEPS if step.name in asked]
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
