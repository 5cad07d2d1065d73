"""The one description of embedding_layer_norm for tools: see kernels/_common/cases.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bert_fast.kernels._common.benchmarks import Benchmark, Plan, dtype_name, eager_and_compiled, normal, rng_state
from bert_fast.kernels._common.cases import (
    DROPOUT,
    DTYPES,
    LENGTHS,
    TOKENS,
    E,
    Lengths,
    Malformed,
    OpCases,
    Sample,
    V,
    invalid_ids,
    launchers,
    malformed_calls,
    meta,
    randn,
    with_dropout,
)
from bert_fast.kernels.embedding_layer_norm import embedding_layer_norm
from bert_fast.kernels.embedding_layer_norm.mistakes import MASK_PROBE, MISTAKES


def samples(lengths: Lengths = None) -> list[Sample]:
    """Without and with dropout, and with an eps that shows where it is added.

    Ids repeat, so that rows of the tables' gradients are sums.
    """
    sizes = LENGTHS[:4] if lengths is None else lengths  # a sequence's end only sets positions
    T, vocabulary = sum(sizes), V if lengths is None else 70
    inputs = {
        "input_ids": torch.randint(0, vocabulary, (T,)),
        "token_type_ids": torch.randint(0, 2, (T,)),
        "position_ids": torch.cat([torch.arange(length) for length in sizes]),
        "word": randn(vocabulary, E),
        "token_type": randn(2, E),
        "position": randn(max(sizes), E),
        "weight": 1 + randn(E, scale=0.1),
        "bias": randn(E, scale=0.1),
    }
    sample = Sample("", embedding_layer_norm, inputs, parameters=("weight", "bias"))
    large_eps = replace(sample, name="eps 0.5", call=partial(embedding_layer_norm, eps=0.5))
    return [*with_dropout(sample), large_eps]


def malformed() -> list[Malformed]:
    """Ids outside their tables, wrong shapes, dtypes and devices, numbers out of range."""
    ids, row = torch.arange(5), torch.randn(24)
    word, position = torch.randn(97, 24), torch.randn(53, 24)
    valid = {
        "input_ids": ids,
        "token_type_ids": ids % 2,
        "position_ids": ids,
        "word": word,
        "token_type": word[:2],
        "position": position,
        "weight": row,
        "bias": row,
    }
    return malformed_calls(
        embedding_layer_norm,
        valid,
        {
            "id beyond the vocabulary": (
                {"input_ids": ids + 93},
                ValueError,
                r"input_ids has values from 93 to 97; expected 0 to 96 \(word has 97 rows\)",
            ),
            "negative position": (
                {"position_ids": ids - 1},
                ValueError,
                r"position_ids has values from -1 to 3; expected 0 to 52 \(position has 53",
            ),
            "third segment": (
                {"token_type_ids": torch.full((5,), 2)},
                ValueError,
                "token_type_ids has values from 2 to 2; expected 0 to 1",
            ),
            "ids of floats": (
                {"input_ids": ids.float()},
                TypeError,
                r"input_ids is torch\.float32; expected torch\.int64 or torch\.int32",
            ),
            "ids of two dimensions": (
                {"input_ids": ids[None]},
                ValueError,
                r"input_ids has shape \(1, 5\); expected \(T,\)",
            ),
            "fewer segments than ids": (
                {"token_type_ids": ids[1:] % 2},
                ValueError,
                r"token_type_ids has shape \(4,\); expected \(5,\)",
            ),
            "narrow position table": (
                {"position": position[:, 1:]},
                ValueError,
                r"position has shape \(53, 23\); expected \(rows, 24\)",
            ),
            "table of another dtype": (
                {"token_type": word[:2].bfloat16()},
                TypeError,
                r"token_type is torch\.bfloat16; expected torch\.float32",
            ),
            "short bias": ({"bias": row[1:]}, ValueError, r"bias has shape \(23,\); expected \(24,\)"),
            "weight on another device": ({"weight": row.to("meta")}, ValueError, "weight is on meta; expected cpu"),
            "padding_idx beyond the vocabulary": (
                {"padding_idx": 97},
                ValueError,
                "padding_idx is 97; expected None or a row of word, 0 to 96",
            ),
            "negative dropout_p": ({"dropout_p": -0.1}, ValueError, r"dropout_p is -0\.1; expected 0 or a probability"),
            "negative eps": ({"eps": -1.0}, ValueError, r"eps is -1\.0; expected a positive number"),
        },
    )


def launches() -> None:
    """FP32 tables under autocast at the widths of four tiles, all dtypes and options at 768, the widest tiles."""
    triton = launchers("embedding_layer_norm")
    state, statistics = meta(2, dtype=torch.int64), meta(TOKENS)

    def both(width: int, table: torch.dtype, out: torch.dtype, dropout_p: float = DROPOUT, words: int = 30522) -> None:
        # Up to 32767 rows of all tables the tokens are sorted by keys of 16 bits.
        ids = [meta(TOKENS, dtype=torch.int64 if words < 2**15 else torch.int32)] * 3
        tables = [meta(rows, width, dtype=table) for rows in (words, 2, 512)]
        weight, dout = meta(width), meta(TOKENS, width, dtype=out)
        triton.embedding_layer_norm_fwd(*ids, *tables, weight, weight, dropout_p, 1e-12, 0, state, out)
        triton.embedding_layer_norm_bwd(dout, *ids, *tables, weight, statistics, statistics, dropout_p, 0, state)

    for width in (128, 384, 768, 1024):
        both(width, torch.float32, torch.bfloat16)
    for dtype in DTYPES:
        both(768, dtype, dtype)
    both(768, torch.float32, torch.bfloat16, 0.0, words=119547)
    for width in (4096, 8192):
        both(width, torch.float32, torch.float32)


def hostile(operators: Any, device: str) -> list[Callable[[], Any]]:
    """Ids outside every table."""
    tables = [torch.randn(rows, 48, device=device) for rows in (31, 2, 16)]
    ids = [invalid_ids(len(table), device) for table in tables]
    weight, dout = torch.randn(48, device=device), torch.randn(len(ids[0]), 48, device=device)
    state = rng_state(torch.device(device))

    def both() -> None:
        _, mean, rstd = operators.embedding_layer_norm_fwd(
            *ids, *tables, weight, weight, DROPOUT, 1e-12, 0, state, torch.float32
        )
        operators.embedding_layer_norm_bwd(dout, *ids, *tables, weight, mean, rstd, DROPOUT, 0, state)

    return [both]


def _eager(dtype: torch.dtype, dropout_p: float, *inputs: Tensor) -> Tensor:
    word, types, position, weight, bias, ids, kinds, places = inputs
    summed = (
        functional.embedding(ids, word) + functional.embedding(kinds, types) + functional.embedding(places, position)
    )
    return functional.dropout(functional.layer_norm(summed, weight.shape, weight, bias, 1e-12).to(dtype), dropout_p)


def _benchmark(
    device: torch.device, tokens: int, hidden: int, words: int, dtype: torch.dtype, which: str, dropout_p: float
) -> Benchmark:
    stored = torch.float32 if device.type == "cuda" else dtype
    tables = [normal(device, rows, hidden, dtype=stored) for rows in (words, 2, 512)]
    ids = [torch.randint(0, rows, (tokens,), device=device) for rows in (words, 2)]
    ids.append(torch.arange(tokens, device=device) % 512)
    parameters = [normal(device, hidden, dtype=stored) for _ in range(2)]
    dout = normal(device, tokens, hidden, dtype=dtype)
    state = rng_state(device) if dropout_p else None

    def call(*inputs: Tensor, impl: str) -> Tensor:
        low = stored != dtype and inputs[0].dtype != torch.float64
        with torch.autocast(device.type, dtype, enabled=low):
            return embedding_layer_norm(*inputs[5:], *inputs[:5], dropout_p=dropout_p, rng_state=state, impl=impl)

    # A word's row for each token, the small tables once, and out; again the rows and dout, and the tables' gradients.
    rows = (tokens * hidden + tables[1].numel() + tables[2].numel()) * tables[0].element_size()
    forward, backward = rows + dout.nbytes, rows + dout.nbytes + sum(table.nbytes for table in tables)
    return Benchmark(
        call,
        (*tables, *parameters, *ids),
        eager_and_compiled(partial(_eager, dtype, dropout_p), comparable=not dropout_p),
        16 * torch.finfo(dtype).eps,
        dtype,
        which,
        dout,
        traffic={"forward": forward, "backward": backward}.get(which, forward + backward),
    )


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """Compared with eager PyTorch and torch.compile; on a GPU from FP32 tables to BF16, as under autocast."""
    if device.type == "cuda":
        widths = ((16384, 1024), (8192, 768)) if quick else tuple(product((16384, 8192), (1024, 768)))
        sizes = tuple((tokens, hidden, 30522) for tokens, hidden in widths)
        dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
        passes: tuple[tuple[str, float], ...] = (("forward", 0.0), ("backward", 0.0), ("forward", DROPOUT))
    else:
        sizes = ((1024, 256, 8192), (1024, 768, 30522))
        dtypes = (torch.float32, torch.bfloat16)
        passes = (("forward", 0.0), ("forward + backward", 0.0))
    return [
        Plan(
            f"({tokens}, {hidden}) V {words} {dtype_name(dtype)} {which}" + ", dropout" * bool(dropout_p),
            partial(_benchmark, device, tokens, hidden, words, dtype, which, dropout_p),
        )
        for (tokens, hidden, words), dtype, (which, dropout_p) in product(sizes, dtypes, passes)
    ]


CASES = OpCases(
    "embedding_layer_norm",
    samples,
    malformed,
    hostile=hostile,
    launches=launches,
    mistakes=MISTAKES,
    mask_probe=MASK_PROBE,
    benchmarks=benchmarks,
)
