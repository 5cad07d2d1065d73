"""The one description of padding for tools: see kernels/_common/cases.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.benchmarks import Benchmark, Peer, Plan, dtype_name, evenly_spaced, half_filled, normal
from bert_fast.kernels._common.cases import (
    DTYPES,
    TOKENS,
    WIDTHS,
    E,
    Lengths,
    Malformed,
    OpCases,
    Sample,
    invalid_ids,
    launchers,
    malformed_calls,
    meta,
    randn,
)
from bert_fast.kernels.padding import pad, unpad


def _unpad_pad(x: Tensor, attention_mask: Tensor, impl: str) -> tuple[Tensor, Tensor]:
    packed = unpad(x, attention_mask, impl=impl)
    return packed.x, pad(packed.x, packed.indices, x.shape[0], x.shape[1], impl=impl)


def samples(lengths: Lengths = None) -> list[Sample]:
    """A mask with holes, and with padding on both sides."""
    B, S = (7, 65) if lengths is None else (len(lengths), max(lengths))
    return [Sample("unpad, pad", _unpad_pad, {"x": randn(B, S, E), "attention_mask": torch.rand(B, S) < 0.7})]


def malformed() -> list[Malformed]:
    """Masks that are no masks, indices that unpad does not return."""
    x, mask = torch.randn(3, 4, 5), torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]])
    additive = torch.zeros(3, 4).masked_fill(mask == 0, float("-inf"))
    packed, indices = x[mask.bool()], mask.flatten().nonzero().squeeze(1)
    unpads = malformed_calls(
        unpad,
        {"x": x, "attention_mask": mask},
        {
            "x of one dimension": ({"x": x[0, 0]}, ValueError, r"x has shape \(5,\); expected \(B, S, ...\)"),
            "transposed mask": (
                {"attention_mask": mask.t()},
                ValueError,
                r"attention_mask has shape \(4, 3\); expected \(3, 4\)",
            ),
            "mask of other numbers": (
                {"attention_mask": mask * torch.tensor([3, 2, 2, 2])},
                ValueError,
                r"attention_mask has the values 2, 3; expected only 1 .* and 0",
            ),
            "additive mask": (
                {"attention_mask": additive},
                ValueError,
                "attention_mask has the values -inf; .*additive mask",
            ),
            "mask of NaN": (
                {"attention_mask": torch.full((3, 4), torch.nan)},
                ValueError,
                "attention_mask has the values nan",
            ),
            "list for the mask": (
                {"attention_mask": mask.tolist()},
                TypeError,
                r"attention_mask is list; expected a torch\.Tensor",
            ),
        },
    )
    pads = malformed_calls(
        pad,
        {"x": packed, "indices": indices, "batch": 3, "seqlen": 4},
        {
            "int32 indices": ({"indices": indices.int()}, TypeError, r"indices is torch\.int32; expected torch\.int64"),
            "fewer tokens than indices": (
                {"x": packed[1:]},
                ValueError,
                rf"indices has shape \({len(indices)},\); expected \({len(indices) - 1},\)",
            ),
            "indices beyond the batch": (
                {"batch": 2},
                ValueError,
                "indices runs from 0 to 11; expected it to rise strictly within 0 to 7",
            ),
            "decreasing indices": ({"indices": indices.flip(0)}, ValueError, "rise strictly"),
            "negative batch": ({"batch": -1}, ValueError, "batch is -1 and seqlen 4"),
        },
    )
    return unpads + pads


def launches() -> None:
    """Every width of the integers that rows are moved in: ids, hidden states, and rows of 6 and 3 bytes."""
    triton = launchers("padding")
    for seqlen in (128, 199, 512, 8192):
        mask = meta(32, seqlen, dtype=torch.bool)
        ends, block = triton.count_tokens(mask)
        triton.write_indices(mask, ends, TOKENS, block)  # unpad_indices without reading T
    rows = [(torch.int64, ()), (torch.float16, (3,)), (torch.int8, (3,))]
    rows += [(dtype, (E,)) for dtype in DTYPES[:2] for E in WIDTHS] + [(torch.float32, (33,))]
    for dtype, shape in rows:
        x, indices = meta(TOKENS, *shape, dtype=dtype), meta(TOKENS, dtype=torch.int64)
        triton.gather_rows(x, indices)
        triton.scatter_rows(x, indices, 2 * TOKENS)


def hostile(operators: Any, device: str) -> list[Callable[[], Any]]:
    """Indices outside the rows."""
    indices = invalid_ids(80, device)
    x, padded = (torch.randn(rows, 48, device=device) for rows in (len(indices), 80))
    return [
        lambda: operators.gather_rows(padded, indices),
        lambda: operators.scatter_rows(x, indices, 80),
        lambda: operators.scatter_rows(x, indices.flip(0), 3),
    ]


SEQLEN = 512


def _eager(x: Tensor, mask: Tensor) -> Tensor:
    indices = mask.flatten().nonzero().squeeze(1)
    return torch.zeros_like(x).flatten(0, 1).index_copy(0, indices, x.flatten(0, 1)[indices]).view_as(x)


def _call(x: Tensor, mask: Tensor, *, impl: str) -> Tensor:
    return _unpad_pad(x, mask, impl)[1]


def _mask(lengths: list[int], device: torch.device) -> Tensor:
    return (torch.arange(SEQLEN) < torch.tensor(lengths)[:, None]).to(device)


def _unpad_and_pad(device: torch.device, lengths: list[int], hidden: int, dtype: torch.dtype, which: str) -> Benchmark:
    mask = _mask(lengths, device)
    x, dout = (normal(device, len(lengths), SEQLEN, hidden, dtype=dtype) for _ in range(2))
    real = sum(lengths) * hidden * x.element_size()
    return Benchmark(
        _call,
        (x, mask),
        {"eager": Peer(_eager)},
        0.0,
        dtype,
        which,
        dout,
        traffic=(3 * real + x.nbytes) * (1 if which == "forward" else 2),  # read real, write, read; write all
        graph=False,  # `unpad` waits for the number of tokens, and so does the peer
    )


def _pad_alone(device: torch.device, lengths: list[int], hidden: int, dtype: torch.dtype) -> Benchmark:
    shape = (len(lengths), SEQLEN)
    indices = _mask(lengths, device).flatten().nonzero().squeeze(1)
    x = normal(device, sum(lengths), hidden, dtype=dtype)

    def eager(x: Tensor, indices: Tensor) -> Tensor:
        return x.new_zeros(math.prod(shape), hidden).index_copy(0, indices, x).view(*shape, hidden)

    def call(x: Tensor, indices: Tensor, *, impl: str) -> Tensor:
        return pad(x, indices, *shape, impl=impl)

    traffic = x.nbytes + math.prod(shape) * hidden * x.element_size()
    return Benchmark(call, (x, indices), {"eager": Peer(eager)}, 0.0, dtype, traffic=traffic)


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """Compared with eager PyTorch: boolean indexing and index assignment."""
    on_gpu = device.type == "cuda"
    lengths = half_filled(64, SEQLEN) if on_gpu else evenly_spaced(8, 4, SEQLEN)
    widths = ((1024,) if quick else (768, 1024)) if on_gpu else (768,)
    sizes = list(product(widths, (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16)))
    names = [f"({len(lengths)}, {SEQLEN}, {hidden}) half filled {dtype_name(dtype)}" for hidden, dtype in sizes]
    plans = [
        Plan(f"{name} unpad + pad{suffix}", partial(_unpad_and_pad, device, lengths, *size, which))
        for name, size in zip(names, sizes, strict=True)
        for suffix, which in (("", "forward"), (", forward + backward", "forward + backward"))
    ]
    if on_gpu:
        plans += [
            Plan(f"{name} pad", partial(_pad_alone, device, lengths, *size))
            for name, size in zip(names, sizes, strict=True)
        ]
    return plans


CASES = OpCases("padding", samples, malformed, hostile=hostile, launches=launches, benchmarks=benchmarks)
