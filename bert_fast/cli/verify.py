"""Compare every implementation that runs on this machine with float64 and eager PyTorch; exit code 1 on failure."""

from __future__ import annotations

import sys
from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument("--ops", type=list[str] | None, default=None, help="ops to test; all by default")
    parser.add_argument("--impls", type=list[str] | None, default=None, help="implementations to test; all by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    parser.add_argument(
        "--record",
        type=bool,
        default=False,
        help="record the GPU kernels that pass, so that impl='auto' may choose them",
    )


def _row(op: str, impl: str, device: str, dtype: str, case: str, rest: str) -> str:
    return f"{op:<21} {impl:<10} {device:<6} {dtype:<9} {case:<12} {rest}"


def line(result: Any) -> str:
    """A `bert_fast.verification.Result` as a line of the table."""
    worst = result.worst
    numbers = f"{worst.name:<16} {worst.ours:9.2e} {worst.bound:9.2e}" if worst else result.error
    row = _row(result.op, result.impl, result.device, result.dtype, result.case, numbers)
    return f"{row}  {'ok' if result.ok else 'FAILED'}"


def _print_header() -> None:
    print("error: maximum absolute difference from the reference in float64, over outputs and gradients")
    print("bound: twice the error of eager PyTorch in the same dtype, plus one ulp of the largest value\n")
    header = _row("operation", "impl", "device", "dtype", "case", f"{'worst at':<16} {'error':>9} {'bound':>9}")
    print(header)
    print("-" * (len(header) + 8))


def run(args: Any) -> int:
    from bert_fast.verification import record, verify

    results: list[Any] = []
    for result in verify(args.ops, args.impls, args.seed):
        if not results:
            _print_header()
        results.append(result)
        print(line(result), flush=True)
    if not results:
        raise ValueError("nothing to test: none of the requested implementations can run here; see bert-fast info")
    failed = sum(not result.ok for result in results)
    print(f"\n{len(results) - failed} of {len(results)} cases ok")
    if args.record:
        print(f"recorded in {record(results)}")
    if failed:
        print(f"bert-fast verify: {failed} cases failed", file=sys.stderr)
    return 1 if failed else 0
