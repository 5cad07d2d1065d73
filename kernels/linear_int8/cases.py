"""The one description of linear_int8 for tools: see kernels/_common/cases.py."""

from __future__ import annotations

import copy
import functools
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.kernels._common.benchmarks import Benchmark, Peer, Plan, normal
from bert_fast.kernels._common.cases import LENGTHS, E, F, Lengths, Malformed, OpCases, Sample, malformed_calls, randn
from bert_fast.kernels.linear_int8 import Int8Weight, feed_forward_int8, linear_int8, quantize_weight
from bert_fast.kernels.linear_int8.mistakes import MISTAKES


def _call(x: Tensor, values: Tensor, scale: Tensor, bias: Tensor, **options: Any) -> Tensor:
    return linear_int8(x, Int8Weight(values, scale, values.sum(1).to(scale.dtype)), bias, **options)


def samples(lengths: Lengths = None) -> list[Sample]:
    """Every row has 0 and 255 sixteenths, so that quantizing it rounds nothing, in no dtype."""
    x = torch.randint(0, 256, (sum(LENGTHS if lengths is None else lengths), E)).double() / 16
    x[:, 0], x[:, 1] = 0.0, 255 / 16
    inputs = {
        "x": x,
        "values": torch.randint(-64, 65, (F, E), dtype=torch.int8),
        "scale": randn(F).abs() / 1000,
        "bias": randn(F),
    }
    gelu = functools.partial(_call, activation="gelu")
    result = [Sample(name, call, inputs, ("scale", "bias"), False) for name, call in (("bias", _call), ("GeLU", gelu))]
    return [*result, Sample("negative inputs", _call, {**inputs, "x": x - 4}, ("scale", "bias"), False)]


def malformed() -> list[Malformed]:
    """Wrong shapes, an input that requires a gradient; and of quantize_weight."""
    x, weight = torch.randn(5, 24), quantize_weight(torch.randn(16, 24))
    layers = malformed_calls(
        linear_int8,
        {"x": x, "weight": weight},
        {
            "narrow x": ({"x": x[:, 1:]}, ValueError, r"weight.values has shape \(16, 24\); expected \(N, 23\)"),
            "short bias": ({"bias": torch.randn(15)}, ValueError, r"bias has shape \(15,\); expected \(16,\)"),
            "range of 3": (
                {"input_range": torch.randn(3)},
                ValueError,
                r"input_range has shape \(3,\); expected \(2,\)",
            ),
            "x requires a gradient": ({"x": x.clone().requires_grad_()}, ValueError, "^x.* gradient"),
        },
    )
    weights = malformed_calls(
        quantize_weight,
        {"weight": torch.randn(2, 2)},
        {
            "NaN in the weight": ({"weight": torch.full((1, 2), torch.nan)}, ValueError, "expected finite numbers"),
            "limit of 128": ({"limit": 128}, ValueError, "limit is 128"),
        },
    )
    return layers + weights


LAYERS = {"qkv": (768, 2304), "down": (3072, 768), "feed-forward": (768, 3072)}


def _benchmark(device: torch.device, rows: int, layer: str) -> Benchmark:
    width, columns = LAYERS[layer]
    with torch.random.fork_rng():
        torch.manual_seed(0)  # the weights are no input: those of every benchmark are the same
        first = nn.Linear(width, columns)
        layers: list[nn.Module] = [first]
        if layer == "feed-forward":
            layers += [nn.GELU(), nn.Linear(columns, width, bias=False)]
    eager = nn.Sequential(*layers).to(device).eval()
    weights = [quantize_weight(module.weight) for module in layers if isinstance(module, nn.Linear)]
    bias = first.bias.detach()
    x = normal(device, rows, width)

    def call(x: Tensor, *, impl: str) -> Tensor:
        if len(weights) == 1:
            return linear_int8(x, weights[0], bias, impl=impl)
        return feed_forward_int8(x, weights[0], bias, weights[1], impl=impl)

    dynamic = torch.ao.quantization.quantize_dynamic(eager, {nn.Linear}, dtype=torch.qint8)
    return Benchmark(
        call,
        (x,),
        {"eager fp32": Peer(eager), "torch dynamic int8": Peer(dynamic, precision="int8")},
        0.05,  # of INT8, compared with the weights before they were quantized
        exact=lambda: copy.deepcopy(eager).double()(x.double()).detach(),
        precision="int8",
        flops=2 * rows * width * columns * len(weights),
    )


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """BERT-base's layers and its feed-forward block, compared with FP32 and torch's dynamic INT8; CPU only."""
    sizes = () if device.type == "cuda" else (32, 1024)
    return [
        Plan(f"T {rows} {layer} forward", partial(_benchmark, device, rows, layer))
        for rows, layer in product(sizes, LAYERS)
    ]


CASES = OpCases("linear_int8", samples, malformed, mistakes=MISTAKES, benchmarks=benchmarks)
