"""`bert-fast verify --record` in parallel: a process for each op, implementation and dtype, each passing op recorded.

    python -m benchmarks.gpu.verify [--ops OP ...] [--impls triton cuda] [--jobs 16] [--limit 60]

Most of the time is spent compiling kernels, and a fault in one kernel ends its process alone. An implementation is
recorded as soon as its last process has ended, so that whatever ends this run loses no earlier record. Exit code 1
where a case failed, a process died or exceeded its limit.
"""

from __future__ import annotations

import argparse
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from bert_fast.cli.verify import line
from bert_fast.kernels._common.dispatch import IMPLS
from bert_fast.verification import Part, Result, parts, record, verify_part


def verified(part: Part, limit: float, folder: Path) -> list[Result]:
    """The results of a part, from a process of its own; one failed result where that died or exceeded `limit` s."""
    dtype = str(part.dtype).removeprefix("torch.")
    file = folder / "-".join([*part[:3], dtype])
    command = [sys.executable, "-m", "benchmarks.gpu.verify", "--part", *part[:3], dtype, str(file)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
        problem = f"exit code {process.returncode}: {(process.stderr.strip().splitlines() or ['no output'])[-1]}"
    except subprocess.TimeoutExpired:
        problem = f"stopped after {limit:.0f} s"
    if file.exists():
        results: list[Result] = pickle.loads(file.read_bytes())  # written by the process that this one started
        return results
    return [Result(*part[:3], dtype, "all", (), problem)]


def all_verified(
    selected: Sequence[Part], jobs: int, limit: float, folder: Path
) -> Iterator[tuple[list[Result], list[Result]]]:
    """Run the parts concurrently; yields the results of each, and with its last part those of the implementation."""
    waiting = {part[:3]: sum(other[:3] == part[:3] for other in selected) for part in selected}
    collected: dict[tuple[str, str, str], list[Result]] = {key: [] for key in waiting}
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(verified, part, limit, folder): part for part in selected}
        for future in as_completed(futures):
            key = futures[future][:3]
            collected[key] += future.result()
            waiting[key] -= 1
            yield future.result(), [] if waiting[key] else collected[key]


def run(selected: Sequence[Part], jobs: int, limit: float) -> int:
    """Verify the parts, print a line for each case, record what passed on a GPU; the exit code."""
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        for new, complete in all_verified(selected, jobs, limit, Path(folder)):
            results += new
            print("\n".join(map(line, new)), flush=True)
            if any(result.device == "cuda" for result in complete):
                print(f"recorded in {record(complete)}", flush=True)
    failed = sum(not result.ok for result in results)
    print(f"{len(results) - failed} of {len(results)} cases ok")
    return 0 if results and not failed else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="verify the kernels of a GPU, concurrently")
    parser.add_argument("--ops", nargs="+", help="all by default")
    parser.add_argument("--impls", nargs="+", choices=IMPLS, default=["triton", "cuda"])
    parser.add_argument("--jobs", type=int, default=min(16, os.cpu_count() or 1), help="processes at a time")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a process")
    parser.add_argument("--part", nargs=5, metavar=("OP", "IMPL", "DEVICE", "DTYPE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        *names, dtype, file = options.part
        results = list(verify_part(Part(*names, getattr(torch, dtype))))
        Path(file).write_bytes(pickle.dumps(results))
        return 0
    return run(parts(options.ops, options.impls), options.jobs, options.limit)


if __name__ == "__main__":
    sys.exit(main())
