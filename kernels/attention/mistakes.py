"""What kernels of attention get wrong: see kernels/_common/mistakes.py."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from bert_fast.kernels._common.mistakes import MaskProbe, straight_through
from bert_fast.kernels._common.philox import dropout_threshold, multiplier_at
from bert_fast.kernels.attention.api import attention


def _multiplier(rng_state: Tensor, threshold: int, heads: int, first: int, length: int) -> Tensor:
    """Of the sequence whose first token is `first`: (N, L, L)."""
    device = rng_state.device
    plane = torch.arange(heads, device=device).view(-1, 1, 1)
    row = first + torch.arange(length, device=device).view(1, -1, 1)
    group = torch.arange((length + 15) // 16, device=device).view(1, 1, -1)
    return multiplier_at(rng_state, threshold, plane, row, group)[..., :length]


def _mistaken(
    qkv: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    rng_state: Tensor | None,
    *,
    adds_bias: bool = True,
    power: float = 1.0,
    roles: tuple[int, int, int] = (0, 1, 2),
    padded: bool = False,
    across: bool = False,
    causal: bool = False,
    axis: int = -1,
    drops: str = "probabilities",
    scaled: bool = True,
    rows_of_sequence: bool = False,
    replays: bool = True,
) -> Tensor:
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype) * (1.0 if adds_bias else 0.0)
    ends = [0, qkv.shape[0]] if across else cu_seqlens.tolist()
    threshold = dropout_threshold(dropout_p)
    outs = [qkv.new_zeros(0, *qkv.shape[2:])]
    for first, end in itertools.pairwise(ends):
        query, key, value = (qkv[first:end].transpose(0, 2)[:, index] for index in roles)  # (N, L, D)
        length = end - first
        if padded:  # keys of padding have a score of 0 and a value of 0
            key, value = (torch.nn.functional.pad(x, (0, 0, 0, max(0, max_seqlen - length))) for x in (key, value))
        scores = query @ key.transpose(1, 2) * softmax_scale**power
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores[0], dtype=torch.bool).triu(1), -torch.inf)
        probs = torch.softmax(scores, axis)
        if threshold and drops != "nothing":
            assert rng_state is not None
            keep = _multiplier(rng_state, threshold, qkv.shape[2], 0 if rows_of_sequence else first, length)
            keep = keep if scaled else (keep > 0).double()
            keep = torch.nn.functional.pad(keep, (0, probs.shape[2] - length)).to(probs.dtype)
            if drops == "transposed":
                keep = keep.transpose(1, 2)
            if drops == "scores":
                probs = torch.softmax(scores.masked_fill(keep == 0, -torch.inf), axis).nan_to_num(0.0)
            else:
                probs = probs * keep if replays else straight_through(probs * keep, probs)
        outs.append((probs @ value).transpose(0, 1))
    return torch.cat(outs)


def _partial(**options: object) -> functools.partial[Tensor]:
    return functools.partial(_mistaken, **options)  # type: ignore[arg-type]


MISTAKES = {
    "softmax runs over padding: scores of 0 up to max_seqlen": _partial(padded=True),
    "the scores are not scaled by 1 / sqrt(D)": _partial(power=0.0),
    "the scores are scaled twice": _partial(power=2.0),
    "the bias is not added": _partial(adds_bias=False),
    "tokens attend to other sequences of the batch": _partial(across=True),
    "the attention is causal": _partial(causal=True),
    "softmax runs over the queries": _partial(axis=-2),
    "keys and values are exchanged": _partial(roles=(0, 2, 1)),
    "queries and keys are exchanged": _partial(roles=(1, 0, 2)),
    "dropout is left out": _partial(drops="nothing"),
    "dropout is applied before softmax": _partial(drops="scores"),
    "kept probabilities are not scaled by 1 / (1 - p)": _partial(scaled=False),
    "the dropout mask is transposed": _partial(drops="transposed"),
    "the rows of the dropout mask are counted from the start of each sequence": _partial(rows_of_sequence=True),
    "the backward pass does not apply the dropout mask": _partial(replays=False),
}


def _probe(impl: str, rng_state: Tensor, device: str) -> Tensor:
    """Uniform probabilities on values that are unit vectors: out[i, n, j] is that of key j, times 32."""
    length, heads = 32, 2
    qkv = torch.zeros(3 * length, 3, heads, length, device=device)
    qkv[:, 2] = length * torch.eye(length, device=device).repeat(3, 1).unsqueeze(1)
    cu_seqlens = torch.tensor([0, length, 2 * length, 3 * length], dtype=torch.int32, device=device)
    return attention(qkv, cu_seqlens, length, dropout_p=0.25, rng_state=rng_state, impl=impl)


MASK_PROBE = MaskProbe(_probe, lambda out: out != 0, 0.25, expected=1.0)
