"""Whole models compared with transformers: sizes, batches, variants, the comparison before timing, and the timing.

Calls are timed by the host's clock, which synchronizes the device after each; variants are interleaved, and the median
is reported. Tokens per second count real tokens. Peak memory is what a call allocates.

Before a case is timed, losses and hidden states without dropout are compared: the distance of ours from transformers in
FP32 may be three times that of transformers under BF16, plus a floor. A variant that exceeds it or raises is refused
and not timed; if it is ours the exit code is 1. The report is rewritten after every case. Compiled variants come last,
when everything else is recorded, and their cases are then timed again with all variants.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import accumulate, product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bert_fast import fuse
from bert_fast._device import autocast
from bert_fast.bench.devices import Machine, environment, reason, rounds_in
from bert_fast.bench.runner import arguments, exit_code, failures, parse, saving, write
from bert_fast.data import PackedBatch
from bert_fast.kernels import available_impls, use_impl
from bert_fast.kernels._common.benchmarks import half_filled
from bert_fast.models import BertConfig, BertForPreTraining
from bert_fast.pretrain.cuda_graph import OPS_OF_A_STEP
from bert_fast.pretrain.micro_batches import forward

MASKED = 0.15
PADDED_TOKENS = {"tiny": 256, "base": 16384, "large": 8192}  # of a batch
VOCABULARY = {"tiny": 500, "base": 30522, "large": 30522}
# The model-level bound. The floors cover an eager error that is small by chance; FLOOR is a quarter of BF16's eps.
FACTOR, FLOOR, FLOOR_ULPS = 3.0, 2e-3, 4.0
WARMUPS = 3


@dataclass(frozen=True)
class Size:
    """A model and its batch of `batch` sequences, padded to `seqlen`."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int = 12
    vocabulary: int = 30522
    batch: int = 4
    seqlen: int = 128

    def flops(self, lengths: list[int]) -> int:
        """FLOPs of the encoder's matrix products in the forward pass of sequences of these lengths."""
        weights = 4 * self.hidden**2 + 2 * self.hidden * self.intermediate
        scores = sum(2 * n * n * self.hidden for n in lengths)
        return self.layers * 2 * (weights * sum(lengths) + scores)


@dataclass(frozen=True)
class Row:
    """One variant of one scenario. A refused variant has no figures; `refused` is the reason."""

    case: str
    variant: str
    ms: float | None = None
    tokens_per_s: float | None = None
    fill: float | None = None
    peak_mbytes: float | None = None
    ratio_to_best_peer: float | None = None
    mfu: float | None = None
    refused: str = ""


@dataclass(frozen=True)
class Scenario:
    """A batch of sequences of these lengths."""

    name: str
    lengths: list[int]
    seqlen: int


def precision(device: torch.device) -> AbstractContextManager[Any]:
    """BF16 autocast on CUDA; FP32 on the CPU, where the benchmark only checks that it runs."""
    return autocast(device, "bf16" if device.type == "cuda" else "fp32")


def model_of(size: Size, kind: str = "BertForSequenceClassification") -> Any:
    """transformers' model of the class `kind` with random weights; dropout 0.1 is its default."""
    import transformers

    transformers.logging.set_verbosity_error()
    config = transformers.BertConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        intermediate_size=size.intermediate,
        initializer_range=0.05,  # attention that is not uniform
    )
    config._attn_implementation = "sdpa"
    return getattr(transformers, kind)(config)


def batches(scenario: Scenario, vocabulary: int, device: torch.device) -> tuple[PackedBatch, dict[str, Tensor]]:
    """The same random sequences, packed and padded."""
    lengths, total = torch.tensor(scenario.lengths), sum(scenario.lengths)
    ids = torch.randint(5, vocabulary, (total,))
    labels = torch.randint(5, vocabulary, (total,)).where(torch.rand(total) < MASKED, torch.tensor(-100))
    pairs = torch.randint(0, 2, lengths.shape)
    keep = torch.arange(scenario.seqlen) < lengths[:, None]
    packed = PackedBatch(
        input_ids=ids,
        token_type_ids=torch.zeros_like(ids),
        position_ids=torch.cat([torch.arange(length) for length in scenario.lengths]),
        cu_seqlens=torch.tensor([0, *accumulate(scenario.lengths)], dtype=torch.int32),
        max_seqlen=max(scenario.lengths),
        labels=labels,
        next_sentence_label=pairs,
    ).with_label_rows()
    padded = {"input_ids": torch.zeros(keep.shape, dtype=torch.int64), "labels": torch.full(keep.shape, -100)}
    padded["input_ids"][keep], padded["labels"][keep] = ids, labels
    padded |= {"attention_mask": keep.long(), "next_sentence_label": pairs}
    return packed.to(device), {name: x.to(device) for name, x in padded.items()}


class Theirs:
    """transformers' BertForPreTraining, compiled or not; compiled only for the lengths `seqlens`."""

    def __init__(self, model: Any, compiled: bool = False, seqlens: tuple[int, ...] = ()) -> None:
        self.model, self.seqlens = model, seqlens
        self.call = torch.compile(model, dynamic=False) if compiled else model
        self.encoder = torch.compile(model.bert, dynamic=False) if compiled else model.bert

    def loss(self, packed: PackedBatch, padded: dict[str, Tensor]) -> Tensor:
        out: Tensor = self.call(**padded).loss
        return out

    def hidden(self, packed: PackedBatch, padded: dict[str, Tensor]) -> Tensor:
        """(B, S, E)."""
        inputs = {name: x for name, x in padded.items() if "label" not in name}
        out: Tensor = self.encoder(**inputs).last_hidden_state
        return out


def runs_here(variant: Variant, scenario: Scenario) -> bool:
    """Whether the variant is timed: each length needs a compilation."""
    return isinstance(variant, Ours) or not variant.seqlens or scenario.seqlen in variant.seqlens


class Ours:
    """bert_fast's BertForPreTraining on packed batches, with the implementations that `use_impl` takes."""

    def __init__(self, model: Any, impl: str | dict[str, str]) -> None:
        self.model, self.impl = model, impl

    def loss(self, packed: PackedBatch, padded: dict[str, Tensor]) -> Tensor:
        with use_impl(self.impl):
            out: Tensor = forward(self.model, packed).loss
        return out

    def hidden(self, packed: PackedBatch, padded: dict[str, Tensor]) -> Tensor:
        """(T, E)."""
        names = ("input_ids", "token_type_ids", "position_ids", "cu_seqlens", "max_seqlen")
        with use_impl(self.impl):
            out: Tensor = self.model.bert(**{name: getattr(packed, name) for name in names}).last_hidden_state
        return out


class Fused(Ours):
    """transformers' BertForPreTraining after bert_fast.fuse, on padded batches."""

    def loss(self, packed: PackedBatch, padded: dict[str, Tensor]) -> Tensor:
        with use_impl(self.impl):
            return Theirs(self.model).loss(packed, padded)

    def hidden(self, packed: PackedBatch, padded: dict[str, Tensor]) -> Tensor:
        """(B, S, E)."""
        with use_impl(self.impl):
            return Theirs(self.model).hidden(packed, padded)


Variant = Theirs | Ours


def models(size: str, device: torch.device, compiled: tuple[int, ...]) -> tuple[dict[str, Variant], int]:
    """Every variant by name, with the same initial weights, and the vocabulary's size.

    The compiled and the eager variant share one model, and so do ours: timed steps change the weights a little, but
    only after the comparison. `compiled` has the lengths at which torch.compile is timed.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    config = BertConfig.size(size, vocab_size=VOCABULARY[size])
    settings = transformers.BertConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    settings._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with device:
        theirs = transformers.BertForPreTraining(settings)
        ours = BertForPreTraining(config)
    ours.load_hf(theirs.state_dict())
    theirs, ours = theirs.to(device), ours.to(device)
    variants: dict[str, Variant] = {"transformers": Theirs(theirs)}
    if compiled:
        variants["transformers, torch.compile"] = Theirs(theirs, True, compiled)
    variants["bert_fast auto"] = Ours(ours, "auto")
    variants["bert_fast fuse"] = Fused(fuse(deepcopy(theirs)), "auto")
    impls = available_impls()
    if device.type == "cuda" and all(impls[op]["triton"].ok for op in OPS_OF_A_STEP):
        variants["bert_fast triton"] = Ours(ours, "triton")
        if impls["attention"]["cuda"].ok:
            mixed = dict.fromkeys(OPS_OF_A_STEP, "triton") | {"attention": "cuda"}
            variants["bert_fast triton, CUDA attention"] = Ours(ours, mixed)
    return variants, config.vocab_size


def check(variants: dict[str, Variant], packed: PackedBatch, padded: dict[str, Tensor]) -> dict[str, str]:
    """The reasons why variants of ours are refused: they raise, or loss or hidden states are too far from FP32."""
    device, keep = packed.input_ids.device, padded["attention_mask"].bool()
    theirs = variants["transformers"]

    def loss_and_hidden(variant: Variant) -> tuple[float, Tensor]:
        variant.model.eval()
        with torch.no_grad():
            hidden = variant.hidden(packed, padded)
            return float(variant.loss(packed, padded)), (hidden[keep] if hidden.dim() == 3 else hidden).float()

    loss, hidden = loss_and_hidden(theirs)

    def errors(variant: Variant) -> tuple[float, float]:
        with precision(device):
            variant_loss, states = loss_and_hidden(variant)
        return abs(variant_loss - loss) / abs(loss), float((states - hidden).norm() / hidden.norm())

    bounds = [FACTOR * error + FLOOR for error in errors(theirs)]
    refused = {}
    for label, variant in variants.items():
        if not isinstance(variant, Ours):
            continue
        try:
            measured = errors(variant)
        except Exception as problem:
            refused[label] = reason(problem)
            continue
        for what, error, bound in zip(("loss", "hidden states"), measured, bounds, strict=True):
            if not error <= bound:
                refused.setdefault(label, f"wrong: {what} {error:.2e} from float32, above {bound:.2e}")
    return refused


def synchronized(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call until the device has finished it."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    scenario: Scenario,
    variants: dict[str, Variant],
    batch: tuple[PackedBatch, dict[str, Tensor]],
    machine: Machine,
    seconds: float,
    make: Callable[[Variant, PackedBatch, dict[str, Tensor]], Callable[[], None]],
) -> list[Row]:
    """Compare the variants, warm up, and time the calls that `make` creates of them, interleaved."""
    variants = {name: variant for name, variant in variants.items() if runs_here(variant, scenario)}
    device = machine.device
    packed, padded = batch
    refused = check(variants, packed, padded)
    runs: dict[str, Callable[[], None]] = {}
    peaks: dict[str, float | None] = {}
    for name, variant in variants.items():
        if name in refused:
            continue
        try:
            run = make(variant, packed, padded)
            for _ in range(WARMUPS):  # compiles, and creates the optimizer's state
                run()
            peaks[name] = machine.with_peak(run)[1]
        except Exception as problem:
            refused[name] = reason(problem)
            continue
        runs[name] = run
    first = sum(synchronized(run, device) for run in runs.values())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds_in(seconds, first)):
        for name, run in runs.items():
            times[name].append(synchronized(run, device))
    medians = {name: median(samples) for name, samples in times.items()}
    peers = [seconds for name, seconds in medians.items() if isinstance(variants[name], Theirs)]
    total = packed.num_tokens
    rows = []
    for name in variants:
        if name in refused:
            rows.append(Row(scenario.name, name, refused=refused[name]))
            continue
        rows.append(
            Row(
                scenario.name,
                name,
                ms=medians[name] * 1e3,
                tokens_per_s=total / medians[name],
                fill=total / padded["input_ids"].numel(),
                peak_mbytes=peaks[name],
                ratio_to_best_peer=min(peers) / medians[name] if peers else None,
            )
        )
    return rows


def scenarios(size: str, lengths: tuple[int, ...], kind: str) -> list[Scenario]:
    """Full and half filled, the most important first: a short budget leaves out the rest."""
    result = []
    for seqlen in (32,) if size == "tiny" else lengths:
        count = PADDED_TOKENS[size] // seqlen
        result.append(Scenario(f"{size} S {seqlen} half filled {kind}", half_filled(count, seqlen), seqlen))
        result.append(Scenario(f"{size} S {seqlen} {kind}", [seqlen] * count, seqlen))
    return result


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| case | variant | ms | real tokens/s | fill | peak MB | MFU | x best peer |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        if r.ms is None or r.fill is None:
            lines.append(f"| {r.case} | {r.variant} | refused: {r.refused} | | | | | |")
            continue
        peak = "" if r.peak_mbytes is None else f"{r.peak_mbytes:,.0f}"
        ratio = "" if r.ratio_to_best_peer is None else f"{r.ratio_to_best_peer:.2f}"
        mfu = "" if r.mfu is None else f"{r.mfu:.1%}"
        lines.append(
            f"| {r.case} | {r.variant} | {r.ms:.2f} | {r.tokens_per_s:,.0f} | {r.fill:.0%} | {peak} | {mfu} | {ratio} |"
        )
    return "\n".join(lines)


def compiles_at(size: str, options: Namespace) -> tuple[int, ...]:
    """The lengths at which torch.compile is timed: it takes minutes for 24 layers."""
    if options.no_compile or size == "tiny" or (size == "large" and options.quick):
        return ()
    return (512,) if options.quick else (128, 512)


def run(
    name: str,
    options: Namespace,
    machine: Machine,
    sizes: list[str],
    scenarios_of: Callable[[str], list[Scenario]],
    measured: Callable[[Scenario, dict[str, Variant], int], list[Row]],
    **extra: Any,
) -> int:
    """Measure every scenario of every size within the budget, and print and record the table; returns the exit code.

    The compiled peers come last, since compiling takes minutes; a scenario is then timed again with all variants.

    Args:
        name: of the benchmark and of its report.
        options: of the command line.
        sizes: used if the command line names none.
        scenarios_of: the scenarios of a size.
        measured: (scenario, variants, size of the vocabulary) -> rows.
        extra: further fields of the report.
    """
    import transformers

    begin = time.perf_counter()
    about = {**environment(machine), "transformers": transformers.__version__}
    rows: dict[str, list[Row]] = {}
    left_out: list[str] = []

    def report() -> dict[str, Any]:
        everything = [row for of_case in rows.values() for row in of_case]
        parts = {"left_out": left_out, "failures": failures(everything)}
        filled = {name: list(value) for name, value in parts.items() if value}
        return {"environment": about, "rows": [asdict(row) for row in everything], **extra, **filled}

    save = saving(name, options)
    for compiled, size in product((False, True), options.size or sizes):
        lengths = compiles_at(size, options) if compiled else ()
        if compiled and not lengths:
            continue
        variants, vocabulary = models(size, machine.device, lengths)
        chosen = [s for s in scenarios_of(size)[: 1 if options.warm else None] if not compiled or s.seqlen in lengths]
        for scenario in chosen:
            label = scenario.name + ", torch.compile" * compiled
            if time.perf_counter() - begin > options.budget:
                left_out.append(label)
                continue
            try:
                rows[scenario.name] = measured(scenario, variants, vocabulary)
            except KeyboardInterrupt:  # report what was measured so far
                left_out.append(label)
                options.budget = 0.0
            else:
                save(report())
            print(f"{label}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            machine.release()
        del variants
        gc.collect()
        machine.release()
    final = report()
    if not options.warm:
        print(f"{name}: {json.dumps(about)}\n{table([row for of_case in rows.values() for row in of_case])}")
        if left_out:
            print(f"not measured, out of time: {'; '.join(left_out)}")
        if options.record:
            write(final, name, options.results)
    return exit_code(final.get("failures", []))


def command_line(what: str) -> tuple[Namespace, Machine]:
    """The options of this benchmark and of pretraining's, and the machine."""
    parser = arguments(what)
    parser.add_argument("--size", nargs="+", choices=tuple(PADDED_TOKENS), help="tiny checks that it runs")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    return parse(parser)


def seconds_of(options: Namespace) -> float:
    """Seconds for which a scenario is timed."""
    return 0.0 if options.warm else 0.5 if options.quick else 1.5
