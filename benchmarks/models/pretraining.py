"""A whole step of pretraining beside transformers': forward, backward, clipping and AdamW, same weights, same batches.

    python -m benchmarks.models.pretraining [--device cpu|cuda] [--size base|large|tiny ...]
        [--quick] [--record] [--budget S]

Both losses (15 % of the tokens masked, next sentence), dropout 0.1, bfloat16 autocast, gradients clipped to norm 1.
transformers takes padded batches with `sdpa` attention, with and without torch.compile. Ours is the step that
`bert-fast pretrain` makes (`bert_fast.pretrain.step`: verdict of the guard, sums for the log, last layer at masked
tokens), called, and as one CUDA graph (`bert_fast.pretrain.cuda_graph`). `gpu_inference.py` says how it is timed, and
compared before that. Also, a replayed step has to have, to the bit, the loss and gradient norm of the called one. MFU
is model FLOPs, padding not counted, over what a large matrix product reaches at the start. On a CPU, in float32,
`--size tiny` shows that it runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from benchmarks.models.gpu_inference import (
    Fused,
    Mine,
    Row,
    Scenario,
    Theirs,
    batches,
    command_line,
    measure,
    precision,
    run,
    scenarios,
    seconds_of,
)
from benchmarks.runner.devices import Machine
from benchmarks.runner.runner import write
from bert_fast.data import PackedBatch
from bert_fast.kernels import use_impl
from bert_fast.optim.config import OptimizerOptions
from bert_fast.optim.optimizer import make_optimizer, set_lr
from bert_fast.pretrain.cuda_graph import WARM_UPS, Capture, GraphedStep, capture_on, synchronizing_ops
from bert_fast.pretrain.divergence import Guard
from bert_fast.pretrain.metrics import Totals, gemm_ceiling, model_flops
from bert_fast.pretrain.micro_batches import MicroBatch, Position, StepBatches, dropout_states
from bert_fast.pretrain.step import Inputs, TrainStep
from bert_fast.runtime.ranks import Ranks

CLIP = 1.0
GRAPH = ", CUDA graph"


class Graphed(Mine):
    """bert_fast's, its step recorded by what `capture` makes."""

    def __init__(self, model: Any, impl: str, capture: Callable[[], Capture]) -> None:
        super().__init__(model, impl)
        self.capture = capture


class OurStep:
    """A step of `bert-fast pretrain` on one batch, with dropout that is another each time."""

    def __init__(self, variant: Mine, packed: PackedBatch, capture: Capture | None) -> None:
        device = packed.input_ids.device
        self._impl, self._config, self._numbers = variant.impl, variant.model.config, count(1)
        optimizer = make_optimizer(variant.model, OptimizerOptions(), capturable=capture is not None)
        set_lr(optimizer, 0.0)  # as much work, and weights with which replayed and called steps can be compared
        totals = Totals(device)
        kind = kind_of(device)
        guard = Guard("stop", 0.0, device)
        self.work = TrainStep(variant.model, optimizer, guard, totals, precision=kind, max_grad_norm=CLIP)
        self._graph = None if capture is None else GraphedStep(self.work, self._config, 0, capture)
        micro = MicroBatch(0, packed, ())
        counts = torch.tensor([masked_and_pairs(packed)])
        self._taken = StepBatches(Position(0, 0), Position(0, 1), (micro,), 0, 0, 0, counts)
        self._weights = torch.ones(1, 2, device=device)

    def __call__(self) -> None:
        self.work.model.train()
        step = next(self._numbers)
        with use_impl(self._impl):
            if self._graph is not None:
                self._graph.run(self._taken, self._weights, step)
                return
            states = dropout_states(self._config, self.work.device, 0, step, 0)
            self.work.accumulate(Inputs(self._taken.micro[0].batch, self._weights[0], states))
            self.work.update()


def masked_and_pairs(packed: PackedBatch) -> list[int]:
    return [int((x != -100).sum()) for x in (packed.labels, packed.next_sentence_label)]


def our_step(variant: Mine, packed: PackedBatch) -> OurStep:
    """SystemExit where a recorded step, replayed, is not the called one."""
    if not isinstance(variant, Graphed):
        return OurStep(variant, packed, None)
    with use_impl(variant.impl):
        replayed, called = OurStep(variant, packed, variant.capture()), OurStep(variant, packed, None)
    for _ in range(WARM_UPS + 1):
        replayed()
        called()
    found, expected = replayed.work.verdict.tolist(), called.work.verdict.tolist()
    if found != expected:
        raise SystemExit(f"the replayed step has loss and norm {found[1:]}, the called one {expected[1:]}; not timed")
    return replayed


def their_step(variant: Theirs | Mine, packed: PackedBatch, padded: dict[str, Tensor]) -> Callable[[], None]:
    """A plain loop's step of a transformers model."""
    device, parameters = packed.input_ids.device, list(variant.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=device.type == "cuda")

    def step() -> None:
        variant.model.train()
        with precision(device):
            loss = variant.loss(packed, padded)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_step(variant: Theirs | Mine, packed: PackedBatch, padded: dict[str, Tensor]) -> Callable[[], None]:
    """What is timed of a variant."""
    ours = isinstance(variant, Mine) and not isinstance(variant, Fused)
    return our_step(variant, packed) if ours else their_step(variant, packed, padded)  # type: ignore[arg-type]


def with_graphs(variants: dict[str, Theirs | Mine], capture: Callable[[], Capture]) -> dict[str, Theirs | Mine]:
    """The variants, and each of ours recorded too, but where an op would wait for the device."""
    found: dict[str, Theirs | Mine] = {}
    for name, variant in variants.items():
        found[name] = variant
        if isinstance(variant, Mine) and not isinstance(variant, Fused):
            device = next(variant.model.parameters()).device
            with use_impl(variant.impl):
                waiting = synchronizing_ops(device, kind_of(device))
            if waiting:
                print(f"{name + GRAPH}: left out, {', '.join(waiting)} would run the reference", file=sys.stderr)
            else:
                found[name + GRAPH] = Graphed(variant.model, variant.impl, capture)
    return found


def kind_of(device: torch.device) -> str:
    """The precision of a step there."""
    return "bf16" if device.type == "cuda" else "fp32"


def measure_step(
    scenario: Scenario,
    variants: dict[str, Theirs | Mine],
    vocabulary: int,
    machine: Machine,
    seconds: float,
    ceiling: float,
) -> list[Row]:
    """The rows of a scenario, with the share of `ceiling` (FLOP/s) that the model's FLOPs take."""
    packed, padded = batches(scenario, vocabulary, machine.device)
    rows = measure(scenario, variants, (packed, padded), machine, seconds, training_step)
    lengths = scenario.lengths
    flops = model_flops(
        variants["bert_fast auto"].model.config,
        tokens=sum(lengths),
        squares=sum(length**2 for length in lengths),
        masked=masked_and_pairs(packed)[0],
        sequences=len(lengths),
    )
    return [row if row.ms is None else replace(row, mfu=flops / (row.ms / 1e3) / ceiling) for row in rows]


def main() -> int:
    options, machine = command_line("a whole step of pretraining beside transformers'")
    device = machine.device
    kind = kind_of(device)
    ceiling = float(gemm_ceiling(device, kind))
    print(f"pretraining: matrix products reach {ceiling / 1e12:.3g} TFLOP/s in {kind}", flush=True)

    def measured(scenario: Scenario, variants: dict[str, Theirs | Mine], vocabulary: int) -> list[Row]:
        if device.type == "cuda":
            variants = with_graphs(variants, lambda: capture_on(Ranks("cuda"), kind))
        return measure_step(scenario, variants, vocabulary, machine, seconds_of(options), ceiling)

    def scenarios_of(size: str) -> list[Scenario]:
        return steps_of(size, options.quick)

    report = run("pretraining", options, machine, ["base", "large"], scenarios_of, measured)
    if report is not None and options.record:
        report["ceilings"] = {f"{kind}_gemm_gflops": ceiling / 1e9}
        print(f"written: {write(report, 'pretraining', options.results)}")
    return 0


def steps_of(size: str, quick: bool) -> list[Scenario]:
    """At 512 tokens half filled and full, then at 128."""
    return scenarios(size, (512,) if quick else (512, 128), "train")


if __name__ == "__main__":
    sys.exit(main())
