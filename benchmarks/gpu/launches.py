"""Whether the CUDA kernels of this build run here: each op forward and backward on a few sizes, compared with
float64.

    python -m benchmarks.gpu.launches [--device cpu]      cpu: in the tests' emulator (BERT_FAST_CUDA_EMULATOR)

On a Hopper it also asserts that attention's kernels for Hopper are the ones that were launched. Exit code 1 where an op
is not available, is wrong or raises; each op is a line, printed as it ends.
"""

from __future__ import annotations

import argparse
import sys

import torch

from bert_fast.kernels._common import cases, extensions
from bert_fast.kernels._common.dispatch import OPS
from bert_fast.verification import compare_sample

# All parts of attention's Hopper path have it in their kernels' names.
HOPPER = "hopper"


def launched(op: str, device: str) -> set[str]:
    """Run the op's samples in bfloat16 with `impl="cuda"`; the names of the kernels that a GPU ran.

    Raises:
        RuntimeError: the implementation is not available, or a result exceeds its bound.
    """
    availability = OPS[op].impls["cuda"].availability
    if not availability.ok:
        raise RuntimeError(availability.reason)
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        rows = [row for x in cases.load(op).samples() for row in compare_sample(x, "cuda", device, torch.bfloat16)]
    wrong = [f"{row.name}: error {row.ours:.2e}, bound {row.bound:.2e}" for row in rows if not row.ok]
    if wrong:
        raise RuntimeError("; ".join(wrong[:3]))
    return {event.name for event in profile.events()} if device == "cuda" else set()


def check(op: str, device: str) -> str:
    """ "ok", or what is wrong."""
    try:
        names = launched(op, device)
    except Exception as error:  # the next op may still run
        return f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
    is_hopper = device == "cuda" and torch.cuda.get_device_capability() == (9, 0)
    if op == "attention" and is_hopper and not any(HOPPER in name.lower() for name in names):
        reason = extensions.refused_tensor_map() or "no tensor map was refused"
        return f"failed: none of Hopper's kernels was launched ({reason}), but {', '.join(sorted(names))}"
    return "ok"


def main() -> int:
    parser = argparse.ArgumentParser(description="a few launches of each CUDA op")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    device = parser.parse_args().device
    # linear's CUDA implementation is cuBLAS and bias_gelu.
    ops = [op for op, slots in OPS.items() if "cuda" in slots.impls and not slots.impls["cuda"].built_on]
    results = {}
    for op in sorted(ops):
        results[op] = check(op, device)
        print(f"{op:<21} {results[op]}", flush=True)
    return int(not all(result == "ok" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
