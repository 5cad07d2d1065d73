"""The implementations of an op and its peers, as `kernels/<op>/cases.py` describes them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.bench.runner import OURS, Case, Variant, passes
from bert_fast.kernels._common import cases, records
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
        run, read = passes(peer.call, inputs, dout, which)
        return Variant(run, peer.result, peer.comparable, peer.precision, inputs=read, saves_inputs=which == "backward")

    variants = {name: variant(peer) for name, peer in benchmark.peers.items()}
    for impl in implementations(op, device, benchmark.dtype, impls):
        for suffix, inputs in {"": benchmark.inputs, **benchmark.also}.items():
            call = partial(benchmark.call, impl=impl)
            ours = Peer(call, inputs, result=benchmark.result, precision=benchmark.precision)
            variants[f"{OURS} {impl}{suffix}"] = variant(ours)

    def exact() -> Tensor:
        if benchmark.exact is not None:
            return benchmark.exact()
        inputs = [x.double() if x.is_floating_point() else x for x in benchmark.inputs]
        dout = None if benchmark.dout is None else benchmark.dout.double()
        return benchmark.result(passes(partial(benchmark.call, impl="reference"), inputs, dout, which).run())

    return Case(
        variants,
        functools.cache(exact),
        benchmark.tolerance,
        benchmark.traffic,
        benchmark.flops,
        benchmark.dtype,
        benchmark.graph,
        call=None if benchmark.size is None else Time(dtype_name(benchmark.dtype), which, benchmark.size, 0.0).call(),
        length=benchmark.length or next((len(x) for x in benchmark.inputs), 0),
    )


def plans(
    op: str, device: torch.device, quick: bool, impls: Sequence[str] | None = None, match: str = ""
) -> list[Plan]:
    """The op's benchmarks there whose names `match`, a regular expression, finds, as cases of the runner."""

    def case(make: Callable[[], Benchmark]) -> Case:
        benchmark = make()
        again = (lambda: case_of(op, device, make(), impls)) if benchmark.inputs else None  # else it changes a state
        return replace(case_of(op, device, benchmark, impls), again=again)

    return [
        Plan(name, partial(case, make))
        for name, make in cases.load(op).benchmarks(device, quick)
        if re.search(match, name)
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


def keep_times(op: str, report: Mapping[str, Any]) -> None:
    """`record_times` of a report of the CUDA device; nothing on a CPU."""
    if "compute_capability" in report["environment"]:
        record_times(op, report["environment"]["device_name"], report)
