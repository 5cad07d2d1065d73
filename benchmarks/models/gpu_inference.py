"""A whole BERT's inference beside transformers' own, on the same weights and batches; `pretraining.py` has the step.

    python -m benchmarks.models.gpu_inference [--device cpu|cuda] [--size base|large|tiny ...]
        [--quick] [--record] [--budget S]

Inference is the encoder's last hidden state, in bfloat16 autocast. transformers gets padded batches with a mask and its
`sdpa` attention, with and without torch.compile; ours gets the same sequences packed, and the fused transformers model
the padded ones. All are timed as they are called, by the host's clock with the device awaited after each call, the
variants in turns, medians. Tokens per second count real tokens. Peak memory is what a call adds to what was there.

Before a case is timed the losses and hidden states without dropout are compared: ours may be three times as far from
transformers in float32 as transformers under bfloat16 is, plus a floor; if it is not, nothing is reported.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner.devices import Machine, environment, machine_of, reason, rounds_in
from benchmarks.runner.lengths import half_filled
from benchmarks.runner.runner import arguments, prepare_compiler, write
from bert_fast import fuse
from bert_fast.data import PackedBatch
from bert_fast.kernels import available_impls, use_impl
from bert_fast.models import BertConfig, BertForPreTraining
from bert_fast.pretrain.cuda_graph import OPS_OF_A_STEP
from bert_fast.pretrain.micro_batches import forward

MASKED = 0.15
PADDED_TOKENS = {"tiny": 256, "base": 16384, "large": 8192}  # of a batch
VOCABULARY = {"tiny": 500, "base": 30522, "large": 30522}
FACTOR, FLOOR = 3.0, 2e-3  # of the model-level bound; the floor is relative: a quarter of bfloat16's step
WARMUPS = 3


@dataclass(frozen=True)
class Row:
    """One way to run one scenario; `refused` says why where it did not run."""

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
    """bfloat16 autocast on CUDA; float32 on the CPU, where this only shows that the script works."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def batches(scenario: Scenario, vocabulary: int, device: torch.device) -> tuple[PackedBatch, dict[str, Tensor]]:
    """The same random sequences packed, and padded as transformers takes them."""
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
    """transformers' BertForPreTraining, compiled or not."""

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


def runs_here(variant: Theirs | Mine, scenario: Scenario) -> bool:
    """Whether there is time for the variant: each length is another compilation."""
    return isinstance(variant, Mine) or not variant.seqlens or scenario.seqlen in variant.seqlens


class Mine:
    """bert_fast's BertForPreTraining on packed batches, with one choice of implementation."""

    def __init__(self, model: Any, impl: str) -> None:
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


class Fused(Mine):
    """transformers' BertForPreTraining after bert_fast.fuse, on the padded batches that transformers takes."""

    def loss(self, packed: PackedBatch, padded: dict[str, Tensor]) -> Tensor:
        with use_impl(self.impl):
            return Theirs(self.model).loss(packed, padded)

    def hidden(self, packed: PackedBatch, padded: dict[str, Tensor]) -> Tensor:
        """(B, S, E)."""
        with use_impl(self.impl):
            return Theirs(self.model).hidden(packed, padded)


def models(size: str, device: torch.device, compiled: tuple[int, ...]) -> tuple[dict[str, Theirs | Mine], int]:
    """Every variant by name, on the same initial weights, and the vocabulary's size.

    The compiled and the eager variant share one model, and so do ours: the weights move a little while steps are timed,
    after everything has been compared. `compiled` names the lengths at which torch.compile takes part.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    config = BertConfig.size(size, vocab_size=VOCABULARY[size])
    settings = transformers.BertConfig(**{k: v for k, v in config.to_dict().items() if k != "model_type"})
    settings._attn_implementation = "sdpa"
    torch.manual_seed(0)
    with device:
        theirs = transformers.BertForPreTraining(settings)
        mine = BertForPreTraining(config)
    mine.load_hf(theirs.state_dict())
    theirs, mine = theirs.to(device), mine.to(device)
    found: dict[str, Theirs | Mine] = {"transformers": Theirs(theirs)}
    if compiled:
        found["transformers, torch.compile"] = Theirs(theirs, True, compiled)
    found["bert_fast auto"] = Mine(mine, "auto")
    found["transformers, fused"] = Fused(fuse(deepcopy(theirs)), "auto")
    impls = available_impls()
    if device.type == "cuda" and all(impls[op]["triton"].ok for op in OPS_OF_A_STEP):
        found["bert_fast triton"] = Mine(mine, "triton")
    return found, config.vocab_size


def check(variants: dict[str, Theirs | Mine], packed: PackedBatch, padded: dict[str, Tensor], name: str) -> None:
    """SystemExit unless losses and hidden states of ours are as near to float32 as transformers' own are."""
    device, keep = packed.input_ids.device, padded["attention_mask"].bool()
    theirs = variants["transformers"]

    def loss_and_hidden(variant: Theirs | Mine) -> tuple[float, Tensor]:
        variant.model.eval()
        with torch.no_grad():
            hidden = variant.hidden(packed, padded)
            return float(variant.loss(packed, padded)), (hidden[keep] if hidden.dim() == 3 else hidden).float()

    loss, hidden = loss_and_hidden(theirs)

    def errors(variant: Theirs | Mine) -> tuple[float, float]:
        with precision(device):
            found, states = loss_and_hidden(variant)
        return abs(found - loss) / abs(loss), float((states - hidden).norm() / hidden.norm())

    bounds = [FACTOR * error + FLOOR for error in errors(theirs)]
    for label, variant in variants.items():
        if isinstance(variant, Mine):
            for what, error, bound in zip(("loss", "hidden states"), errors(variant), bounds, strict=True):
                if not error <= bound:
                    raise SystemExit(f"{name}, {label}: {what} {error:.2e} from float32, over {bound:.2e}; not timed")


def inference(variant: Theirs | Mine, packed: PackedBatch, padded: dict[str, Tensor]) -> Callable[[], None]:
    device = packed.input_ids.device

    def step() -> None:
        variant.model.eval()
        with torch.inference_mode(), precision(device):
            variant.hidden(packed, padded)

    return step


def awaited(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one call, to the end of what it started on the device."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    scenario: Scenario,
    variants: dict[str, Theirs | Mine],
    batch: tuple[PackedBatch, dict[str, Tensor]],
    machine: Machine,
    seconds: float,
    make: Callable[[Theirs | Mine, PackedBatch, dict[str, Tensor]], Callable[[], None]] = inference,
) -> list[Row]:
    """Compare, warm up, time in turns what `make` makes of each variant."""
    variants = {name: variant for name, variant in variants.items() if runs_here(variant, scenario)}
    device = machine.device
    packed, padded = batch
    check(variants, packed, padded, scenario.name)
    runs: dict[str, Callable[[], None]] = {}
    peaks: dict[str, float | None] = {}
    refused: dict[str, str] = {}
    for name, variant in variants.items():
        try:
            run = make(variant, packed, padded)
            for _ in range(WARMUPS):  # compiles, and makes the optimizer's state
                run()
            peaks[name] = machine.with_peak(run)[1]
        except Exception as problem:
            if isinstance(variant, Mine):
                raise
            refused[name] = reason(problem)
            continue
        runs[name] = run
    first = sum(awaited(run, device) for run in runs.values())
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds_in(seconds, first)):
        for name, run in runs.items():
            times[name].append(awaited(run, device))
    medians = {name: median(found) for name, found in times.items()}
    peers = [found for name, found in medians.items() if isinstance(variants[name], Theirs)]
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
    """What matters most first: a short budget leaves the rest out."""
    found = []
    for seqlen in (32,) if size == "tiny" else lengths:
        count = PADDED_TOKENS[size] // seqlen
        found.append(Scenario(f"{size} S {seqlen} half filled {kind}", half_filled(count, seqlen), seqlen))
        found.append(Scenario(f"{size} S {seqlen} {kind}", [seqlen] * count, seqlen))
    return found


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
    """The lengths at which torch.compile takes part: 24 layers take it minutes."""
    if options.no_compile or size == "tiny" or (size == "large" and options.quick):
        return ()
    return (512,) if options.quick else (128, 512)


def run(
    name: str,
    options: Namespace,
    machine: Machine,
    sizes: list[str],
    scenarios_of: Callable[[str], list[Scenario]],
    measured: Callable[[Scenario, dict[str, Theirs | Mine], int], list[Row]],
) -> dict[str, Any] | None:
    """Measure every scenario of every size while there is time, and print the table.

    Args:
        name: of the benchmark.
        options: of the command line.
        sizes: where it names none.
        scenarios_of: a size's.
        measured: takes a scenario, the variants and the vocabulary's size.

    Returns:
        The report, or None where nothing was to be timed.
    """
    begin = time.perf_counter()
    rows: list[Row] = []
    left_out: list[str] = []
    for size in options.size or sizes:
        variants, vocabulary = models(size, machine.device, compiles_at(size, options))
        for scenario in scenarios_of(size)[: 1 if options.warm else None]:
            if time.perf_counter() - begin > options.budget:
                left_out.append(scenario.name)
                continue
            try:
                rows += measured(scenario, variants, vocabulary)
            except KeyboardInterrupt:  # what was measured so far is worth its report
                left_out.append(scenario.name)
                options.budget = 0.0
            print(f"{scenario.name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            machine.release()
        del variants
        gc.collect()
        machine.release()
    if options.warm:
        return None
    import transformers

    about = {**environment(machine), "transformers": transformers.__version__}
    print(f"{name}: {json.dumps(about)}\n{table(rows)}")
    if left_out:
        print(f"not measured, the time was over: {'; '.join(left_out)}")
    report = {"environment": about, "rows": [asdict(row) for row in rows]}
    return {**report, "left_out": left_out} if left_out else report


def command_line(what: str) -> tuple[Namespace, Machine]:
    """The options of both benchmarks, and the machine."""
    parser = arguments(what)
    parser.add_argument("--size", nargs="+", choices=tuple(PADDED_TOKENS), help="tiny shows that it runs")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    options = parser.parse_args()
    prepare_compiler()
    try:
        return options, machine_of(options.device)
    except ValueError as error:
        parser.error(str(error))


def seconds_of(options: Namespace) -> float:
    """How long a scenario is timed."""
    return 0.0 if options.warm else 0.5 if options.quick else 1.5


def main() -> int:
    options, machine = command_line("a whole BERT's inference beside transformers' own")

    def measured(scenario: Scenario, variants: dict[str, Theirs | Mine], vocabulary: int) -> list[Row]:
        batch = batches(scenario, vocabulary, machine.device)
        return measure(scenario, variants, batch, machine, seconds_of(options))

    lengths, sizes = ((512,), ["base"]) if options.quick else ((512, 128), ["base", "large"])
    report = run("models", options, machine, sizes, lambda size: scenarios(size, lengths, "infer"), measured)
    if report is not None and options.record:
        print(f"written: {write(report, 'models', options.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
