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
    embedded = (
        F.embedding(input_ids, word, padding_idx)
        + F.embedding(position_ids, position)
        + F.embedding(token_type_ids, token_type)
    )
    normed = F.layer_norm(embedded, (word.shape[1],), weight.to(word.dtype), bias.to(word.dtype), eps)
    if rng_state is not None:
        normed = normed * dropout_multiplier(rng_state, dropout_p, 1, *normed.shape)[0].to(normed.dtype)
    return normed.to(out_dtype)
