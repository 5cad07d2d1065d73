"""`make gpu-check` and `make gpu-bench`: what a lent GPU can show, without network, in two commands.

    python -m benchmarks.gpu.run check|bench [--steps build,launches,...] [--out FOLDER] [--full] [--seconds N]
    python -m benchmarks.gpu.run check|bench --rehearse      every step on CPU tensors, where there is no GPU

`check` (300 s) builds or imports the CUDA kernels, launches each, runs the tests and records what passed; `bench` (390
s) measures. Each step is a process with a time limit: its share of the time, plus what earlier steps left. A step that
fails or exceeds its limit does not stop the next. The exit code is 0 if every requested step passed, 1 if one did not,
2 without a CUDA device. Each step's output is build/gpu/<step>.log, the final table build/gpu/summary_<command>.txt.
With `--out` everything that the run wrote is also packed into FOLDER/gpu_<command>.tar.gz after each step, for
unpacking in another checkout. This file needs only Python, so that it can report a broken build.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOGS = ROOT / "build" / "gpu"
PREBUILT = ROOT / "build" / "prebuilt"  # modules that `make gpu-twin` built elsewhere, and the report of their build
TAIL = 25  # lines shown of a failed step's output
MARGIN = 8  # seconds before its limit after which a benchmark begins no case, so that it can still write
GRACE = 5.0  # seconds between the interrupt, on which pytest and the benchmarks report what they have, and the kill
SLOWER = 4  # times the seconds for a rehearsal: the emulator and two cores are slower than a device and sixteen
PLAIN = 25.0  # seconds of the build's limit reserved for a build without the CUDA kernels
# One compiler thread a process: eight processes compile at once in the warm-up, and the timed runs use their caches.
COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
MODELS = {"pretraining": "benchmarks.models.pretraining", "inference": "benchmarks.models.gpu_inference"}
AFTERWARDS = {"targets": "benchmarks.gpu.targets", "plots": "benchmarks.reports.plots"}  # read the recorded results
CUDA_OPS = ("attention", "add_layer_norm", "bias_gelu")  # ops with CUDA C++ kernels, timed in processes of their own
FIRST_OPS = ("attention", "add_layer_norm", "bias_gelu", "embedding_layer_norm")
LAST_OPS = ("masked_lm_loss", "lamb", "padding")
# Whether `bert_fast._CUDA` was built from these sources, imports here and has code for this GPU (argv[1], e.g.
# "90"; "" for any).
IMPORTS = """
import json, pathlib, runpy, sys, torch
info = pathlib.Path("bert_fast/_build_info.json")
report = json.loads(info.read_text()).get("_CUDA", {}) if info.exists() else {}
if not report.get("built"):
    raise SystemExit(f"bert_fast._CUDA is not built: {report.get('reason', 'no report of a build')}")
sources_hash = runpy.run_path("csrc/build_flags.py")["cuda_sources_hash"]
changed = [op for op, built in report["sources"].items() if built != sources_hash(pathlib.Path("."), op)]
if changed:
    raise SystemExit(f"bert_fast._CUDA was built from other sources of {', '.join(changed)}")
import bert_fast._CUDA
architectures = report.get("architectures", [])
needed = {"90": "90a"}.get(sys.argv[1], sys.argv[1])
if needed and needed not in architectures:
    raise SystemExit(f"bert_fast._CUDA has code for {architectures}; this device needs {needed}")
print(f"bert_fast._CUDA imports, with code for {', '.join(architectures)}")
"""


@dataclass(frozen=True)
class Options:
    """The parsed command line."""

    full: bool
    results: Path
    capability: str = ""  # of the device, e.g. "90"
    rehearsal: bool = False  # on CPU tensors, and in the emulator

    @property
    def device(self) -> str:
        return "cpu" if self.rehearsal else "cuda"


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
    """Install the modules of `make gpu-twin` if they came along and import; else build, at worst without any."""
    end = time.perf_counter() + limit
    flags = ("-qq", "--no-index", "--no-deps", "--no-build-isolation", "--editable", ".")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"

    def built(name: str, seconds: float, **environment: str) -> list[Outcome]:
        """A build, and the check of what it made."""
        done = run(name, module("pip", "install", *flags), seconds, {"PATH": path, **environment})
        if done.result != "passed":
            return [done]
        return [done, run(f"import after {name}", [sys.executable, "-c", IMPORTS, options.capability], 30.0)]

    if list(PREBUILT.glob("_CUDA*.so")):
        install_prebuilt()
        outcomes = built("installation", 30.0, BERT_FAST_NATIVE="keep")
        if outcomes[-1].result == "passed":
            return outcomes
    capability = (
        options.capability and f"{options.capability[:-1]}.{options.capability[-1]}{'a' * (options.capability == '90')}"
    )
    architectures = {"TORCH_CUDA_ARCH_LIST": capability} if capability else {}
    outcomes = built("build", end - time.perf_counter() - PLAIN, MAX_JOBS=str(os.cpu_count() or 1), **architectures)
    if outcomes[0].result != "passed":  # stopped by the limit: no later step could run at all
        outcomes += [
            run(
                "build without kernels",
                module("pip", "install", *flags),
                PLAIN,
                {"PATH": path, "BERT_FAST_NATIVE": "0"},
            )
        ]
    return outcomes


def install_prebuilt() -> None:
    """Copy the prebuilt modules into the package; one that a process has loaded is replaced, not overwritten."""
    for path in sorted(PREBUILT.iterdir()):
        partial = ROOT / "bert_fast" / f".{path.name}.partial"
        shutil.copy2(path, partial)
        partial.replace(ROOT / "bert_fast" / path.name)


def launches(options: Options, limit: float) -> list[Outcome]:
    """Each CUDA op on a few sizes; on a Hopper its own kernels."""
    return [run("launches", module("benchmarks.gpu.launches", "--device", options.device), limit)]


def pytest(name: str, limit: float, *arguments: str) -> list[Outcome]:
    """A process of pytest per core, and with pytest-timeout a limit for each test."""
    workers = ["-n", str(min(16, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []
    timeout = ["--timeout", "60"] if importlib.util.find_spec("pytest_timeout") else []
    flags = ["-q", "--durations=10", "--continue-on-collection-errors", *workers, *timeout]
    return [run(name, module("pytest", *flags, *arguments), limit, {"OMP_NUM_THREADS": "1"})]


def hopper_tests(options: Options, limit: float) -> list[Outcome]:
    """attention's kernels for Hopper."""
    few = ["-k", "one"] if options.rehearsal else []
    return pytest("tests of Hopper", limit, "tests/kernels/test_attention_hopper.py", *few)


def gpu_tests(options: Options, limit: float) -> list[Outcome]:
    """What only a device can show."""
    which = ["tests/kernels/test_bias_gelu.py", "-k", "cuda"] if options.rehearsal else ["tests", "-m", "gpu"]
    return pytest("tests", limit, *which)


def verify(options: Options, limit: float) -> list[Outcome]:
    """Verification with records, a process for each op, implementation and dtype."""
    few = ["--impls", "cpu", "--ops", "bias_gelu", "padding"] if options.rehearsal else []
    return [run("verify", module("benchmarks.gpu.verify", "--limit", f"{limit - GRACE:.0f}", *few), limit)]


def sanitizer_and_warm_up(options: Options, limit: float) -> list[Outcome]:
    """The sanitizer occupies the device a little and half of the cores, the compilation the others."""
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(step, options, limit) for step in (sanitizer, warm_up)]
        return [outcome for future in both for outcome in future.result()]


def sanitizer(options: Options, limit: float) -> list[Outcome]:
    if options.rehearsal:
        flags = ("--run", "bias_gelu", "--impls", "cuda", "--device", "cpu")
        return [run("sanitizer", module("benchmarks.gpu.sanitize", *flags), limit)]
    flags = ("--record", "--seconds", f"{max(10.0, limit - GRACE - 5):.0f}", "--results", str(options.results))
    return [run("sanitizer", module("benchmarks.gpu.sanitize", *flags), limit)]


def benchmark_of(name: str) -> list[str]:
    """The command of an op's or a model's benchmark."""
    return module(MODELS[name]) if name in MODELS else module("bert_fast.cli", "bench", "kernels", name)


def warm_up(options: Options, limit: float) -> list[Outcome]:
    """Compile what the benchmarks need, concurrently; they compile the rest themselves."""
    names = ["bias_gelu"] if options.rehearsal else [*FIRST_OPS, *LAST_OPS, *MODELS]
    flags = ["--warm", "--device", options.device, *([] if options.full else ["--quick"])]
    begin = time.perf_counter()

    def warm(name: str) -> Outcome:
        return run(f"warm-up {name}", [*benchmark_of(name), *flags], limit, {} if name in MODELS else COMPILER)

    with ThreadPoolExecutor(len(names)) as pool:
        outcomes = dict(zip(names, pool.map(warm, names), strict=True))
    bad = [f"{name} {outcome.result}" for name, outcome in outcomes.items() if outcome.result != "passed"]
    detail = f"{len(names) - len(bad)} of {len(names)} ready" + f" ({', '.join(bad)})" * bool(bad)
    return [Outcome("warm-up", "failed" if bad else "passed", time.perf_counter() - begin, detail)]


def recorded(options: Options, limit: float) -> list[str]:
    """The options of a benchmark that must end within `limit`."""
    flags = ["--device", options.device, "--record", "--results", str(options.results)]
    flags += ["--budget", f"{max(4.0, limit - GRACE - MARGIN):.0f}"]
    return flags if options.full else [*flags, "--quick"]


def benchmarks(ops: Sequence[str], options: Options, limit: float) -> list[Outcome]:
    """Peers and Triton, then the CUDA kernels: a process for each, since a fault on the device ends its process."""
    runs = [(op, ("triton",)) for op in ops] + [(op, ("cuda",)) for op in ops if op in CUDA_OPS]
    if options.rehearsal:
        runs = [(ops[-1], ("cpu",))]
    outcomes: list[Outcome] = []
    end = time.perf_counter() + limit
    for index, (op, impls) in enumerate(runs):
        share = max(1.0, end - time.perf_counter()) / (len(runs) - index)
        command = [*benchmark_of(op), "--impls", *impls, *recorded(options, share)]
        outcomes.append(run(f"benchmark {op} {impls[0]}", command, share, COMPILER))
    return outcomes


def whole_model(name: str, options: Options, limit: float) -> list[Outcome]:
    size = ["--size", "tiny"] if options.rehearsal else []
    return [run(name, [*benchmark_of(name), *size, *recorded(options, limit - MARGIN)], limit)]


def after_benchmarks(name: str, options: Options, limit: float) -> list[Outcome]:
    """Run a script over the GPUs' recorded results; in a rehearsal over the CPU's."""
    folders = sorted(
        path
        for path in options.results.glob("*")
        if path.is_dir() and path.name.startswith("cpu-") == options.rehearsal
    )
    if not folders:
        return [Outcome(name, "not run", 0.0, "no benchmark on a GPU is recorded")]
    return [run(name, module(AFTERWARDS[name], *map(str, folders)), limit)]


# Correctness before speed: `auto` relies on the records of `verify`. The most important of each kind comes first.
COMMANDS = {
    "check": (
        Step("build", 75, False, build),
        Step("launches", 15, True, launches),
        Step("hopper", 40, True, hopper_tests),
        Step("verify", 45, True, verify),
        Step("tests", 65, True, gpu_tests),
        Step("sanitizer", 60, True, sanitizer_and_warm_up),
    ),
    "bench": (
        Step("attention", 80, True, partial(benchmarks, FIRST_OPS[:1])),
        Step("rows", 65, True, partial(benchmarks, FIRST_OPS[1:])),
        Step("pretraining", 110, True, partial(whole_model, "pretraining")),
        Step("others", 50, True, partial(benchmarks, LAST_OPS)),
        Step("inference", 65, True, partial(whole_model, "inference")),
        Step("targets", 8, False, partial(after_benchmarks, "targets")),
        Step("plots", 12, False, partial(after_benchmarks, "plots")),
    ),
}


def device_here() -> tuple[str, str]:
    """The compute capability of the CUDA device, e.g. "90", or "" and the reason; from a process of its own."""
    code = (
        "import torch; print(torch.__version__, '%d%d' % torch.cuda.get_device_capability() "
        "if torch.cuda.is_available() else '')"
    )
    query = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if query.returncode:
        problem = (query.stderr.strip().splitlines() or ["no reason given"])[-1]
        return "", f"{sys.executable} cannot import torch ({problem}); set PYTHON to the Python that has it"
    version, _, capability = query.stdout.strip().partition(" ")
    return capability, "" if capability else f"no CUDA device: torch.cuda.is_available() is False in torch {version}"


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
    begin = time.perf_counter()
    end = begin + seconds
    outcomes: list[Outcome] = []
    for index, step in enumerate(steps):
        left = end - time.perf_counter()
        limit = left * step.share / sum(later.share for later in steps[index:])
        print(f"== gpu: {step.name}, at {time.perf_counter() - begin:.0f} s, for at most {limit:.0f} s", flush=True)
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


def pack(folder: Path, command: str, results: Path, since: float) -> Path:
    """Pack the logs, results, plots and records written after `since` into folder/gpu_<command>.tar.gz.

    Its paths are those of a checkout, also of a record that was written to the user's cache.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bert_fast" / "verified"
    records = "bert_fast/verified"
    sources = ((LOGS, "build/gpu"), (results, "benchmarks/results"), (cache, records), (ROOT / records, records))
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"gpu_{command}.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for source, name in sources:
            for path in sorted(source.rglob("*")):
                if path.is_file() and path.stat().st_mtime >= since:
                    archive.add(path, f"{name}/{path.relative_to(source)}")
    return file


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="what a lent GPU can show, in two commands")
    parser.add_argument("command", choices=list(COMMANDS))
    parser.add_argument("--steps", help="some of its steps, with commas; all by default")
    parser.add_argument(
        "--seconds", type=float, help="for all steps together (check 300, bench 390; a rehearsal 4 times as long)"
    )
    parser.add_argument("--full", action="store_true", help="every case of the benchmarks; needs more seconds")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument(
        "--out", type=Path, help="a folder for gpu_<command>.tar.gz, which has everything that the run wrote"
    )
    parser.add_argument("--rehearse", action="store_true", help="every step on CPU tensors, without a GPU")
    parsed = parser.parse_args()
    known = [step.name for step in COMMANDS[parsed.command]]
    parsed.steps = parsed.steps.split(",") if parsed.steps else known
    if unknown := sorted(set(parsed.steps) - set(known)):
        parser.error(f"--steps has {', '.join(unknown)}; expected some of {','.join(known)}")
    return parsed


def stand_ins() -> None:
    """For a rehearsal: the emulator as a Hopper in place of a device. (Triton 3.6's interpreter needs NumPy < 2.4.)"""
    os.environ.setdefault("BERT_FAST_EMULATED_CAPABILITY", "90")
    if "BERT_FAST_CUDA_EMULATOR" not in os.environ:
        build = runpy.run_path(str(ROOT / "tests" / "emulator" / "build.py"))["build"]
        os.environ["BERT_FAST_CUDA_EMULATOR"] = str(build())


def main() -> int:
    parsed = arguments()
    steps = [step for step in COMMANDS[parsed.command] if step.name in parsed.steps]
    shares = sum(step.share for step in COMMANDS[parsed.command])
    seconds = parsed.seconds or shares * (SLOWER if parsed.rehearse else 1)
    if parsed.rehearse:
        stand_ins()  # before the clock starts: a device needs none
    since = time.time() - 1  # file systems round
    if parsed.rehearse:
        options = Options(parsed.full, LOGS / "rehearsal", rehearsal=True)
    else:
        capability, reason = device_here()
        if reason and any(step.needs_gpu for step in steps):
            print(f"gpu: {reason}; nothing was run", file=sys.stderr)
            return 2
        options = Options(parsed.full, parsed.results.resolve(), capability)

    def keep(outcomes: list[Outcome]) -> None:
        LOGS.mkdir(parents=True, exist_ok=True)
        (LOGS / f"summary_{parsed.command}.txt").write_text(table(outcomes) + "\n")
        if parsed.out:
            pack(parsed.out, parsed.command, options.results, since)

    outcomes = run_steps(steps, options, seconds - (time.time() - since), keep)
    print(f"\n{table(outcomes)}\nlogs: {LOGS}")
    return 0 if all(outcome.result == "passed" for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
