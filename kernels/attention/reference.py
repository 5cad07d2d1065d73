"""Attention over a packed batch in eager PyTorch: the definition.

Gathers to (B, S), takes the dense softmax there and gathers back; shapes depend on B and max_seqlen alone, so that it
traces whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bert_fast.kernels._common.philox import dropout_threshold, multiplier_at


def attention_reference(
    qkv: Tensor,
    bias: Tensor | None,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    dropout_p: float,
    rng_state: Tensor | None,
) -> Tensor:
    total, _, heads, dim = qkv.shape
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    position = torch.arange(max_seqlen, device=qkv.device)
    valid = position < (ends - starts).unsqueeze(1)  # (B, S)
    # Padding reads one row of zeros behind the last token: so no sequence ever sees another's NaN, not even times 0.
    token = (starts.unsqueeze(1) + position).masked_fill(~valid, total)  # (B, S)
    padded = torch.cat([qkv, qkv.new_zeros(1, 3, heads, dim)])[token]  # (B, S, 3, N, D)
    query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, S, D)

    scores = torch.matmul(query, key.transpose(2, 3)) * softmax_scale  # (B, N, S, S)
    # The lowest finite number, not -inf: the rows of an empty sequence, which nobody reads, then stay free of NaN.
    scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(scores.dtype).min)
    probs = torch.softmax(scores, dim=-1)
    threshold = dropout_threshold(dropout_p)
    if threshold:
        assert rng_state is not None
        keep = _kept(rng_state, threshold, token, heads)
        probs = probs.masked_fill(~keep, 0.0) * (256.0 / (256 - threshold))
    out = torch.matmul(probs, value).transpose(1, 2).flatten(0, 1)  # (B S, N, D)

    sequence = torch.searchsorted(ends, torch.arange(total, device=qkv.device), right=True)  # (T,)
    return out[sequence * max_seqlen + torch.arange(total, device=qkv.device) - starts[sequence]]


def _kept(rng_state: Tensor, threshold: int, token: Tensor, heads: int) -> Tensor:
    """Which probabilities dropout keeps: bool (B, N, S, S). One head at a time: Philox needs 40 times the memory."""
    batch, seqlen = token.shape
    group = torch.arange((seqlen + 15) // 16, device=token.device).view(1, 1, -1)
    planes = []
    for head in range(heads):
        plane = torch.full((1, 1, 1), head, device=token.device)
        multiplier = multiplier_at(rng_state, threshold, plane, token.reshape(1, -1, 1), group)[..., :seqlen]
        planes.append((multiplier > 0).view(batch, seqlen, seqlen))
    return torch.stack(planes, dim=1)
