"""The one description of bias_gelu for tools: see kernels/_common/cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional

from bert_fast.kernels._common.benchmarks import (
    Benchmark,
    ModelCall,
    Plan,
    autocast_parameters,
    dtype_name,
    eager_and_compiled,
    normal,
)
from bert_fast.kernels._common.cases import (
    DTYPES,
    LENGTHS,
    TOKENS,
    F,
    Lengths,
    Malformed,
    OpCases,
    Sample,
    launchers,
    malformed_calls,
    meta,
    randn,
)
from bert_fast.kernels._common.times import size_of_rows
from bert_fast.kernels.bias_gelu import bias_gelu
from bert_fast.kernels.bias_gelu.mistakes import MISTAKES


def samples(lengths: Lengths = None) -> list[Sample]:
    """Both forms of GeLU."""
    inputs = {"x": randn(sum(LENGTHS if lengths is None else lengths), F, scale=2.0), "bias": randn(F)}
    return [
        Sample("erf", bias_gelu, inputs, parameters=("bias",)),
        Sample("tanh", functools.partial(bias_gelu, approximate="tanh"), inputs, parameters=("bias",)),
    ]


def malformed() -> list[Malformed]:
    """Wrong shapes, dtypes and names."""
    x, bias = torch.randn(5, 24), torch.randn(24)
    return malformed_calls(
        bias_gelu,
        {"x": x, "bias": bias},
        {
            "x of one dimension": ({"x": x[0]}, ValueError, r"x has shape \(24,\); expected \(T, F\)"),
            "integer x": ({"x": x.long()}, TypeError, r"x is torch\.int64; expected a floating-point tensor"),
            "short bias": ({"bias": bias[1:]}, ValueError, r"bias has shape \(23,\); expected \(24,\)"),
            "unknown form": ({"approximate": "erf"}, ValueError, "approximate is 'erf'; expected 'none' or 'tanh'"),
            "unknown impl": ({"impl": "fastest"}, ValueError, "impl is 'fastest'"),
        },
    )


def launches() -> None:
    """Every dtype and both forms of GeLU."""
    triton = launchers("bias_gelu")
    for dtype, tanh in product(DTYPES, (False, True)):
        x, bias = meta(TOKENS, 3072, dtype=dtype), meta(3072)
        triton.bias_gelu_fwd(x, bias, tanh)
        triton.bias_gelu_bwd(x, x, bias, tanh)


def _eager(x: Tensor, bias: Tensor) -> Tensor:
    return functional.gelu(x + bias)


def _benchmark(device: torch.device, rows: int, cols: int, dtype: torch.dtype, which: str) -> Benchmark:
    x, bias, dout = (normal(device, *shape, dtype=dtype) for shape in ((rows, cols), (cols,), (rows, cols)))
    return Benchmark(
        bias_gelu,
        (x, *autocast_parameters([bias])),
        eager_and_compiled(_eager, inputs=(x, bias)),
        8 * torch.finfo(dtype).eps,
        dtype,
        which,
        dout,
        traffic=x.nbytes * {"forward": 2, "backward": 3, "forward + backward": 5}[which],  # x, out; dout, x, dx
        size=size_of_rows(rows, cols),
    )


def in_model(device: torch.device, call: ModelCall) -> dict[str, Callable[[], Benchmark]]:
    """The activation of the feed-forward block."""
    return {"GeLU": partial(_benchmark, device, sum(call.lengths), call.intermediate, call.dtype, call.which)}


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """Compared with eager PyTorch and torch.compile, whose bias has the dtype of x."""
    if device.type == "cuda":
        sizes = ((16384, 4096), (8192, 3072)) if quick else tuple(product((16384, 8192), (4096, 3072)))
        dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
        passes = ("forward", "backward")
    else:
        sizes = ((128, 3072), (1024, 1024), (1024, 3072))
        dtypes = (torch.float32, torch.bfloat16)
        passes = ("forward", "forward + backward")
    return [
        Plan(f"({rows}, {cols}) {dtype_name(dtype)} {which}", partial(_benchmark, device, rows, cols, dtype, which))
        for (rows, cols), dtype, which in product(sizes, dtypes, passes)
    ]


CASES = OpCases(
    "bias_gelu", samples, malformed, launches=launches, mistakes=MISTAKES, benchmarks=benchmarks, in_model=in_model
)
