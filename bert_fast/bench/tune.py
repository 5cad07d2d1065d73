"""`bert-fast tune`: the times by which `impl="auto"` chooses on this device (`kernels/_common/tuned.py`).

A registered kernel is measured only if it passes the oracle, in all of the run's dtypes that it takes; a kernel that
the benchmark refuses at one size is not chosen at any. What this run refuses is removed from an older table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from bert_fast._io import write_json
from bert_fast._lock import exclusive
from bert_fast.bench.devices import Machine
from bert_fast.bench.kernels import case_of
from bert_fast.bench.model import shape_of
from bert_fast.bench.names import OURS
from bert_fast.bench.runner import Case, Row, measure
from bert_fast.kernels._common import cases, dispatch, tuned
from bert_fast.kernels._common.benchmarks import Benchmark, ModelCall, Peer, dtype_name, evenly_spaced
from bert_fast.kernels._common.cases import DROPOUT
from bert_fast.kernels._common.dispatch import IMPLS, OPS, known_impls
from bert_fast.kernels._common.times import Time, from_entry, merge
from bert_fast.models.config import SIZES, BertConfig
from bert_fast.testing import find_mismatches

SHAPES = ("1x32", "8x128", "16x512")
PASSES = (("forward", 0.0), ("forward + backward", DROPOUT))  # inference, training


@dataclass(frozen=True)
class Request:
    """What a run measures.

    Args:
        config: of the model.
        shapes: batches, as `bert_fast.bench.model.shape_of` reads them.
        dtypes: that the model computes in.
        training: whether to time the backward pass too.
        seconds: the time for each case.
        ops: their names; None for all that give their size to the choice.
    """

    config: BertConfig
    shapes: Sequence[str]
    dtypes: Sequence[torch.dtype]
    training: bool
    seconds: float
    ops: Sequence[str] | None = None

    def calls(self, dtype: torch.dtype) -> dict[str, ModelCall]:
        """By name: every batch in each pass."""
        config, calls = self.config, {}
        for shape in self.shapes:
            count, length, filling = shape_of(shape)
            lengths = evenly_spaced(count, 4 if filling else length, length)
            for which, dropout_p in PASSES[: 1 + self.training]:
                calls[f"{shape} {dtype_name(dtype)} {which}"] = ModelCall(
                    config.hidden_size,
                    config.intermediate_size,
                    config.num_attention_heads,
                    lengths,
                    dtype,
                    which,
                    dropout_p,
                )
        return calls


def config_of(model: str) -> BertConfig:
    """The configuration of a folder, a hub name or a size name such as "base"."""
    return BertConfig.size(model) if model in SIZES and not Path(model).is_dir() else BertConfig.from_pretrained(model)


def tunable() -> list[str]:
    """The ops that give the size of a call to the choice."""
    return [op for op in sorted(OPS) if cases.load(op).in_model is not None]


def tune(request: Request, machine: Machine) -> Path | None:
    """Verify, measure and write the table of the device; returns its file, None where no op has two candidates.

    Raises:
        OutputBusyError: another process measures for this device.
        OSError: the file can't be written.
    """
    device = machine.device.type
    label = tuned.device_label(device)
    path = tuned.path_of(label)
    known_impls()  # those of installed packages too
    with exclusive(path, what="bert-fast tune"), machine.active():
        found = {op: _of_op(op, request, machine) for op in request.ops or tunable()}
        if not any(entry for impls in found.values() for entry in impls.values()) and not path.exists():
            return None
        old = tuned.read(device).ops
        about = {"threads": torch.get_num_threads(), "bert_fast": _version()}
        write_json(path, tuned.as_json(label, {**old, **_merged(old, found)}, about))
    dispatch.forget_times(table=True)
    return path


def reset(device: str) -> Path | None:
    """Delete the table of a device type; returns its file, None where there was none."""
    path = tuned.path_of(tuned.device_label(device))
    if not path.exists():
        return None
    with exclusive(path, what="bert-fast tune"):
        path.unlink(missing_ok=True)
    dispatch.forget_times(table=True)
    return path


def _version() -> str:
    import bert_fast

    return bert_fast.__version__


Found = dict[str, tuned.Entry | None]  # by implementation; None for what was refused


def _of_op(op: str, request: Request, machine: Machine) -> Found:
    """What this run found of an op; nothing where there is nothing to choose."""
    found: Found = {}
    for dtype in request.dtypes:
        candidates = _candidates(op, machine, dtype, found)
        if len(candidates) < 2:
            continue
        limits = machine.ceilings()
        for name, call in request.calls(dtype).items():
            of_call = cases.load(op).in_model
            assert of_call is not None
            for part, make in of_call(machine.device, call).items():
                case = _case(op, machine.device, make, candidates)
                rows = measure(f"{op} {part} {name}", case, machine, limits, request.seconds)
                _add(op, rows, candidates, dtype, found)
                machine.release()
    return found


def _candidates(op: str, machine: Machine, dtype: torch.dtype, found: Found) -> list[str]:
    """What `auto` may take there: by the rules, else the reference; and the registered kernels that are right."""
    device, slots = machine.device, OPS[op].impls
    ruled = [
        rule.impl
        for rule in OPS[op].auto_rules
        if rule.device == device.type and dtype in rule.dtypes and OPS[op]._verified_on(rule.impl, device)
    ] or ["reference"]
    right = []
    for impl in [impl for impl in slots if impl not in IMPLS]:
        slot = slots[impl]
        if slot.registered is None or slot.device not in (None, device.type):
            continue
        if slot.dtypes is not None and dtype not in slot.dtypes:
            continue
        if why := _mismatch(op, impl, device.type, dtype):
            print(f"{op} {impl}: not measured, {why}", flush=True)
            found[impl] = None
        elif found.get(impl, ()) is not None:
            right.append(impl)
    return [*dict.fromkeys(ruled), *right]


def _mismatch(op: str, impl: str, device: str, dtype: torch.dtype) -> str:
    """Why a registered kernel may not be chosen, or ""."""
    slot = OPS[op].impls[impl]
    if not slot.source():
        return "it has no source by which another version could be told from it"
    assert slot.registered is not None
    fn, backward = slot.registered
    findings = find_mismatches(fn, op, device=device, dtypes=(dtype,), backward=backward)
    return f"the oracle found {len(findings)} mismatches, first {findings[0]}" if findings else ""


def _case(op: str, device: torch.device, make: object, candidates: Sequence[str]) -> Case:
    """The candidates, without peers."""

    def one() -> Case:
        benchmark: Benchmark = make()  # type: ignore[operator]
        peers = {}
        if "reference" in candidates:
            peers["reference"] = Peer(partial(benchmark.call, impl="reference"), result=benchmark.result)
        return case_of(
            op, device, replace(benchmark, peers=peers, also={}), [c for c in candidates if c != "reference"]
        )

    return replace(one(), again=one)


def _add(op: str, rows: Sequence[Row], candidates: Sequence[str], dtype: torch.dtype, found: Found) -> None:
    """Add the times of the rows to what was found; a refused kernel stays refused."""
    for row in rows:
        impl = row.variant.removeprefix(f"{OURS} ")
        if impl not in candidates or row.call is None:
            continue
        if row.refused or not row.ms:
            print(f"{row.case}: {impl} refused: {row.refused}", flush=True)
            found[impl] = None
            continue
        print(f"{row.case}: {impl} {row.ms:.4g} ms", flush=True)
        entry = found.get(impl, tuned.Entry(dispatch.source_of(op, impl), (), []))
        if entry is not None:
            times = merge(entry.times, [from_entry({**row.call, "ms": row.ms})])
            found[impl] = tuned.Entry(entry.source, tuple(dict.fromkeys((*entry.dtypes, dtype_name(dtype)))), times)


def _merged(
    old: Mapping[str, Mapping[str, tuned.Entry]], found: Mapping[str, Found]
) -> dict[str, dict[str, tuned.Entry]]:
    """The older entries of the ops with those of this run; new times replace those of the same call."""
    merged: dict[str, dict[str, tuned.Entry]] = {}
    for op, impls in found.items():
        entries = dict(old.get(op, {}))
        for impl, entry in impls.items():
            before = entries.pop(impl, None)
            if entry is None:
                continue
            if before is not None and before.source == entry.source:
                times: list[Time] = merge(before.times, entry.times)
                entry = tuned.Entry(entry.source, tuple(dict.fromkeys((*before.dtypes, *entry.dtypes))), times)
            entries[impl] = entry
        if entries:
            merged[op] = entries
    return merged
