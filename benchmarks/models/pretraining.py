"""A whole step of pretraining compared with transformers: forward, backward, clipping and AdamW.

    python -m benchmarks.models.pretraining [--device cpu|cuda] [--size base|large|tiny ...]
        [--quick] [--record] [--budget S]

Same weights and batches for both: both losses (15 % of the tokens masked, next sentence), dropout 0.1, BF16 autocast,
gradients clipped to norm 1. transformers takes padded batches with `sdpa` attention, with and without torch.compile.
Ours is the step of `bert-fast pretrain` (`bert_fast.pretrain.step`, with its guard and log sums, and the last layer at
masked tokens only), called eagerly and as one CUDA graph (`bert_fast.pretrain.cuda_graph`). A replayed step must have
the bits of the eager step's loss and gradient norm. `runner/whole_models.py` has the comparison and the timing. MFU is
model FLOPs, without padding, over the rate of a large matrix product measured at the start. `--size tiny` checks on a
CPU, in FP32, that the benchmark runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from benchmarks.runner.whole_models import (
    Fused,
    Ours,
    Row,
    Scenario,
    Variant,
    batches,
    command_line,
    measure,
    precision,
    run,
    scenarios,
    seconds_of,
)
from bert_fast.bench.devices import Machine
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


class Graphed(Ours):
    """bert_fast's model whose step is recorded by `capture()`."""

    def __init__(self, model: Any, impl: str | dict[str, str], capture: Callable[[], Capture]) -> None:
        super().__init__(model, impl)
        self.capture = capture


class OurStep:
    """A step of `bert-fast pretrain` on one batch, with new dropout masks each time."""

    def __init__(self, variant: Ours, packed: PackedBatch, capture: Capture | None) -> None:
        device = packed.input_ids.device
        self._impl, self._config, self._numbers = variant.impl, variant.model.config, count(1)
        optimizer = make_optimizer(variant.model, OptimizerOptions(), capturable=capture is not None)
        set_lr(optimizer, 0.0)  # the same work, and constant weights, so that replayed and eager steps can be compared
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


def our_step(variant: Ours, packed: PackedBatch) -> OurStep:
    """Our step.

    Raises:
        RuntimeError: the replayed step differs from the eager one.
    """
    if not isinstance(variant, Graphed):
        return OurStep(variant, packed, None)
    with use_impl(variant.impl):
        replayed, eager = OurStep(variant, packed, variant.capture()), OurStep(variant, packed, None)
    for _ in range(WARM_UPS + 1):
        replayed()
        eager()
    values, expected = replayed.work.verdict.tolist(), eager.work.verdict.tolist()
    if values != expected:
        raise RuntimeError(f"the replayed step has loss and norm {values[1:]}, the eager one {expected[1:]}")
    return replayed


def their_step(variant: Variant, packed: PackedBatch, padded: dict[str, Tensor]) -> Callable[[], None]:
    """A step of a transformers model in a plain training loop."""
    device, parameters = packed.input_ids.device, list(variant.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=device.type == "cuda")  # constant weights, like ours

    def step() -> None:
        variant.model.train()
        with precision(device):
            loss = variant.loss(packed, padded)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_step(variant: Variant, packed: PackedBatch, padded: dict[str, Tensor]) -> Callable[[], None]:
    """The timed call of a variant."""
    ours = isinstance(variant, Ours) and not isinstance(variant, Fused)
    return our_step(variant, packed) if ours else their_step(variant, packed, padded)  # type: ignore[arg-type]


def with_graphs(variants: dict[str, Variant], capture: Callable[[], Capture]) -> dict[str, Variant]:
    """The variants, and each of ours as a CUDA graph too, unless an op synchronizes with the device."""
    result: dict[str, Variant] = {}
    for name, variant in variants.items():
        result[name] = variant
        if isinstance(variant, Ours) and not isinstance(variant, Fused):
            device = next(variant.model.parameters()).device
            with use_impl(variant.impl):
                waiting = synchronizing_ops(device, kind_of(device))
            if waiting:
                print(f"{name + GRAPH}: skipped, {', '.join(waiting)} would run the reference", file=sys.stderr)
            else:
                result[name + GRAPH] = Graphed(variant.model, variant.impl, capture)
    return result


def kind_of(device: torch.device) -> str:
    """The precision of a step on `device`."""
    return "bf16" if device.type == "cuda" else "fp32"


def measure_step(
    scenario: Scenario,
    variants: dict[str, Variant],
    vocabulary: int,
    machine: Machine,
    seconds: float,
    ceiling: float,
) -> list[Row]:
    """The rows of a scenario, with the MFU against `ceiling` (FLOP/s)."""
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
    options, machine = command_line("a whole step of pretraining compared with transformers")
    device = machine.device
    kind = kind_of(device)
    ceiling = float(gemm_ceiling(device, kind))
    print(f"pretraining: matrix products reach {ceiling / 1e12:.3g} TFLOP/s in {kind}", flush=True)

    def measured(scenario: Scenario, variants: dict[str, Variant], vocabulary: int) -> list[Row]:
        if device.type == "cuda":
            variants = with_graphs(variants, lambda: capture_on(Ranks("cuda"), kind))
        return measure_step(scenario, variants, vocabulary, machine, seconds_of(options), ceiling)

    def scenarios_of(size: str) -> list[Scenario]:
        return steps_of(size, options.quick)

    ceilings = {f"{kind}_gemm_gflops": ceiling / 1e9}
    return run("pretraining", options, machine, ["large", "base"], scenarios_of, measured, ceilings=ceilings)


def steps_of(size: str, quick: bool) -> list[Scenario]:
    """At 512 tokens half filled and full, then at 128."""
    return scenarios(size, (512,) if quick else (512, 128), "train")


if __name__ == "__main__":
    sys.exit(main())
