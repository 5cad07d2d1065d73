"""dropout(LayerNorm(word + position + token type)) in eager PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels._common.philox import dropout_multiplier


def embedding_layer_norm_reference(
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
    out_dtype: torch.dtype,
) -> Tensor:
    """out = dropout(LayerNorm(word[input_ids] + position[position_ids] + token_type[token_type_ids])).

    LayerNorm(s) = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias over each row, with the biased variance. These are
    the arguments, in order, of the operator `embedding_layer_norm_fwd` and of every implementation.

    Args:
        input_ids, token_type_ids, position_ids: int64 or int32 (T,).
        word, token_type, position: (V, E), (K, E) and (P, E) of one floating dtype, that of the computation.
        weight, bias: (E,), cast to the dtype of `word`.
        dropout_p: probability of dropping an element; read where `rng_state` is a tensor.
        eps: added to the variance.
        padding_idx: the row of `word` that gets no gradient, or None.
        rng_state: int64 (2,), seed and offset of the mask (plane 0, row t, column e), or None for no dropout.
        out_dtype: dtype of the result.

    Returns:
        (T, E) in `out_dtype`.
    """
    embedded = (
        F.embedding(input_ids, word, padding_idx)
        + F.embedding(position_ids, position)
        + F.embedding(token_type_ids, token_type)
    )
    normed = F.layer_norm(embedded, (word.shape[1],), weight.to(word.dtype), bias.to(word.dtype), eps)
    if rng_state is not None:
        normed = normed * dropout_multiplier(rng_state, dropout_p, 1, *normed.shape)[0].to(normed.dtype)
    return normed.to(out_dtype)
