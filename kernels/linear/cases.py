"""The one description of linear for tools: see kernels/_common/cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from bert_fast.kernels._common.benchmarks import Benchmark, ModelCall, Peer, Plan, dtype_name, normal
from bert_fast.kernels._common.cases import LENGTHS, E, F, Lengths, Malformed, OpCases, Sample, malformed_calls, randn
from bert_fast.kernels._common.times import size_of_rows
from bert_fast.kernels.linear import linear
from bert_fast.kernels.linear.mistakes import MISTAKES


def _two_weights(x: Tensor, weight: Tensor, impl: str) -> Tensor:
    return linear(x, [weight[:100], weight[100:]], impl=impl)


def samples(lengths: Lengths = None) -> list[Sample]:
    """With a bias, with GeLU, and with a weight in two parts."""
    T = sum(LENGTHS if lengths is None else lengths)
    inputs = {"x": randn(T, E), "weight": randn(F, E, scale=E**-0.5), "bias": randn(F)}
    parameters = ("weight", "bias")
    ulps = (F / 24) ** 0.5  # F is the length of dx's sums
    without_bias = {name: inputs[name] for name in ("x", "weight")}
    return [
        Sample("bias", linear, inputs, parameters, float32_ulps=ulps),
        Sample("bias, GeLU", functools.partial(linear, activation="gelu"), inputs, parameters, float32_ulps=ulps),
        Sample("two weights", _two_weights, without_bias, ("weight",), float32_ulps=ulps),
    ]


def malformed() -> list[Malformed]:
    """Wrong shapes, dtypes and names; the weight as one and as several."""
    x, weight, bias = torch.randn(5, 24), torch.randn(16, 24), torch.randn(16)
    return malformed_calls(
        linear,
        {"x": x, "weight": weight, "bias": bias},
        {
            "x of one dimension": ({"x": x[0]}, ValueError, r"x has shape \(24,\); expected \(T, K\)"),
            "narrow weight": (
                {"weight": weight[:, 1:]},
                ValueError,
                r"weight has shape \(16, 23\); expected \(N, 24\)",
            ),
            "second weight of one dimension": (
                {"weight": [weight, weight[0]]},
                ValueError,
                r"weight\[1\] has shape \(24,\); expected \(N, 24\)",
            ),
            "no weight": ({"weight": []}, ValueError, "weight is empty"),
            "integer weight": (
                {"weight": weight.long()},
                TypeError,
                r"weight is torch\.int64; expected a floating-point tensor",
            ),
            "short bias": ({"bias": bias[1:]}, ValueError, r"bias has shape \(15,\); expected \(16,\)"),
            "unknown activation": (
                {"activation": "relu"},
                ValueError,
                "activation is 'relu'; expected None, 'gelu' or 'gelu_tanh'",
            ),
            "unknown impl": ({"impl": "fastest"}, ValueError, "impl is 'fastest'"),
        },
    )


LAYERS = {"qkv": (768, 2304, None), "up, GeLU": (768, 3072, "gelu"), "down": (3072, 768, None)}


def _eager(x: Tensor, weight: Tensor, bias: Tensor, *, activation: str | None) -> Tensor:
    out = functional.linear(x, weight, bias)
    return out if activation is None else functional.gelu(out)


def _benchmark(
    device: torch.device, rows: int, layer: tuple[int, int, str | None], dtype: torch.dtype, which: str
) -> Benchmark:
    width, columns, activation = layer
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
        size=size_of_rows(rows, columns),
    )


def in_model(device: torch.device, call: ModelCall) -> dict[str, Callable[[], Benchmark]]:
    """The layers that differ in their size; that of attention's output has the columns of `down`, and a quarter of its
    work."""
    layers: dict[str, tuple[int, int, str | None]] = {
        "qkv": (call.hidden, 3 * call.hidden, None),
        "up, GeLU": (call.hidden, call.intermediate, "gelu"),
        "down": (call.intermediate, call.hidden, None),
    }
    rows = sum(call.lengths)
    return {name: partial(_benchmark, device, rows, layer, call.dtype, call.which) for name, layer in layers.items()}


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """The layers of BERT-base in inference and in training, compared with eager PyTorch and torch.compile."""
    on_gpu = device.type == "cuda"
    sizes = (16384,) if on_gpu else (32, 1024)
    dtypes = (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16)
    return [
        Plan(
            f"T {rows} {layer} {dtype_name(dtype)} {which}",
            partial(_benchmark, device, rows, LAYERS[layer], dtype, which),
        )
        for rows, layer, dtype, which in product(sizes, LAYERS, dtypes, ("forward", "forward + backward"))
        # A CPU without BF16 units takes seconds for the peers' BF16 training.
        if on_gpu or which == "forward" or rows == 1024
    ]


CASES = OpCases("linear", samples, malformed, mistakes=MISTAKES, benchmarks=benchmarks, in_model=in_model)
