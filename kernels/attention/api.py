"""Public function of attention: validates the arguments, dispatches to an implementation."""

from __future__ import annotations

import math

from torch import Tensor

from bert_fast.kernels._common.checks import (
    check_cu_seqlens,
    check_finite,
    check_floating,
    check_max_seqlen,
    check_same_device,
    to_compute_dtype,
)
from bert_fast.kernels._common.philox import dropout_state
from bert_fast.kernels._common.times import size_of_sequences
from bert_fast.kernels.attention.op import OP


def attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    bias: Tensor | None = None,
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    rng_state: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Bidirectional self-attention inside each sequence of a packed batch: dropout(softmax(scale Q K^T)) V.

    Q, K, V = (qkv + bias)[:, 0], [:, 1], [:, 2]; a token attends to the tokens of its own sequence only.

    Args:
        qkv: (T, 3, N, D) float32, bfloat16, float16 or float64, any strides: queries, keys and values of the T tokens,
            the sequences one after the other.
        cu_seqlens: (B+1,) int32 on the device of `qkv`; sequence b is the tokens cu_seqlens[b] to cu_seqlens[b+1] - 1.
            A sequence may be empty.
        max_seqlen: at least the length of the longest sequence; implementations may size their work by it.
        bias: (3, N, D), the dtype of `qkv` or float32; None for none.
        softmax_scale: factor of the scores, finite; None for 1 / sqrt(D).
        dropout_p: probability of dropping an attention probability, 0 or in [1/512, 511/512] (steps of 1/256).
        rng_state: int64 (2,), seed and offset of the dropout mask (see `_common/philox.py`: plane = head, row = the
            query's token, column = the key's position in its sequence); drawn from torch's generator where None.
        impl: "auto", "reference", "triton", "cuda" or "cpu".

    Returns:
        (T, N, D) in the dtype of `qkv`, under autocast in autocast's.

    Raises:
        TypeError: a tensor is not dense and floating point, cu_seqlens is not int32, or a number has another type.
        ValueError: a shape, a device, a number or `impl` is none of these; or, where values are read
            (CPU tensors; on CUDA under BERT_FAST_CHECK=1), cu_seqlens doesn't rise from 0 to T in steps of at most
            max_seqlen.
        ImplUnavailableError: the requested `impl` can't run here.

    Source: Vaswani et al., "Attention is all you need", 2017, section 3.2; Dao et al., "FlashAttention", 2022.
    """
    check_floating("qkv", qkv, ("T", 3, "N", "D"))
    if bias is not None:
        check_floating("bias", bias, qkv.shape[1:], qkv)
    check_max_seqlen(max_seqlen)
    check_cu_seqlens(cu_seqlens, qkv.shape[0], max_seqlen)
    check_same_device(qkv, cu_seqlens=cu_seqlens)
    if qkv.shape[3] < 1:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; expected a head dimension D of at least 1")
    rng_state = dropout_state(dropout_p, rng_state, qkv)
    softmax_scale = (
        1.0 / math.sqrt(qkv.shape[3]) if softmax_scale is None else check_finite("softmax_scale", softmax_scale)
    )
    qkv = to_compute_dtype(qkv)
    call = OP.select(impl, qkv, size=size_of_sequences(qkv.shape[0], max_seqlen, qkv.shape[3], dropout_p))
    out: Tensor = call(qkv, bias, cu_seqlens, max_seqlen, softmax_scale, dropout_p, rng_state)
    return out
