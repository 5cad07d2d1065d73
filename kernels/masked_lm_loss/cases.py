"""The one description of masked_lm_loss for tools: see kernels/_common/cases.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bert_fast.kernels._common.benchmarks import Benchmark, Peer, Plan, autocast_parameters, dtype_name, first, normal
from bert_fast.kernels._common.cases import (
    DTYPES,
    LENGTHS,
    TOKENS,
    WIDTHS,
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
)
from bert_fast.kernels.masked_lm_loss import masked_lm_loss
from bert_fast.kernels.masked_lm_loss.mistakes import MISTAKES

# A gradient has four matrix products in sequence: dense, decoder, decoder transposed, and dense transposed or sums in
# LayerNorm. Each adds about one unit: sqrt(K / 24) is 2.3 for the 130 terms of an interpreted case, and the largest
# value is two or three times the typical one. (With one unit 4 of 2,880 comparisons were over, by up to 1.6 units, on
# 20 seeds in Triton and 40 on the CPU.)
FLOAT32_ULPS = 4.0


def _loss(**arguments: Any) -> Tensor:
    return masked_lm_loss(**arguments).loss


def samples(lengths: Lengths = None) -> list[Sample]:
    """15 % of the rows have labels, at least one; plain cross entropy and with both regularisers."""
    T, width, vocabulary = (sum(LENGTHS), E, V) if lengths is None else (sum(lengths), 24, 70)
    labelled = torch.rand(T) < 0.15
    if not labelled.any():
        labelled[:1] = True
    inputs = {
        "hidden": randn(T, width),
        "labels": torch.where(labelled, torch.randint(0, vocabulary, (T,)), -100),
        "dense_weight": randn(width, width, scale=width**-0.5),
        "dense_bias": randn(width, scale=0.1),
        "norm_weight": 1 + randn(width, scale=0.1),
        "norm_bias": randn(width, scale=0.1),
        "decoder_weight": randn(vocabulary, width, scale=width**-0.5),
        "decoder_bias": randn(vocabulary, scale=0.1),
    }
    parameters = tuple(name for name in inputs if name not in ("hidden", "labels"))
    sample = functools.partial(
        Sample, inputs=inputs, parameters=parameters, mean_of=int(labelled.sum()), float32_ulps=FLOAT32_ULPS
    )
    return [
        sample("15 % masked", _loss),
        sample("label smoothing, z-loss", functools.partial(_loss, label_smoothing=0.1, z_loss=1e-3, eps=0.1)),
    ]


def malformed() -> list[Malformed]:
    """Labels outside the vocabulary, wrong shapes and dtypes, numbers out of range."""
    square, row, decoder = torch.randn(8, 8), torch.randn(8), torch.randn(31, 8)
    valid = {
        "hidden": square[:4],
        "labels": torch.tensor([0, 30, -100, 4]),
        "dense_weight": square,
        "dense_bias": row,
        "norm_weight": row,
        "norm_bias": row,
        "decoder_weight": decoder,
        "decoder_bias": decoder[:, 0],
    }
    labels, smoothing = valid["labels"], "expected a number from 0 to below 1"
    return malformed_calls(
        masked_lm_loss,
        valid,
        {
            "labels outside the vocabulary": (
                {"labels": torch.tensor([31, -1, -100, 4])},
                ValueError,
                r"labels has 2 values outside the vocabulary \(from -1 to 31\); expected 0 to 30, or -100 ",
            ),
            "int32 labels": ({"labels": labels.int()}, TypeError, r"labels is torch\.int32; expected torch\.int64"),
            "fewer labels than rows": ({"labels": labels[1:]}, ValueError, r"labels has shape \(3,\); expected \(4,\)"),
            "integer hidden": (
                {"hidden": square[:4].long()},
                TypeError,
                r"hidden is torch\.int64; expected a floating-point tensor",
            ),
            "short dense_weight": (
                {"dense_weight": square[1:]},
                ValueError,
                r"dense_weight has shape \(7, 8\); expected \(8, 8\)",
            ),
            "short norm_bias": ({"norm_bias": row[1:]}, ValueError, r"norm_bias has shape \(7,\); expected \(8,\)"),
            "narrow decoder_weight": (
                {"decoder_weight": decoder[:, 1:]},
                ValueError,
                r"decoder_weight has shape \(31, 7\); expected \(V, 8\)",
            ),
            "short decoder_bias": (
                {"decoder_bias": decoder[1:, 0]},
                ValueError,
                r"decoder_bias has shape \(30,\); expected \(31,\)",
            ),
            **{
                f"label_smoothing {value}": ({"label_smoothing": value}, ValueError, f"is {value}; {smoothing}")
                for value in (-0.1, 1.0, float("nan"))
            },
            **{
                f"z_loss {value}": ({"z_loss": value}, ValueError, f"z_loss is {value}; expected")
                for value in (-1e-4, float("inf"), float("nan"))
            },
        },
    )


def launches() -> None:
    """Each width in BF16, every dtype at 768; the products' tiles are the same at every width."""
    triton = launchers("masked_lm_loss")
    tokens, words = 4 * TOKENS, 30522  # several chunks in every dtype
    labels, settings = meta(tokens, dtype=torch.int64), (1e-12, -100, 0.1, 1e-4)
    for width, dtype in dict.fromkeys([*product(WIDTHS, (torch.bfloat16,)), *product((768,), DTYPES)]):
        shapes = ((width, width), (width,), (width,), (width,), (words, width), (words,))
        tensors = (meta(tokens, width, dtype=dtype), labels, *(meta(*shape) for shape in shapes))
        triton.masked_lm_loss_fwd(*tensors, *settings, False)
        *_, gradients = triton.masked_lm_loss_fwd(*tensors, *settings, True)
        triton.masked_lm_loss_bwd(meta(), gradients)


def hostile(operators: Any, device: str) -> list[Callable[[], Any]]:
    """Labels outside the vocabulary."""
    E, V, labels = 48, 31, invalid_ids(31, device)
    shapes = ((E, E), (E,), (E,), (E,), (V, E), (V,))
    hidden, *parameters = (torch.randn(shape, device=device) for shape in ((len(labels), E), *shapes))

    def both() -> None:
        loss, *_, gradients = operators.masked_lm_loss_fwd(hidden, labels, *parameters, 1e-12, -100, 0.0, 0.0, True)
        operators.masked_lm_loss_bwd(torch.ones_like(loss), gradients)

    return [both]


MASKED = 0.15  # share of the tokens that have a label


def _transformed(hidden: Tensor, dense: Tensor, dense_bias: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.layer_norm(
        functional.gelu(functional.linear(hidden, dense, dense_bias)), weight.shape, weight, bias, 1e-12
    )


def _logits(hidden: Tensor, *parameters: Tensor) -> Tensor:
    *transform, decoder_weight, decoder_bias = parameters
    return functional.linear(_transformed(hidden, *transform), decoder_weight, decoder_bias)


def _every_token(*inputs: Tensor) -> Tensor:
    return functional.cross_entropy(_logits(*inputs[:-1]).float(), inputs[-1])


def _masked_tokens(*inputs: Tensor) -> Tensor:
    hidden, *parameters, labels = inputs
    return _given_rows(hidden, *parameters, labels, (labels >= 0).nonzero().squeeze(1))


def _given_rows(*inputs: Tensor) -> Tensor:
    hidden, *parameters, labels, rows = inputs
    return functional.cross_entropy(
        _logits(hidden.index_select(0, rows), *parameters).float(), labels.index_select(0, rows)
    )


def _liger(*inputs: Tensor) -> Tensor:
    """Liger's fused product and cross entropy, which never stores all logits."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden, *parameters, labels, rows = inputs
    *transform, decoder_weight, decoder_bias = parameters
    transformed = _transformed(hidden.index_select(0, rows), *transform)
    targets = labels.index_select(0, rows)
    return first(LigerFusedLinearCrossEntropyFunction.apply(transformed, decoder_weight, targets, decoder_bias))


def _call(hidden: Tensor, *parameters_and_labels: Tensor, impl: str) -> Tensor:
    *parameters, labels = parameters_and_labels
    return masked_lm_loss(hidden, labels, *parameters, impl=impl).loss


def _benchmark(device: torch.device, tokens: int, hidden: int, words: int, dtype: torch.dtype, which: str) -> Benchmark:
    shapes = ((tokens, hidden), (hidden, hidden), (hidden,), (hidden,), (hidden,), (words, hidden), (words,))
    parts = [(normal(device, *shape) * (1.0 if len(shape) == 1 else 0.05)).to(dtype) for shape in shapes]
    masked = torch.randperm(tokens)[: round(MASKED * tokens)]  # always as many: the peers get them as an argument
    labels = torch.full((tokens,), -100).scatter(0, masked, torch.randint(0, words, masked.shape)).to(device)
    rows = (labels >= 0).nonzero().squeeze(1)
    every = Peer(_every_token, (*parts, labels))
    if device.type == "cuda":
        given = (*parts, labels, rows)  # the peers get the rows for free; in a model they wait for them
        peers = {
            "every token (transformers)": every,
            "masked tokens, eager": Peer(_given_rows, given),
            "every token, torch.compile": Peer(torch.compile(_every_token, dynamic=False), every.inputs),
            "masked tokens, torch.compile": Peer(torch.compile(_given_rows, dynamic=False), given),
            "masked tokens, Liger": Peer(_liger, given),
        }
    else:
        peers = {
            "every token (transformers)": every,
            "masked tokens, eager": Peer(_masked_tokens, every.inputs),
        }
    return Benchmark(
        _call,
        (parts[0], *autocast_parameters(parts[1:]), labels),
        peers,
        64 * torch.finfo(dtype).eps,
        dtype,
        which,
        torch.ones((), device=device),
        flops=2 * rows.numel() * hidden * (hidden + words) * (1 if which == "forward" else 3),
    )


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """Compared with the head of transformers' BertForMaskedLM (the logits of every token), and with masked rows."""
    if device.type == "cuda":
        widths = ((8192, 768), (16384, 1024)) if quick else tuple(product((8192, 16384), (768, 1024)))
        sizes = [(tokens, hidden, 30522, torch.bfloat16) for tokens, hidden in widths]
    else:
        # BF16 only at the small size: on a CPU without BF16 units torch's product takes minutes at the other.
        sizes = [(1024, 256, 8192, torch.float32), (1024, 256, 8192, torch.bfloat16)]
        sizes.append((1024, 768, 30522, torch.float32))
    return [
        Plan(
            f"T {tokens} E {hidden} V {words} {dtype_name(dtype)} {which}",
            partial(_benchmark, device, tokens, hidden, words, dtype, which),
        )
        for (tokens, hidden, words, dtype), which in product(sizes, ("forward", "forward + backward"))
    ]


CASES = OpCases(
    "masked_lm_loss", samples, malformed, hostile=hostile, launches=launches, mistakes=MISTAKES, benchmarks=benchmarks
)
