"""The one description of linear for tools: see kernels/_common/cases.py."""

from __future__ import annotations

import functools
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from bert_fast.kernels._common.benchmarks import Benchmark, Peer, Plan, dtype_name, normal
from bert_fast.kernels._common.cases import LENGTHS, E, F, Lengths, Malformed, OpCases, Sample, randn
from bert_fast.kernels.linear import linear


def _two_weights(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return linear(x, [weight[:100], weight[100:]], impl=impl)


def samples(lengths: Lengths = None) -> list[Sample]:
    """With a bias, with GeLU, and with a weight in two parts."""
    T = sum(LENGTHS if lengths is None else lengths)
    inputs = {"x": randn(T, E), "weight": randn(F, E, scale=E**-0.5), "bias": randn(F)}
    parameters = ("weight", "bias")
    without_bias = {name: inputs[name] for name in ("x", "weight")}
    return [
        Sample("bias", linear, inputs, parameters),
        Sample("bias, GeLU", functools.partial(linear, activation="gelu"), inputs, parameters),
        Sample("two weights", _two_weights, without_bias, ("weight",)),
    ]


def malformed() -> list[Malformed]:
    """Invalid calls, with the error expected."""
    return []


LAYERS = {"qkv": (768, 2304, None), "up, GeLU": (768, 3072, "gelu"), "down": (3072, 768, None)}


def _eager(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None) -> Tensor:
    out = functional.linear(x, weight, bias)
    return out if activation is None else functional.gelu(out)


def _benchmark(device: torch.device, rows: int, layer: str, dtype: torch.dtype, which: str) -> Benchmark:
    width, columns, activation = LAYERS[layer]
    x, weight, bias = (normal(device, *shape) for shape in ((rows, width), (columns, width), (columns,)))
    eager = partial(_eager, activation=activation)
    training = which != "forward"
    # Inductor packs constant weights too, if freezing is on; ours are packed before the timed calls.
    compiled = torch.compile(eager, dynamic=False, options={} if training else {"freezing": True})
    return Benchmark(
        partial(linear, activation=activation),
        [part.to(dtype) for part in (x, weight * width**-0.5, bias)],
        {"eager": Peer(eager), "torch.compile": Peer(compiled)},
        64 * torch.finfo(dtype).eps,
        dtype,
        which,
        normal(device, rows, columns, dtype=dtype),
        flops=2 * rows * width * columns * (3 if training else 1),
    )


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """The layers of BERT-base in inference and in training, compared with eager PyTorch and torch.compile."""
    on_gpu = device.type == "cuda"
    sizes = (16384,) if on_gpu else (32, 1024)
    dtypes = (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16)
    return [
        Plan(f"T {rows} {layer} {dtype_name(dtype)} {which}", partial(_benchmark, device, rows, layer, dtype, which))
        for rows, layer, dtype, which in product(sizes, LAYERS, dtypes, ("forward", "forward + backward"))
        # A CPU without BF16 units takes seconds for the peers' BF16 training.
        if on_gpu or which == "forward" or rows == 1024
    ]


CASES = OpCases("linear", samples, malformed, own_gpu_kernels=False, benchmarks=benchmarks)
