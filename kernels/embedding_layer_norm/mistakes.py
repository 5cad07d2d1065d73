"""What kernels of embedding_layer_norm get wrong: see kernels/_common/mistakes.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common.mistakes import NORM_MISTAKES, MaskProbe, normalize, straight_through
from bert_fast.kernels._common.philox import dropout_multiplier
from bert_fast.kernels.embedding_layer_norm.api import embedding_layer_norm


def _mistaken(
    input_ids: Tensor,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    token_type: Tensor,
    position: Tensor,
    weight: Tensor,
    bias: Tensor,
    dropout_p: float,
    eps: float,
    padding_idx: int | None,
    rng_state: Tensor | None,
    *,
    types: str = "own",
    positions: str = "own",
    drops: str = "result",
    scaled: bool = True,
    replays: bool = True,
    **norm: Any,
) -> Tensor:
    if positions == "shifted":
        position_ids = (position_ids + 1) % position.shape[0]
    elif positions == "of the batch":
        position_ids = torch.arange(len(position_ids), device=position.device) % position.shape[0]
    if types == "first":
        token_type_ids = torch.zeros_like(token_type_ids)
    x = F.embedding(input_ids, word, padding_idx)
    x = x + F.embedding(position_ids, position) * (0.0 if positions == "none" else 1.0)
    x = x + F.embedding(token_type_ids, token_type) * (0.0 if types == "none" else 1.0)
    keep = torch.ones((), dtype=x.dtype, device=x.device)
    if rng_state is not None:
        keep = dropout_multiplier(rng_state, dropout_p, 1, *x.shape)[0].to(x.dtype)
        keep = keep if scaled else (keep > 0).to(x.dtype)
    x = normalize(x * keep if drops == "sum" else x, weight, bias, eps, **norm)
    if drops != "result":
        return x
    return x * keep if replays else straight_through(x * keep, x)


MISTAKES = {
    **{name: functools.partial(_mistaken, **options) for name, options in NORM_MISTAKES.items()},
    "the token types are dropped": functools.partial(_mistaken, types="none"),
    "every token has the token type 0": functools.partial(_mistaken, types="first"),
    "the positions are dropped": functools.partial(_mistaken, positions="none"),
    "the positions are shifted by one": functools.partial(_mistaken, positions="shifted"),
    "the positions run on over the sequences of the batch": functools.partial(_mistaken, positions="of the batch"),
    "dropout is applied before LayerNorm": functools.partial(_mistaken, drops="sum"),
    "dropout is left out": functools.partial(_mistaken, drops="nothing"),
    "kept elements are not scaled by 1 / (1 - p)": functools.partial(_mistaken, scaled=False),
    "the backward pass does not apply the dropout mask": functools.partial(_mistaken, replays=False),
}


def _probe(impl: str, rng_state: Tensor, device: str) -> Tensor:
    """Without dropout every element is 1: the weight is 0, the bias 1."""
    ids = torch.zeros(200, dtype=torch.int64, device=device)
    table, weight, bias = (
        torch.randn(1, 96, device=device),
        torch.zeros(96, device=device),
        torch.ones(96, device=device),
    )
    tensors = (ids, ids, ids, table, table, table, weight, bias)
    return embedding_layer_norm(*tensors, dropout_p=0.25, rng_state=rng_state, impl=impl)


MASK_PROBE = MaskProbe(_probe, lambda out: out != 0, 0.25, expected=1.0)
