"""Where a benchmark runs: how calls are timed there, what the device reaches, and what its numbers depend on.

On a CPU a call is timed by the host's clock. On a GPU by a pair of CUDA events on one stream:

- before each call, outside of the pair, a buffer of at least twice the L2 cache is written, so that the call finds
  its inputs in memory; while that write runs, the host has the time to queue the call.
- the call is the replay of a CUDA graph that holds one call, so neither Python nor the launch of each kernel is in the
  number. What is left of a launch, the median of an empty graph, is in the ceilings as `launch_us` and not subtracted.
- where one variant of a case can't be captured (it waits for the device), every variant of that case is timed by plain
  calls instead; the rows say which ("graph" or "calls").
"""

from __future__ import annotations

import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import torch

import bert_fast

Call = Callable[[], Any]
MEGABYTE = 1 << 20
SHORT = 0.2  # seconds of a call on a processor that follows an untimed one
FLUSH = 256 * MEGABYTE  # at the least: 60 us and more of writing, in which the host queues what is timed


class Timing(NamedTuple):
    """Median seconds of each call, and how they were timed."""

    seconds: dict[str, float]
    method: str


def timed(run: Call) -> float:
    """Seconds of one call by the host's clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds_in(seconds: float, one: float) -> int:
    """How many rounds of `one` second to take: 5 to 200."""
    return min(200, max(5, int(seconds / max(one, 1e-9))))


def slug(text: str) -> str:
    """`text` as the name of a folder."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", text.lower())).strip("-")


class Cpu:
    """The processor, with the threads that torch uses.

    Args:
        pause: seconds to wait before a timed call, for runs with other runtimes: their threads spin for a while after a
            call, and a call of the next that starts meanwhile has to share the cores with them (ONNX Runtime's for some
            20 ms, in which MKL was measured at half its speed).
    """

    def __init__(self, pause: float = 0.0) -> None:
        self.device = torch.device("cpu")
        self.pause = pause

    def active(self) -> AbstractContextManager[Any]:
        """What has to surround the whole run."""
        return nullcontext()

    def interleaved(self, runs: Mapping[str, Call], seconds: float, graph: bool = True) -> Timing:
        """Median seconds of each call, the calls in turns for about `seconds`, in another order each round.

        A call of less than `SHORT` follows an untimed one, so that what ran before has left no trace in its caches. A
        call that takes the whole time for itself is left out of the later rounds, after three; one that does so at
        once, after the first.
        """
        times = {name: [timed(run)] for name, run in runs.items()}
        one = sum(self.pause + found[0] * (2 if found[0] < SHORT else 1) for found in times.values())
        order, shuffle = list(runs), random.Random(0).shuffle
        for done in range(rounds_in(seconds, one)):
            shuffle(order)
            for name in order:
                if done < (3 if times[name][0] <= seconds else 1) or sum(times[name]) <= seconds:
                    time.sleep(self.pause)
                    if times[name][0] < SHORT:
                        runs[name]()
                    times[name].append(timed(runs[name]))
        return Timing({name: statistics.median(found[1:]) for name, found in times.items()}, "calls")

    def with_peak(self, run: Call) -> tuple[Any, float | None]:
        """The result of a call, and the most megabytes that it held; None here, where nothing counts them."""
        return run(), None

    def release(self) -> None:
        """Give back what is cached."""

    def ceilings(self) -> dict[str, float]:
        """What this machine reaches now: copy bandwidth (GB/s, read + written) and float32 matrix products."""
        source, target = torch.randn(2**25), torch.empty(2**25)
        copy = statistics.median(timed(lambda: target.copy_(source)) for _ in range(9))
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        for _ in range(50):  # threads started, clock up
            a @ b
        product = statistics.median(timed(lambda: a @ b) for _ in range(15))
        return {
            "copy_gbytes_per_s": 2 * source.nbytes / copy / 1e9,
            **gemm_ceilings({"fp32": 2 * 1024**3 / product / 1e9}),
        }

    def name(self) -> str:
        """The results' folder, e.g. "cpu-amd-epyc-2-threads-avx2"."""
        model = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists() and (found := re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text())):
            model = found[1]
        return slug(f"cpu {model} {torch.get_num_threads()} threads {torch.backends.cpu.get_cpu_capability()}")

    def details(self) -> dict[str, Any]:
        """What else the numbers depend on here."""
        return {}


def gemm_ceilings(known: Mapping[str, float], M: int = 1024, K: int = 768, N: int = 3072) -> dict[str, float]:
    """GFLOP/s of the fastest product that torch carries on this processor for each precision, (M, K) by (K, N).

    float32 by MKL and by oneDNN with packed weights, bfloat16 likewise, unsigned by signed int8 by oneDNN. What a
    higher precision reaches is open to a lower one too, so a ceiling is never below that of a higher precision.
    """
    x, weight = torch.randn(M, K), torch.randn(N, K) / K
    runs: dict[str, dict[str, Call]] = {name: linear_calls(x.to(dtype), weight.to(dtype)) for name, dtype in _FLOATS}
    runs["int8"] = int8_call(x, weight)
    best, found = max(known.values()), {}
    for name in ("fp32", "bf16", "int8"):
        for run in runs[name].values():
            first = timed(run)
            times = [timed(run) for _ in range(3 if first > 0.1 else 15)]
            best = max(best, 2 * M * K * N / statistics.median(times) / 1e9)
        found[f"{name}_gemm_gflops"] = best
    return found


_FLOATS = (("fp32", torch.float32), ("bf16", torch.bfloat16))


def linear_calls(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Call]:
    """x @ weight.T by torch's linear layer, and by oneDNN with packed weights where this torch has it."""
    calls: dict[str, Call] = {"linear": lambda: torch.nn.functional.linear(x, weight)}
    ops = torch.ops.mkldnn
    if torch.backends.mkldnn.is_available() and (x.dtype is torch.float32 or ops._is_mkldnn_bf16_supported()):
        packed = ops._reorder_linear_weight(weight, x.shape[0])
        calls["oneDNN"] = lambda: ops._linear_pointwise(x, packed, None, "none", [], "")
    return calls


def int8_call(x: torch.Tensor, weight: torch.Tensor) -> dict[str, Call]:
    """The product in integers, with float32 results; empty where this torch has no oneDNN."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qlinear_prepack")):
        return {}
    a = torch.randint(0, 255, x.shape, dtype=torch.uint8)
    packed = torch.ops.onednn.qlinear_prepack(torch.randint(-127, 127, weight.shape, dtype=torch.int8), list(x.shape))
    scales, zeros = torch.full((weight.shape[0],), 0.01), torch.zeros(weight.shape[0], dtype=torch.int64)
    one, middle = torch.tensor(0.02), torch.tensor(128)
    return {
        "oneDNN": lambda: torch.ops.onednn.qlinear_pointwise(
            a, one, middle, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    }


class Cuda:
    """The current CUDA device. Everything runs on one stream of its own, which is also the one that graphs capture."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)
        self.stream = torch.cuda.Stream(self.device)
        with self.active():
            size = max(2 * self.properties.L2_cache_size, FLUSH)
            self._flushed = torch.empty(size, dtype=torch.uint8, device=self.device)

    def active(self) -> AbstractContextManager[Any]:
        """The stream: autograd runs a backward pass on the stream of its forward, and capture must see both."""
        return torch.cuda.stream(self.stream)

    def interleaved(self, runs: Mapping[str, Call], seconds: float, graph: bool = True) -> Timing:
        """Median seconds of each call from a cold L2, the calls in turns for about `seconds`."""
        for run in runs.values():
            for _ in range(2):
                run()
        calls, method = self._captured(runs) if graph else (dict(runs), "calls")
        first = self._rounds(calls, 2)
        one = sum(min(found) for found in first.values()) + 1e-4 * len(calls)  # 1e-4: about a flush
        times = self._rounds(calls, rounds_in(seconds, one))
        return Timing({name: statistics.median(found) for name, found in times.items()}, method)

    def _captured(self, runs: Mapping[str, Call]) -> tuple[dict[str, Call], str]:
        """Graphs of one call each, or the calls themselves where one can't be captured."""
        pool = torch.cuda.graph_pool_handle()
        graphs: dict[str, Call] = {}
        for name, run in runs.items():
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                    run()
            except RuntimeError as error:
                torch.cuda.synchronize()
                return dict(runs), f"calls: {name} can't be captured ({reason(error)})"
            graphs[name] = graph.replay
        return graphs, "graph"

    def _rounds(self, calls: Mapping[str, Call], count: int) -> dict[str, list[float]]:
        """Seconds of each call in each round; the host waits once, at the end."""
        pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in calls}
        for _ in range(count):
            for name, call in calls.items():
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self._flushed.fill_(1)
                start.record()
                call()
                end.record()
                pairs[name].append((start, end))
        torch.cuda.synchronize()
        return {name: [start.elapsed_time(end) / 1e3 for start, end in found] for name, found in pairs.items()}

    def with_peak(self, run: Call) -> tuple[Any, float | None]:
        """The result of a call, and the megabytes that it held at its peak beyond what was there before."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / MEGABYTE

    def release(self) -> None:
        """Give back what the allocator caches: the graphs of a case have a pool of their own."""
        torch.cuda.empty_cache()

    def ceilings(self) -> dict[str, float]:
        """Copy bandwidth of 1 GiB (GB/s, read + written), matrix products on random data, and the launch of nothing."""
        with self.active():
            source = torch.randn(2**28, device=self.device)
            target, one = torch.empty_like(source), torch.zeros(1, device=self.device)
            copy = self.interleaved({"copy": lambda: target.copy_(source)}, 0.1).seconds["copy"]
            launch = self.interleaved({"one": lambda: one.add_(1)}, 0.02).seconds["one"]
            found = {"copy_gbytes_per_s": 2 * source.nbytes / copy / 1e9, "launch_us": launch * 1e6}
            for name, dtype, size in (("bf16", torch.bfloat16, 8192), ("fp32", torch.float32, 4096)):
                a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
                product = torch.empty_like(a)
                seconds = self.interleaved(
                    {"product": lambda a=a, b=b, out=product: torch.mm(a, b, out=out)},  # type: ignore[misc]
                    0.2,
                ).seconds["product"]
                found[f"{name}_gemm_gflops"] = 2 * size**3 / seconds / 1e9
        return found

    def name(self) -> str:
        """The results' folder, e.g. "nvidia-h200"."""
        return slug(self.properties.name)

    def details(self) -> dict[str, Any]:
        """What else the numbers depend on here."""
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
            "driver": _output(query).splitlines()[0] if _output(query) else "unknown",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "triton": version,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        }


Machine = Cpu | Cuda


def machine_of(device: str | None) -> Machine:
    """The machine for `device` "cpu" or "cuda"; None for CUDA where there is a device.

    Raises ValueError where "cuda" is asked for and there is none.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA device: torch.cuda.is_available() is False; --device cpu runs on the processor")
    return Cuda() if device == "cuda" else Cpu()


def reason(error: BaseException) -> str:
    """The kind of an exception and the first line of its message, for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}".rstrip(": ")


class Load:
    """How busy others keep the machine: the load average at the start, and the cores they take from then on."""

    def __init__(self) -> None:
        self.at_start = os.getloadavg()[0]
        self._since = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        """Seconds by the clock, of all processors busy, and of this process and its children."""
        own = sum(os.times()[:4])
        stat = Path("/proc/stat")
        if not stat.exists():
            return time.perf_counter(), own, own
        ticks = [int(field) for field in stat.read_text().split("\n", 1)[0].split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")  # idle and waiting for disks
        return time.perf_counter(), busy, own

    def of_others(self) -> dict[str, Any]:
        """Lines of the environment; `busy` where the figures are not worth much."""
        seconds, busy, own = (now - then for now, then in zip(self._now(), self._since, strict=True))
        others = max(0.0, busy - own) / max(seconds, 1e-9)
        return {
            "load_average_at_start": round(self.at_start, 2),
            "cores_busy_with_others": round(others, 2),
            "busy": self.at_start > BUSY * (os.cpu_count() or 1) or others > BUSY_CORES,
        }


BUSY, BUSY_CORES = 0.6, 0.2  # load average a core; cores
LOAD = Load()


def _output(command: list[str]) -> str:
    try:
        root = Path(__file__).parents[2]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def commit() -> str:
    """The commit of the sources, with "+changes" where files differ; BERT_FAST_COMMIT where they are no checkout."""
    head = _output(["git", "rev-parse", "--short", "HEAD"])
    if not head:
        return os.environ.get("BERT_FAST_COMMIT", "unknown")
    return head + ("+changes" if _output(["git", "status", "--porcelain"]) else "")


def environment(machine: Machine) -> dict[str, Any]:
    """What the numbers depend on."""
    return {
        "device": machine.name(),
        **machine.details(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bert_fast": bert_fast.__version__,
        "commit": commit(),
        "threads": torch.get_num_threads(),
        **LOAD.of_others(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }
