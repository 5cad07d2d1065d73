"""Time the implementations of an op and its peers, as `kernels/<op>/cases.py` describes them.

python -m benchmarks.ops <op> [--device cpu|cuda] [--quick] [--record] [--budget SECONDS] [--results FOLDER]
python -m benchmarks.ops <op> --impls cuda      only this implementation and the peers; the report is <op>_cuda.json
python -m benchmarks.ops <op> --kernels FILE.py  kernels that the file registers, beside ours
python -m benchmarks.ops <op> --warm     compile and compare every case, time nothing
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.runner.runner import OURS, Case, Variant, arguments, main, parse, passes
from bert_fast.kernels import available_impls
from bert_fast.kernels._common import cases, records, third_party
from bert_fast.kernels._common.benchmarks import Benchmark, Peer, Plan, dtype_name
from bert_fast.kernels._common.dispatch import OPS, known_impls
from bert_fast.kernels._common.library import simulated
from bert_fast.kernels._common.times import Time, from_entry


def implementations(op: str, device: torch.device, dtype: torch.dtype, impls: Sequence[str] | None = None) -> list[str]:
    """Those of `impls`, None for all, that run there; not the reference, which is what the peers are."""
    return [
        impl
        for impl, slot in OPS[op].impls.items()
        if impl in (known_impls() if impls is None else impls)
        and impl != "reference"
        and slot.availability.ok
        and slot.device in (None, device.type)
        and (slot.dtypes is None or dtype in slot.dtypes)
        and not simulated(impl)
    ]


def case_of(op: str, device: torch.device, benchmark: Benchmark, impls: Sequence[str] | None = None) -> Case:
    """The peers, then ours, and the exact result."""
    which = benchmark.which

    def variant(peer: Peer) -> Variant:
        inputs = benchmark.inputs if peer.inputs is None else peer.inputs
        dout = benchmark.dout if peer.dout is None else peer.dout
        return Variant(passes(peer.call, inputs, dout, which), peer.result, peer.comparable)

    variants = {name: variant(peer) for name, peer in benchmark.peers.items()}
    for impl in implementations(op, device, benchmark.dtype, impls):
        for suffix, inputs in {"": benchmark.inputs, **benchmark.also}.items():
            ours = Peer(partial(benchmark.call, impl=impl), inputs, result=benchmark.result)
            variants[f"{OURS} {impl}{suffix}"] = variant(ours)
    exact = benchmark.exact
    if exact is None:
        inputs = [x.double() if x.is_floating_point() else x for x in benchmark.inputs]
        dout = None if benchmark.dout is None else benchmark.dout.double()
        exact = benchmark.result(passes(partial(benchmark.call, impl="reference"), inputs, dout, which)())
    return Case(
        variants,
        exact,
        benchmark.tolerance,
        benchmark.traffic,
        benchmark.flops,
        benchmark.dtype,
        benchmark.graph,
        call=None if benchmark.size is None else Time(dtype_name(benchmark.dtype), which, benchmark.size, 0.0).call(),
    )


def plans(op: str, device: torch.device, quick: bool, impls: Sequence[str] | None = None) -> list[Plan]:
    """The op's benchmarks there, as cases of the runner."""
    return [
        Plan(name, lambda make=make: case_of(op, device, make(), impls))  # type: ignore[misc]
        for name, make in cases.load(op).benchmarks(device, quick)
    ]


def record_times(op: str, device: str, report: Mapping[str, Any]) -> dict[str, Path | None]:
    """Add the times of our GPU implementations in a report to the record of `device`, for `impl="auto"`.

    Returns:
        The file by implementation; None where the record verifies other sources than these, or none.
    """
    times: dict[str, list[Time]] = {}
    for row in report["rows"]:
        impl = row["variant"].removeprefix(f"{OURS} ")
        if row["call"] and row["ms"] and impl in records.RECORDED:
            times.setdefault(impl, []).append(from_entry({**row["call"], "ms": row["ms"]}))
    return {impl: records.write_times(device, op, impl, measured) for impl, measured in times.items()}


if __name__ == "__main__":
    parser = arguments("implementations of an op compared with its peers")
    parser.prog = "python -m benchmarks.ops"
    parser.add_argument("op", choices=list(available_impls()))
    parser.add_argument("--impls", nargs="+", help="implementations to time beside the peers; all by default")
    parser.add_argument("--kernels", metavar="FILE", help="a Python file that registers kernels")
    options, machine = parse(parser)
    if options.kernels:
        third_party.load_file(options.kernels)
    if unknown := sorted(set(options.impls or []) - set(known_impls())):
        parser.error(f"--impls has {', '.join(unknown)}; expected some of {', '.join(known_impls())}")
    name = "_".join([options.op, *(options.impls or [])])
    selected = plans(options.op, machine.device, options.quick, options.impls)
    on_gpu = machine.device.type == "cuda"
    keep = partial(record_times, options.op, torch.cuda.get_device_name()) if on_gpu else lambda report: {}
    sys.exit(main(name, selected, options, machine, keep))
