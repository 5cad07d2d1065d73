"""Recompute a diverged pretraining step, saved in OUTPUT_DIR/diverged, on one device."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument("folder", type=str, help="OUTPUT_DIR/diverged/step-NNNNNNNN of the run")
    parser.add_argument("--weights", type=str | None, default=None, help="a checkpoint whose weights are used instead")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda ...")
    parser.add_argument(
        "--json", type=bool, default=False, help="print one JSON object, with NaN and infinities as strings"
    )


def run(args: Any) -> int:
    from bert_fast.pretrain.divergence import replay

    step = replay(args.folder, device=args.device, weights=args.weights)
    if args.weights is None and not step.is_exact:
        print(
            "bert-fast replay: warning: loss or gradient norm are not the recorded bits; products may round "
            "differently on another device or number of threads or ranks, and on CUDA streams without "
            "CUBLAS_WORKSPACE_CONFIG=:4096:8",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(_finite(asdict(step)), indent=1))
        return 0
    print(f"step {step.step}: {step.reason}")
    print(f"{'':<14} {'replayed':>14} {'recorded':>14}")
    print(f"{'loss':<14} {step.loss:>14.6g} {step.recorded_loss:>14.6g}")
    print(f"{'gradient norm':<14} {step.norm:>14.6g} {step.recorded_norm:>14.6g}")
    for number, (mlm, nsp) in enumerate(step.micro_losses):
        print(f"micro-batch {number}: masked-language-model loss {mlm:.6g}, next-sentence loss {nsp:.6g}")
    return 0


def _finite(value: Any) -> Any:
    """`value` with strings in place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
