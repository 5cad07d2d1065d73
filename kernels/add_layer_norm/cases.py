"""The one description of add_layer_norm for tools: see kernels/_common/cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
    rng_state,
)
from bert_fast.kernels._common.cases import (
    DROPOUT,
    DTYPES,
    LENGTHS,
    TOKENS,
    WIDTHS,
    E,
    Lengths,
    Malformed,
    OpCases,
    Sample,
    launchers,
    malformed_calls,
    meta,
    randn,
    with_dropout,
)
from bert_fast.kernels._common.times import size_of_rows
from bert_fast.kernels.add_layer_norm import add_layer_norm
from bert_fast.kernels.add_layer_norm.mistakes import MASK_PROBE, MISTAKES
from bert_fast.kernels.add_layer_norm.peers import peers as packages


def samples(lengths: Lengths = None) -> list[Sample]:
    """With every optional argument, without and with dropout, and with an eps that shows where it is added."""
    T = sum(LENGTHS if lengths is None else lengths)
    inputs = {
        "x": randn(T, E),
        "residual": randn(T, E),
        "weight": 1 + randn(E, scale=0.1),
        "bias": randn(E, scale=0.1),
        "x_bias": randn(E, scale=0.1),
    }
    sample = Sample("", add_layer_norm, inputs, parameters=("weight", "bias", "x_bias"))
    large_eps = replace(sample, name="eps 0.5", call=partial(add_layer_norm, eps=0.5))
    return [*with_dropout(sample), large_eps]


def malformed() -> list[Malformed]:
    """Each tensor of another shape, dtype or device, each number out of range."""
    x, row, state = torch.randn(5, 24), torch.randn(24), torch.zeros(2, dtype=torch.int64)
    valid = {"x": x, "residual": x, "weight": row, "bias": row, "x_bias": row}
    return malformed_calls(
        add_layer_norm,
        valid,
        {
            "x of one dimension": ({"x": row}, ValueError, r"x has shape \(24,\); expected \(T, E\)"),
            "integer x": ({"x": x.long()}, TypeError, r"x is torch\.int64; expected a floating-point tensor"),
            "list for x": ({"x": x.tolist()}, TypeError, r"x is list; expected a torch\.Tensor"),
            "short residual": ({"residual": x[1:]}, ValueError, r"residual has shape \(4, 24\); expected \(5, 24\)"),
            "residual of another dtype": (
                {"residual": x.bfloat16()},
                TypeError,
                r"residual is torch\.bfloat16; expected torch\.float32, the dtype of the first",
            ),
            "weight on another device": ({"weight": row.to("meta")}, ValueError, "weight is on meta; expected cpu"),
            "short bias": ({"bias": row[1:]}, ValueError, r"bias has shape \(23,\); expected \(24,\)"),
            "short x_bias": ({"x_bias": row[1:]}, ValueError, r"x_bias has shape \(23,\); expected \(24,\)"),
            "everything dropped": (
                {"dropout_p": 1.0},
                ValueError,
                r"dropout_p is 1\.0; expected 0 or a probability from 1/512 to 511/512",
            ),
            "eps of 0": ({"eps": 0.0}, ValueError, r"eps is 0\.0; expected a positive number"),
            "rng_state of 3": (
                {"dropout_p": DROPOUT, "rng_state": torch.zeros(3, dtype=torch.int64)},
                ValueError,
                r"rng_state has shape \(3,\); expected \(2,\)",
            ),
            "rng_state of another dtype": (
                {"dropout_p": DROPOUT, "rng_state": state.int()},
                TypeError,
                r"rng_state is torch\.int32; expected torch\.int64",
            ),
            "unknown impl": ({"impl": "fastest"}, ValueError, "impl is 'fastest'"),
        },
    )


def launches() -> None:
    """Each width in BF16, every dtype and option at 768, the widest tiles in BF16 and FP32."""
    triton = launchers("add_layer_norm")
    state, statistics = meta(2, dtype=torch.int64), meta(TOKENS)

    def both(
        width: int, dtype: torch.dtype, parameters: torch.dtype, dropout_p: float, has_x_bias: bool = True
    ) -> None:
        x, weight = meta(TOKENS, width, dtype=dtype), meta(width, dtype=parameters)
        x_bias = weight if has_x_bias else None
        triton.add_layer_norm_fwd(x, x, weight, weight, x_bias, dropout_p, 1e-12, state)
        triton.add_layer_norm_bwd(x, x, x, weight, x_bias, statistics, statistics, dropout_p, state)

    for width, dropout_p in product(WIDTHS, (0.0, DROPOUT)):
        both(width, torch.bfloat16, torch.float32, dropout_p)
    for dtype in DTYPES:
        both(768, dtype, dtype, DROPOUT)
    both(768, torch.bfloat16, torch.float32, DROPOUT, has_x_bias=False)
    for width, dtype in product((2048, 4096, 8192), (torch.float32, torch.bfloat16)):
        both(width, dtype, torch.float32, DROPOUT)


def extra(impl: str, device: str) -> None:
    """Rows wider than one program, for which a separate kernel computes the gradient of x_bias."""
    x, residual = (torch.randn(5, 8100, device=device, requires_grad=True) for _ in range(2))
    weight, bias, x_bias = (torch.randn(8100, device=device, requires_grad=True) for _ in range(3))
    state = rng_state(torch.device(device))
    out = add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=DROPOUT, rng_state=state, impl=impl)
    out.sum().backward()


def _eager(dropout_p: float, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return functional.layer_norm(
        residual + functional.dropout(x + x_bias, dropout_p), weight.shape, weight, bias, 1e-12
    )


def _benchmark(
    device: torch.device, rows: int, cols: int, dtype: torch.dtype, which: str, dropout_p: float
) -> Benchmark:
    x, residual, dout = (normal(device, rows, cols, dtype=dtype) for _ in range(3))
    parameters = [normal(device, cols, dtype=dtype) for _ in range(3)]
    state = rng_state(device) if dropout_p else None

    def call(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor, *, impl: str) -> Tensor:
        return add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=dropout_p, rng_state=state, impl=impl)

    given = (x, residual, *parameters)
    peers = eager_and_compiled(partial(_eager, dropout_p), inputs=given, comparable=not dropout_p)
    if device.type == "cuda":
        peers |= packages(dropout_p, given)
    # x, residual, out; x, residual, dout, dx, dresidual
    tensors = {"forward": 3, "backward": 5, "forward + backward": 8}[which]
    return Benchmark(
        call,
        (x, residual, *autocast_parameters(parameters)),
        peers,
        16 * torch.finfo(dtype).eps,
        dtype,
        which,
        dout,
        traffic=x.nbytes * tensors,
        size=size_of_rows(rows, cols, dropout_p),
    )


def in_model(device: torch.device, call: ModelCall) -> dict[str, Callable[[], Benchmark]]:
    """After attention and after the layer."""
    make = partial(_benchmark, device, sum(call.lengths), call.hidden, call.dtype, call.which, call.dropout_p)
    return {"residual": make}


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """Compared with eager PyTorch and torch.compile, whose parameters have the dtype of x."""
    if device.type == "cuda":
        sizes = ((16384, 1024), (8192, 768)) if quick else tuple(product((16384, 8192), (1024, 768)))
        dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
        passes = [(which, dropout_p) for dropout_p in (0.0, DROPOUT) for which in ("forward", "backward")]
    else:
        sizes = ((128, 768), (1024, 768), (2048, 1024))
        dtypes = (torch.float32, torch.bfloat16)
        passes = [("forward", 0.0), ("forward + backward", 0.0), ("forward + backward", DROPOUT)]
    return [
        Plan(
            f"({rows}, {cols}) {dtype_name(dtype)} {which}" + ", dropout" * bool(dropout_p),
            partial(_benchmark, device, rows, cols, dtype, which, dropout_p),
        )
        for (rows, cols), dtype, (which, dropout_p) in product(sizes, dtypes, passes)
    ]


CASES = OpCases(
    "add_layer_norm",
    samples,
    malformed,
    launches=launches,
    extra=extra,
    mistakes=MISTAKES,
    mask_probe=MASK_PROBE,
    benchmarks=benchmarks,
    in_model=in_model,
)
