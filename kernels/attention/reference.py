"""Attention over a packed batch in eager PyTorch: the definition.

Gathers to (B, S), takes the dense softmax there and gathers back. S is the length of the longest sequence; where
reading it would synchronize or break a graph, it is the smaller of max_seqlen and T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bert_fast.kernels._common.checks import values_are_checked
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
    """out = dropout(softmax(softmax_scale Q K^T)) V inside each sequence; Q, K, V = (qkv + bias).unbind(1).

    These are the arguments, in order, of the operator `attention_fwd` and of every implementation; the encoder's fast
    path passes them by position.

    Args:
        qkv: (T, 3, N, D) floating point; its dtype is that of the computation and of the result.
        bias: (3, N, D), cast to the dtype of `qkv`, or None.
        cu_seqlens: int32 (B+1,); sequence b is the tokens cu_seqlens[b] to cu_seqlens[b+1] - 1.
        max_seqlen: at least the length of the longest sequence.
        softmax_scale: factor of the scores.
        dropout_p: probability of dropping an attention probability, 0 for none.
        rng_state: int64 (2,), seed and offset of the mask (plane = head, row = the query's token, column = the key's
            position in its sequence); None where dropout_p is 0.

    Returns:
        (T, N, D) in the dtype of `qkv`.
    """
    total, _, heads, dim = qkv.shape
    if bias is not None:
        qkv = qkv + bias.to(qkv.dtype)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    if torch.compiler.is_compiling() and cu_seqlens.device.type == "cpu":
        _assert_sequences(cu_seqlens, total, max_seqlen)
    seqlen = min(max_seqlen, total)
    if values_are_checked(cu_seqlens) and starts.shape[0]:
        seqlen = min(seqlen, int((ends - starts).max()))
    position = torch.arange(seqlen, device=qkv.device)
    valid = position < (ends - starts).unsqueeze(1)  # (B, S)
    # Padding reads a row of zeros after the last token: no sequence sees another's NaN, not even multiplied by 0.
    token = (starts.unsqueeze(1) + position).masked_fill(~valid, total)  # (B, S)
    padded = torch.cat([qkv, qkv.new_zeros(1, 3, heads, dim)])[token]  # (B, S, 3, N, D)
    query, key, value = padded.permute(2, 0, 3, 1, 4).unbind(0)  # each (B, N, S, D)

    scores = torch.matmul(query, key.transpose(2, 3)) * softmax_scale  # (B, N, S, S)
    # The lowest finite number, not -inf: the rows of an empty sequence, which are not read, stay free of NaN.
    scores = scores.masked_fill(~valid[:, None, None, :], torch.finfo(scores.dtype).min)
    probs = torch.softmax(scores, dim=-1)
    threshold = dropout_threshold(dropout_p)
    if threshold:
        assert rng_state is not None
        keep = _keep_mask(rng_state, threshold, token, heads)
        probs = probs.masked_fill(~keep, 0.0) * (256.0 / (256 - threshold))
    out = torch.matmul(probs, value).transpose(1, 2).flatten(0, 1)  # (B S, N, D)

    sequence = torch.searchsorted(ends, torch.arange(total, device=qkv.device), right=True)  # (T,)
    return out[sequence * seqlen + torch.arange(total, device=qkv.device) - starts[sequence]]


def _assert_sequences(cu_seqlens: Tensor, total: int, max_seqlen: int) -> None:
    """In a compiled graph, where the public function reads no values: an error when the graph runs."""
    lengths = cu_seqlens.diff()
    valid = (lengths >= 0).all() & (lengths <= max_seqlen).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == total)
    torch._assert_async(valid, "cu_seqlens: expected to rise from 0 to T in steps of at most max_seqlen")


def _keep_mask(rng_state: Tensor, threshold: int, token: Tensor, heads: int) -> Tensor:
    """Which probabilities dropout keeps: bool (B, N, S, S). By head, since Philox needs 40 times the mask's memory."""
    batch, seqlen = token.shape
    group = torch.arange((seqlen + 15) // 16, device=token.device).view(1, 1, -1)
    planes = []
    for head in range(heads):
        plane = torch.full((1, 1, 1), head, device=token.device)
        multiplier = multiplier_at(rng_state, threshold, plane, token.reshape(1, -1, 1), group)[..., :seqlen]
        planes.append((multiplier > 0).view(batch, seqlen, seqlen))
    return torch.stack(planes, dim=1)
