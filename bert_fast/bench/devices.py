"""The device of a benchmark: how calls are timed on it, its ceilings, and the environment of the figures.

Each variant of a case is several calls that compute the same from other inputs, in turn, together larger than the
caches: no timed call finds its inputs in a cache, nor the result of the call before to be its own. On a CPU a call is
timed by the host's clock, on a GPU by a pair of CUDA events on one stream:

- before each call, outside the pair, a buffer of at least twice the L2 cache is read, so that the call reads its inputs
  from memory; meanwhile the host queues the call. Reading leaves no dirty lines for the call to write back.
- the call replays a CUDA graph of one call, so the time includes neither Python nor kernel launches. The remaining
  overhead, the median of a graph with one tiny kernel, is in the ceilings as `launch_us` and is not subtracted.
- a variant that cannot be captured (it waits for the device) is refused with the reason, since a time of plain calls
  compares with none of the others'; where a whole case waits (`Case.graph` is False), plain calls time all of it. The
  rows record which ("graph" or "calls").
"""

from __future__ import annotations

import itertools
import os
import platform
import random
import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bert_fast
from bert_fast.bench.samples import Summary, summary
from bert_fast.kernels._common.tuned import processor

Call = Callable[[], Any]
MEGABYTE = 1 << 20
CHECKOUT = Path(__file__).parents[2]  # the folder of the sources, unless the package is installed
SHORT = 0.2  # seconds: on a CPU a shorter call follows an untimed one
FLUSH = 256 * MEGABYTE  # at least: 60 us or more of reading, during which the host queues the timed call
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler prints a line at its start and its end
BUSY, BUSY_CORES = 0.6, 0.2  # load average per core, and cores of other processes, above which a machine is busy


class Kept(NamedTuple):
    """The result of a timed call, and which of the variant's calls it was."""

    number: int
    result: Any


class Timing(NamedTuple):
    """The times of each variant, the method, the reasons why others could not be timed, and one result of each."""

    times: dict[str, Summary]
    method: str
    refused: Mapping[str, str] = {}
    kept: Mapping[str, Kept] = {}


def timed(run: Call) -> float:
    """Seconds of one call by the host's clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds_in(seconds: float, seconds_per_round: float) -> int:
    """The number of rounds that fit, 5 to 200."""
    return min(200, max(5, int(seconds / max(seconds_per_round, 1e-9))))


def _copied(result: Any) -> Any:
    """The tensors of a result of a call, in memory of their own."""
    return result.clone() if isinstance(result, torch.Tensor) else type(result)(map(_copied, result))


def slug(text: str) -> str:
    """`text` as a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


class Cpu:
    """The processor, with torch's number of threads.

    Args:
        pause: seconds to wait before a timed call in runs with other runtimes: their threads spin after a call and
            share the cores with the next one (ONNX Runtime's for some 20 ms, which halved MKL's measured speed).
    """

    def __init__(self, pause: float = 0.0) -> None:
        self.device = torch.device("cpu")
        self.pause = pause

    def active(self) -> AbstractContextManager[Any]:
        """The context of the whole run."""
        return nullcontext()

    def interleaved(self, runs: Mapping[str, Sequence[Call]], seconds: float, graph: bool = True) -> Timing:
        """Times of the calls of each variant in turn, interleaved for about `seconds`, in a new order each round.

        A call shorter than `SHORT` follows an untimed one, of other inputs where the variant has several, so that its
        code is in the caches. A variant whose rounds together exceed `seconds` is skipped from then on, but not before
        three rounds, or one if a single call takes that long. One timed result of each, drawn at random, is kept.
        """
        times = {name: [timed(calls[0])] for name, calls in runs.items()}
        one = sum(self.pause + first * (2 if first < SHORT else 1) for (first,) in times.values())
        order, draw = list(runs), random.Random(0)
        kept: dict[str, Kept] = {}
        for done in range(rounds_in(seconds, one)):
            draw.shuffle(order)
            for name in order:
                if done < (3 if times[name][0] <= seconds else 1) or sum(times[name]) <= seconds:
                    time.sleep(self.pause)
                    index = (done + 1) % len(runs[name])
                    if times[name][0] < SHORT:
                        runs[name][(index + 1) % len(runs[name])]()
                    start = time.perf_counter()
                    result = runs[name][index]()
                    times[name].append(time.perf_counter() - start)
                    if draw.random() < 1 / (done + 1):  # each round is the kept one with the same probability
                        kept[name] = Kept(index, result)
                    del result
        return Timing({name: summary(samples[1:]) for name, samples in times.items()}, "calls", {}, kept)

    def with_peak(self, run: Call) -> tuple[Any, float | None]:
        """The result of a call, and the peak megabytes that it allocated through torch."""
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profile:
            result = run()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
        return result, max(itertools.accumulate(changes), default=0) / MEGABYTE

    def cache_bytes(self) -> int:
        """The size of the last level of the caches; 32 MB where the system doesn't say."""
        sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
        return max((int(size[:-1]) << {"K": 10, "M": 20}[size[-1]] for size in sizes), default=32 * MEGABYTE)

    def clock(self) -> dict[str, float]:
        """The clock of the fastest core now, in MHz; nothing where the system doesn't say."""
        cpuinfo = Path("/proc/cpuinfo")
        clocks = re.findall(r"cpu MHz\s*:\s*([\d.]+)", cpuinfo.read_text()) if cpuinfo.exists() else []
        return {"core_mhz": max(map(float, clocks))} if clocks else {}

    def release(self) -> None:
        """Nothing is cached."""

    def ceilings(self) -> dict[str, float]:
        """Bandwidth (GB/s) of a copy, read + written, and of reading, and matrix products (GFLOP/s), measured now.

        The best of several calls: others that use the machine make a call slower, never faster.
        """
        source, target = torch.randn(2**25), torch.empty(2**25)
        copy = min(timed(lambda: target.copy_(source)) for _ in range(9))
        read = min(timed(source.sum) for _ in range(9))
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        for _ in range(50):  # starts the threads, raises the clock
            a @ b
        product = min(timed(lambda: a @ b) for _ in range(15))
        return {
            "copy_gbytes_per_s": 2 * source.nbytes / copy / 1e9,
            "read_gbytes_per_s": source.nbytes / read / 1e9,
            **gemm_ceilings({"fp32": 2 * 1024**3 / product / 1e9}),
        }

    def name(self) -> str:
        """The name of the results' folder, e.g. "cpu-amd-epyc-2-threads-avx2"."""
        return slug(f"cpu {processor()} {torch.get_num_threads()} threads {torch.backends.cpu.get_cpu_capability()}")

    def details(self) -> dict[str, Any]:
        """Further fields of the environment."""
        return {}


def gemm_ceilings(known: Mapping[str, float], M: int = 1024, K: int = 768, N: int = 3072) -> dict[str, float]:
    """GFLOP/s of torch's fastest product on this processor for each precision, (M, K) by (K, N).

    FP32 and BF16 by MKL and by oneDNN with packed weights, unsigned by signed INT8 by oneDNN. A lower precision can use
    the product of a higher one, so its ceiling is never below that one's.
    """
    x, weight = torch.randn(M, K), torch.randn(N, K) / K
    runs: dict[str, dict[str, Call]] = {name: linear_calls(x.to(dtype), weight.to(dtype)) for name, dtype in _FLOATS}
    runs["int8"] = int8_call(x, weight)
    best, ceilings = max(known.values()), {}
    for name in ("fp32", "bf16", "int8"):
        for run in runs[name].values():
            first = timed(run)
            times = [timed(run) for _ in range(3 if first > 0.1 else 15)]
            best = max(best, 2 * M * K * N / min(times) / 1e9)
        ceilings[f"{name}_gemm_gflops"] = best
    return ceilings


_FLOATS = (("fp32", torch.float32), ("bf16", torch.bfloat16))


def linear_calls(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Call]:
    """x @ weight.T by torch's linear layer, and by oneDNN with packed weights if this torch has it."""
    calls: dict[str, Call] = {"linear": lambda: torch.nn.functional.linear(x, weight)}
    ops = torch.ops.mkldnn
    if torch.backends.mkldnn.is_available() and (x.dtype is torch.float32 or ops._is_mkldnn_bf16_supported()):
        packed = ops._reorder_linear_weight(weight, x.shape[0])
        calls["oneDNN"] = lambda: ops._linear_pointwise(x, packed, None, "none", [], "")
    return calls


def int8_call(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Call]:
    """The integer product with FP32 results; empty if this torch has no oneDNN."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")):
        return {}
    a = torch.randint(0, 255, x.shape, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, weight.shape, dtype=torch.int8), list(x.shape))
    scales, zeros = torch.full((weight.shape[0],), 0.01), torch.zeros(weight.shape[0], dtype=torch.int64)
    scale, zero_point = torch.tensor(0.02), torch.tensor(128)
    return {
        "oneDNN": lambda: torch.ops.onednn.qlinear_pointwise(
            a, scale, zero_point, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    }


class Cuda:
    """The current CUDA device. Everything runs on one side stream, which graphs capture too."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)
        self.stream = torch.cuda.Stream(self.device)
        with self.active():
            size = max(2 * self.properties.L2_cache_size, FLUSH)
            self._flushed = torch.zeros(size // 4, dtype=torch.int32, device=self.device)
            self._largest = torch.zeros((), dtype=torch.int32, device=self.device)

    def active(self) -> AbstractContextManager[Any]:
        """The stream: autograd runs a backward pass on the stream of its forward, and the capture must see both."""
        return torch.cuda.stream(self.stream)

    def interleaved(self, runs: Mapping[str, Sequence[Call]], seconds: float, graph: bool = True) -> Timing:
        """Times of the calls of each variant in turn with a cold L2, interleaved for about `seconds`."""
        for calls in runs.values():
            for call in (*calls, *calls):
                call()
        runs, refused = self._captured(runs) if graph else (runs, {})
        first = self._rounds(runs, 2)
        one = sum(map(min, first.values())) + 1e-4 * len(runs)  # 1e-4: about a flush
        times = {name: summary(samples) for name, samples in self._rounds(runs, rounds_in(seconds, one)).items()}
        kept = {}
        for name, calls in runs.items():  # the results of graphs share memory, so each is copied at once
            kept[name] = Kept(0, _copied(calls[0]()))
            torch.cuda.synchronize()
        return Timing(times, "graph" if graph else "calls", refused, kept)

    def _captured(self, runs: Mapping[str, Sequence[Call]]) -> tuple[dict[str, list[Call]], dict[str, str]]:
        """Graphs of one call each, and the reasons why other variants can't be captured."""
        pool = torch.cuda.graph_pool_handle()
        graphs: dict[str, list[Call]] = {}
        refused: dict[str, str] = {}
        for name, calls in runs.items():
            try:
                graphs[name] = [self._captured_call(call, pool) for call in calls]
            except RuntimeError as error:
                torch.cuda.synchronize()
                refused[name] = f"cannot be captured in a CUDA graph: {reason(error)}"
        return graphs, refused

    def _captured_call(self, call: Call, pool: Any) -> Call:
        """A call that replays the graph of `call` and returns its result."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=self.stream):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def cache_bytes(self) -> int:
        """None that matters: L2 is flushed before each call."""
        return 0

    def clock(self) -> dict[str, float]:
        """The clocks of the multiprocessors and of the memory now, in MHz; nothing where nvidia-smi doesn't say."""
        query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader,nounits"]
        clocks = re.findall(r"[\d.]+", (_output(query).splitlines() or [""])[0])
        return dict(zip(("sm_mhz", "memory_mhz"), map(float, clocks), strict=False))

    def _rounds(self, runs: Mapping[str, Sequence[Call]], count: int) -> dict[str, list[float]]:
        """Seconds of a call of each variant in each round; the host synchronizes once, at the end."""
        pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        for done in range(count):
            for name, calls in runs.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.amax(self._flushed, 0, out=self._largest)
                start.record()
                calls[done % len(calls)]()
                end.record()
                pairs[name].append((start, end))
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1e3 for start, end in events] for name, events in pairs.items()}

    def with_peak(self, run: Call) -> tuple[Any, float | None]:
        """The result of a call, and the peak megabytes that it allocated."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / MEGABYTE

    def release(self) -> None:
        """Empty the allocator's cache: each case's graphs have a pool of their own."""
        torch.cuda.empty_cache()

    def ceilings(self) -> dict[str, float]:
        """Copy bandwidth of 1 GiB (GB/s, read + written), matrix products (GFLOP/s), and launch overhead (us)."""
        with self.active():
            source = torch.randn(2**28, device=self.device)
            target, one = torch.empty_like(source), torch.zeros(1, device=self.device)
            copy = self.interleaved({"copy": [lambda: target.copy_(source)]}, 0.1).times["copy"].median
            launch = self.interleaved({"one": [lambda: one.add_(1)]}, 0.02).times["one"].median
            ceilings = {"copy_gbytes_per_s": 2 * source.nbytes / copy / 1e9, "launch_us": launch * 1e6}
            for name, dtype, size in (("bf16", torch.bfloat16, 8192), ("fp32", torch.float32, 4096)):
                a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
                product = torch.empty_like(a)
                runs = {"product": [lambda a=a, b=b, out=product: torch.mm(a, b, out=out)]}
                seconds = self.interleaved(runs, 0.2).times["product"].median
                ceilings[f"{name}_gemm_gflops"] = 2 * size**3 / seconds / 1e9
        return ceilings

    def name(self) -> str:
        """The name of the results' folder, e.g. "nvidia-h200"."""
        return slug(self.properties.name)

    def details(self) -> dict[str, Any]:
        """Further fields of the environment."""
        try:
            import triton

            version = triton.__version__
        except ImportError:
            version = "none"
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        major, minor = torch.cuda.get_device_capability(self.device)
        return {
            "device_name": self.properties.name,
            "compute_capability": f"{major}.{minor}",
            "multiprocessors": self.properties.multi_processor_count,
            "l2_mbytes": self.properties.L2_cache_size / MEGABYTE,
            "memory_mbytes": self.properties.total_memory // MEGABYTE,
            "driver": (_output(query) or "unknown").splitlines()[0],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": version,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }


Machine = Cpu | Cuda


def machine_of(device: str | None) -> Machine:
    """The machine of `device`, "cpu" or "cuda"; None is CUDA if there is a device.

    Raises:
        ValueError: `device` is "cuda" and there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device: torch.cuda.is_available() is False; use --device cpu")
    return Cuda() if device == "cuda" else Cpu()


def reason(error: BaseException) -> str:
    """The type of an exception and the first line of its message."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}".rstrip(": ")


class Load:
    """Load by other processes: the load average at the start, and the cores they use from then on."""

    def __init__(self) -> None:
        self.at_start = os.getloadavg()[0]
        self._since = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds: wall clock, CPU time of all processes, CPU time of this process and its children."""
        this_process = sum(os.times()[:4])
        stat = Path("/proc/stat")
        if not stat.exists():
            return time.perf_counter(), this_process, this_process
        ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # minus idle and iowait
        return time.perf_counter(), busy, this_process

    def of_others(self) -> dict[str, Any]:
        """Fields of the environment; if `busy` is True, the figures are unreliable."""
        seconds, all_processes, this_process = (now - then for now, then in zip(self._now(), self._since, strict=True))
        others = max(0.0, all_processes - this_process) / max(seconds, 1e-9)
        return {
            "load_average_at_start": round(self.at_start, 2),
            "cores_busy_with_others": round(others, 2),
            "busy": self.at_start > BUSY * (os.cpu_count() or 1) or others > BUSY_CORES,
        }


LOAD = Load()


def _output(command: list[str]) -> str:
    try:
        root = CHECKOUT if CHECKOUT.exists() else None
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def commit() -> str:
    """The commit of the checkout, with "+changes" if files differ; outside a checkout, BERT_FAST_COMMIT."""
    head = _output(["git", "rev-parse", "--short", "HEAD"]) if (CHECKOUT / "csrc").exists() else ""
    if not head:
        return os.environ.get("BERT_FAST_COMMIT", "unknown")
    return head + ("+changes" if _output(["git", "status", "--porcelain"]) else "")


def environment(machine: Machine) -> dict[str, Any]:
    """Device, versions, commit and load."""
    return {
        "device": machine.name(),
        **machine.details(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bert_fast": bert_fast.__version__,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        **machine.clock(),
        **LOAD.of_others(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
