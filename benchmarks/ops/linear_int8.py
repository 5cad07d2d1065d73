"""linear_int8 beside float32 and torch's dynamic int8: BERT-base's layers and its feed-forward block.

The error is that of 8 bits, against float64 of the weights as they were; ours and torch's in the same column.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.runner.runner import Case, Plan, Setting, main
from bert_fast.kernels import feed_forward_int8, linear_int8, quantize_weight

LAYERS = {"qkv": (768, 2304), "down": (3072, 768), "feed-forward": (768, 3072)}


def no_grad(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return function()

    return run


def case(setting: Setting, rows: int, layer: str) -> Case:
    width, columns = LAYERS[layer]
    both = layer == "feed-forward"
    first = nn.Linear(width, columns).to(setting.device)
    parts = [first, nn.GELU(), nn.Linear(columns, width, bias=False).to(setting.device)] if both else [first]
    plain = nn.Sequential(*parts).eval()
    dynamic = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, dtype=torch.qint8)
    x = setting.randn(rows, width)
    up, bias = quantize_weight(first.weight), first.bias.detach()
    down = quantize_weight(parts[2].weight) if both else None  # type: ignore[arg-type]

    def ours(impl: str) -> Tensor:
        if down is None:
            return linear_int8(x, up, bias, impl=impl)
        return feed_forward_int8(x, up, bias, down, impl=impl)

    exact = F.linear(x.double(), first.weight.double(), first.bias.double())
    if both:
        exact = F.linear(F.gelu(exact), parts[2].weight.double())  # type: ignore[arg-type]
    return Case(
        {
            "eager fp32": no_grad(partial(plain, x)),
            "torch dynamic int8": no_grad(partial(dynamic, x)),
            **{f"bert_fast {impl}": no_grad(partial(ours, impl)) for impl in setting.ours("linear_int8", x.dtype)},
        },
        exact.detach(),
        0.05,
        flops=2 * rows * width * columns * (2 if both else 1),
    )


def plans(setting: Setting) -> list[Plan]:
    return [
        Plan(f"T {rows} {layer} forward", partial(case, setting, rows, layer))
        for rows, layer in product(() if setting.on_gpu else (32, 1024), LAYERS)
    ]


if __name__ == "__main__":
    main("linear_int8", plans)
