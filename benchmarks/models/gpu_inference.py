"""Inference of a whole BERT compared with transformers, on the same weights and batches; `pretraining.py` has training.

    python -m benchmarks.models.gpu_inference [--device cpu|cuda] [--size base|large|tiny ...]
        [--quick] [--record] [--budget S]

Inference computes the encoder's last hidden state under BF16 autocast. transformers gets padded batches with a mask and
its `sdpa` attention, with and without torch.compile; ours gets the same sequences packed, and the fused transformers
model the padded ones. `runner/whole_models.py` has the comparison and the timing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.runner.whole_models import (
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
from bert_fast.data import PackedBatch


def inference(variant: Variant, packed: PackedBatch, padded: dict[str, Tensor]) -> Callable[[], None]:
    device = packed.input_ids.device

    def step() -> None:
        variant.model.eval()
        with torch.inference_mode(), precision(device):
            variant.hidden(packed, padded)

    return step


def main() -> int:
    options, machine = command_line("inference of a whole BERT compared with transformers")

    def measured(scenario: Scenario, variants: dict[str, Variant], vocabulary: int) -> list[Row]:
        batch = batches(scenario, vocabulary, machine.device)
        return measure(scenario, variants, batch, machine, seconds_of(options), inference)

    lengths, sizes = ((512,), ["base"]) if options.quick else ((512, 128), ["base", "large"])
    return run("gpu_inference", options, machine, sizes, lambda size: scenarios(size, lengths, "infer"), measured)


if __name__ == "__main__":
    sys.exit(main())
