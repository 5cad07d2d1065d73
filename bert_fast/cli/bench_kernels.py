"""Time the implementations of ops beside their peers, checked against float64 in the same run.

    bert-fast bench kernels attention --device cpu --quick
    bert-fast bench kernels add_layer_norm --kernels my_kernel.py --output mine.json --html mine.html

Every implementation that runs here and every peer that is installed, over the sizes of `kernels/<op>/cases.py`: median,
95 % interval, GB/s, GFLOP/s, share of the ceilings of the same run, error and peak memory. Exit code 1 where one of
ours is wrong or fails.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any, Literal

from bert_fast.cli.standard import as_option


def positional(arguments: list[str]) -> list[str]:
    """Rewrite `bench kernels OP ... --option` as `bench kernels --ops OP ... --option`."""
    return as_option(arguments, "--ops")


def add_arguments(parser: Any) -> None:
    parser.add_argument("--ops", type=list[str] | None, default=None, help="ops to time (or OP ...); all by default")
    parser.add_argument("--impls", type=list[str] | None, default=None, help="implementations beside the peers; all")
    parser.add_argument("--match", type=str, default="", help="only cases whose name this regular expression finds")
    parser.add_argument("--kernels", type=str | None, default=None, help="a Python file that registers kernels")
    parser.add_argument("--warm", type=bool, default=False, help="compile and compare every case, time nothing")
    add_common_arguments(parser)


def add_common_arguments(parser: Any) -> None:
    """The options of `bench kernels` and `bench model`."""
    parser.add_argument("--device", type=Literal["cpu", "cuda"] | None, default=None, help="cuda if there is a device")
    parser.add_argument("--quick", type=bool, default=False, help="fewer cases and less time for each")
    parser.add_argument("--seconds", type=float | None, default=None, help="time for each case; 2 s, on a GPU 0.3")
    parser.add_argument("--budget", type=float | None, default=None, help="seconds after which no case begins")
    parser.add_argument("--output", type=str | None, default=None, help="write this JSON file")
    parser.add_argument("--html", type=str | None, default=None, help="write this HTML page")
    parser.add_argument(
        "--record", type=bool, default=False, help="write a JSON file an op into the folder of --results"
    )
    parser.add_argument(
        "--results", type=str | None, default=None, help="folder with one folder a device; the checkout's by default"
    )


def run(args: Any) -> int:
    from bert_fast.bench import kernels, session
    from bert_fast.kernels._common import third_party
    from bert_fast.kernels._common.dispatch import OPS, known_impls

    if args.kernels:
        third_party.load_file(args.kernels)
    _check("--ops", args.ops, list(OPS))
    _check("--impls", args.impls, known_impls())
    try:
        re.compile(args.match)
    except re.error as problem:
        raise ValueError(f"--match is {args.match!r}; expected a regular expression ({problem})") from None
    machine = session.start(args.device)
    suites = {}
    for op in args.ops or sorted(OPS):
        plans = kernels.plans(op, machine.device, args.quick, args.impls, args.match)
        if plans:
            suites["_".join([op, *(args.impls or [])])] = session.Suite(op, plans, partial(kernels.keep_times, op))
    if not suites:
        raise ValueError(f"no benchmark of {', '.join(args.ops or OPS)} on {machine.device.type} fits {args.match!r}")
    return session.run(suites, machine, args, warm=args.warm)


def _check(option: str, given: list[str] | None, known: Any) -> None:
    unknown = sorted(set(given or ()) - set(known))
    if unknown:
        raise ValueError(f"{option} has {', '.join(unknown)}; expected some of {', '.join(known)}")
