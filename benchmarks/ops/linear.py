"""linear beside eager PyTorch and torch.compile: the layers of BERT-base, in inference and in training.

In inference the weights are packed before the clock starts, as they are after a model's first batch; torch.compile
packs too, when it is told to (inductor's freezing).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner.runner import Case, Plan, Setting, main, passes
from bert_fast.kernels import linear

LAYERS = {"qkv": (768, 2304, None), "up, GeLU": (768, 3072, "gelu"), "down": (3072, 768, None)}


def eager(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None) -> Tensor:
    out = F.linear(x, weight, bias)
    return out if activation is None else F.gelu(out)


def compiled(activation: str | None, *, training: bool) -> Callable[..., Tensor]:
    options = {} if training else {"freezing": True}
    return torch.compile(partial(eager, activation=activation), dynamic=False, options=options)


def case(setting: Setting, rows: int, layer: str, dtype: torch.dtype, which: str) -> Case:
    width, columns, activation = LAYERS[layer]
    x, weight, bias = (setting.randn(*shape) for shape in ((rows, width), (columns, width), (columns,)))
    inputs = tuple(part.to(dtype) for part in (x, weight * width**-0.5, bias))
    dout = setting.randn(rows, columns, dtype=dtype)
    plain = partial(eager, activation=activation)
    training = which != "forward"
    return Case(
        {
            "eager": passes(plain, inputs, dout, which),
            "torch.compile": passes(compiled(activation, training=training), inputs, dout, which),
            **{
                f"bert_fast {impl}": passes(partial(linear, activation=activation, impl=impl), inputs, dout, which)
                for impl in setting.ours("linear", dtype)
            },
        },
        passes(plain, tuple(part.double() for part in inputs), dout.double(), which)(),
        64 * torch.finfo(dtype).eps,
        flops=2 * rows * width * columns * (3 if training else 1),
        dtype=dtype,
    )


def plans(setting: Setting) -> list[Plan]:
    sizes = (16384,) if setting.on_gpu else (32, 1024)
    dtypes = (torch.bfloat16,) if setting.on_gpu else (torch.float32, torch.bfloat16)
    return [
        Plan(
            f"T {rows} {layer} {str(dtype).removeprefix('torch.')} {which}",
            partial(case, setting, rows, layer, dtype, which),
        )
        for rows, layer, dtype, which in product(sizes, LAYERS, dtypes, ("forward", "forward + backward"))
        # A CPU without bfloat16 units takes seconds for the peers' bfloat16 training.
        if setting.on_gpu or which == "forward" or rows == 1024
    ]


if __name__ == "__main__":
    main("linear", plans)
