"""Compute a step of pretraining that diverged again, from what OUTPUT_DIR/diverged keeps of it, on one device."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any


def add_arguments(parser: Any) -> None:
    parser.add_argument("folder", type=str, help="OUTPUT_DIR/diverged/step-NNNNNNNN of the run")
    parser.add_argument("--weights", type=str | None, default=None, help="a checkpoint in place of the weights there")
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda ...")
    parser.add_argument("--json", action="store_true", help="as one JSON object; numbers that JSON has not are strings")


def run(args: Any) -> int:
    from bert_fast.pretrain.divergence import replay

    found = replay(args.folder, device=args.device, weights=args.weights)
    if args.json:
        print(json.dumps(_finite(asdict(found)), indent=1))
        return 0
    print(f"step {found.step}: {found.reason}")
    print(f"{'':<14} {'now':>14} {'then':>14}")
    print(f"{'loss':<14} {found.loss:>14.6g} {found.recorded_loss:>14.6g}")
    print(f"{'gradient norm':<14} {found.norm:>14.6g} {found.recorded_norm:>14.6g}")
    for number, (mlm, nsp) in enumerate(found.micro_losses):
        print(f"micro-batch {number}: masked-language-model loss {mlm:.6g}, next-sentence loss {nsp:.6g}")
    return 0


def _finite(value: Any) -> Any:
    """`value` with strings in the place of NaN and infinities."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value
