"""Verify kernels, a model or an embeddings server against float64; exit code 1 where something is wrong.

Without --model and --endpoint every implementation of every op that runs on this machine is compared with float64 and
eager PyTorch; then come gradients by finite differences, dropout statistics, extremes, leaks, and the heads of a small
model (docs/verify.md). With --model the encoder of a folder is checked, with --endpoint an embeddings server: padding,
packing, positions, the composition and order of batches, truncation, empty texts and dtypes, against the weights in
float64. With --golden the results of every op and head and a training curve are compared with those that were recorded.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any, Literal


def add_arguments(parser: Any) -> None:
    parser.add_argument("--ops", type=list[str] | None, default=None, help="ops to test; all by default")
    parser.add_argument("--impls", type=list[str] | None, default=None, help="implementations to test; all by default")
    parser.add_argument(
        "--kernels", type=str | None, default=None, help="a Python file that registers kernels, to test beside ours"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random inputs")
    parser.add_argument(
        "--record",
        type=bool,
        default=False,
        help="record the GPU kernels that pass, so that impl='auto' may choose them",
    )
    parser.add_argument(
        "--golden", type=bool, default=False, help="compare ops, heads and a training curve with recorded results"
    )
    parser.add_argument(
        "--update_golden", type=bool, default=False, help="record them anew, in a checkout, and say what moved"
    )
    parser.add_argument("--model", type=str | None, default=None, help="folder of a model, or a hub name, to check")
    parser.add_argument(
        "--endpoint", type=str | None, default=None, help="URL of an embeddings server to check (needs --against)"
    )
    parser.add_argument(
        "--against",
        type=str | None,
        default=None,
        help="folder of the right weights, or transformers; by default the model's own, in float64",
    )
    parser.add_argument(
        "--library",
        type=Literal["auto", "bert_fast", "fused", "transformers", "sentence-transformers"],
        default="auto",
        help="what runs the model",
    )
    parser.add_argument(
        "--dtypes",
        type=list[Literal["float32", "bfloat16", "float16"]] | None,
        default=None,
        help="dtypes of the model, or the one of the server; float32 by default",
    )
    parser.add_argument("--pooling", type=str | None, default=None, help="pooling of the reference; the folder's own")
    parser.add_argument("--normalize", type=bool | None, default=None, help="normalize the reference; the folder's own")
    parser.add_argument(
        "--max_seqlen", type=int | None, default=None, help="maximum length of the reference; the folder's own"
    )
    parser.add_argument(
        "--tolerance",
        type=float | None,
        default=None,
        help="largest distance from float64, relative; by default three times that of eager PyTorch",
    )
    parser.add_argument(
        "--dialect", type=Literal["auto", "openai", "tei"], default="auto", help="the server's interface"
    )
    parser.add_argument("--served_model", type=str, default="", help="the model's name in requests to the server")
    parser.add_argument("--device", type=str, default="cpu", help="the model's device")


def run(args: Any) -> int:
    if args.golden or args.update_golden:
        return _golden(args)
    if args.model is None and args.endpoint is None:
        return _verify_kernels(args)
    from bert_fast.cli.verify_model import verify_model

    return verify_model(args)


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


def _golden(args: Any) -> int:
    """Compare with the recorded results, or record them; 1 where one moved beyond its tolerance."""
    from bert_fast import golden

    if args.golden and args.update_golden:
        raise ValueError("--golden and --update-golden were both given; expected one of them")
    for name in ("model", "endpoint", "ops", "impls", "kernels"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} was given with --golden or --update-golden, which take every op and head")
    if args.update_golden and not golden.is_checkout():
        raise ValueError(f"--update-golden writes {golden.FILE}, which is no checkout; expected one")
    rows = golden.update() if args.update_golden else golden.check()
    moved = [row for row in rows if row.distance or row.note]
    failed = [row for row in rows if not row.ok]
    print("distance: largest difference of an element from the recorded one; only what moved is listed\n")
    for row in sorted(moved, key=lambda row: row.ok):
        state = row.note or ("ok" if row.ok else "MOVED")
        print(f"{row.name:<64} {row.distance:9.2e} {row.tolerance:9.2e}  {state}")
    if args.update_golden:
        print(f"\n{len(moved)} results moved, {len(failed)} of them beyond their tolerance; recorded in {golden.FILE}")
        return 0
    about = " and ".join(f"{name} {value}" for name, value in golden.read()[2].items())
    print(f"\n{len(rows) - len(failed)} of {len(rows)} results are within their tolerance (recorded with {about})")
    if failed:
        print(f"bert-fast verify: {len(failed)} results moved beyond their tolerance", file=sys.stderr)
    return 1 if failed else 0


def _verify_kernels(args: Any) -> int:
    from bert_fast.kernels._common.third_party import load_file
    from bert_fast.verification import record, verify

    for name in ("against", "pooling", "tolerance", "max_seqlen", "normalize", "dtypes"):
        if getattr(args, name) is not None:
            raise ValueError(f"--{name} was given without --model or --endpoint, which it is for")
    if args.kernels is not None:
        load_file(args.kernels)
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
    failed_checks = _further_checks(args)
    if args.record:
        print(f"recorded in {record(results)}")
    if failed:
        print(f"bert-fast verify: {failed} cases failed", file=sys.stderr)
    if failed_checks:
        print(f"bert-fast verify: {failed_checks} further checks failed", file=sys.stderr)
    return 1 if failed or failed_checks else 0


def _further_checks(args: Any) -> int:
    """Print a line a check of verification_kernels.py and, for every op, verification_models.py; how many failed."""
    from bert_fast.verification import parts
    from bert_fast.verification_kernels import check_kernels
    from bert_fast.verification_models import check_models

    tested = parts(args.ops, args.impls)
    checks = itertools.chain(
        check_kernels(tested, args.seed), check_models(args.impls, args.seed) if args.ops is None else ()
    )
    print(
        "\nvalue: standard deviations (dropout), relative error (gradients), absolute error (extremes, model), bytes\n"
    )
    count = failed = 0
    for check in checks:
        count += 1
        failed += not check.ok
        numbers = check.error or f"{check.name:<40} {check.value:9.2e} {check.bound:9.2e}"
        print(f"{check.kind:<10} {check.subject:<42} {numbers}  {'ok' if check.ok else 'FAILED'}", flush=True)
    print(f"\n{count - failed} of {count} further checks ok (races: python -m benchmarks.gpu.sanitize)")
    return failed
