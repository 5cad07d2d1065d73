"""Other numbers of rows for the word embedding and the decoder, as transformers' resize_token_embeddings has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.models.settings import COUNTS

_NOISE = 1e-9  # of the covariance of the old rows: new rows differ from their mean, and from each other


def rows_after(old: int, new_num_tokens: int | None, pad_to_multiple_of: int | None) -> int:
    """The number of rows that `resize_token_embeddings` is asked for.

    Raises:
        TypeError: an argument is no int.
        ValueError: it is out of range.
    """
    for name, value in (("new_num_tokens", new_num_tokens), ("pad_to_multiple_of", pad_to_multiple_of)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise TypeError(f"{name} is of type {type(value).__name__}; expected an int, or None")
        if value is not None and not 1 <= value <= COUNTS["vocab_size"][1]:
            raise ValueError(f"{name} is {value}; expected 1 to {COUNTS['vocab_size'][1]}")
    rows = old if new_num_tokens is None else new_num_tokens
    return rows if pad_to_multiple_of is None else -(-rows // pad_to_multiple_of) * pad_to_multiple_of


@torch.no_grad()
def resize_rows(weight: Tensor, rows: int, std: float | None) -> nn.Parameter:
    """`weight` (V, E) with `rows` rows: the first ones are kept, new ones drawn from a normal distribution.

    Args:
        std: of new rows, with mean 0; None for the mean of the old rows, and 1e-9 times their covariance.
    """
    old = weight.shape[0]
    resized = weight.new_empty(rows, weight.shape[1])
    kept = min(old, rows)
    resized[:kept] = weight[:kept]
    if rows > old and std is not None:
        resized[old:].normal_(0.0, std)
    elif rows > old:
        source = weight.double() if weight.dtype == torch.float64 else weight.float()
        mean = source.mean(0)
        # A combination of the centred rows with normal coefficients has their covariance.
        draws = torch.randn(rows - old, old, dtype=source.dtype, device=source.device)
        resized[old:] = (mean + (_NOISE / old) ** 0.5 * (draws @ (source - mean))).to(weight.dtype)
    return nn.Parameter(resized, requires_grad=weight.requires_grad)


@torch.no_grad()
def resize_bias(bias: Tensor, rows: int) -> nn.Parameter:
    """`bias` (V,) with `rows` values: the first ones are kept, new ones are 0."""
    return nn.Parameter(nn.functional.pad(bias, (0, rows - bias.shape[0])), requires_grad=bias.requires_grad)


def check_embedding(module: Any, width: int) -> nn.Embedding:
    """`module`, if it may be the word embedding of a model.

    Raises:
        TypeError: it is no nn.Embedding.
        ValueError: its rows have another width.
    """
    if not isinstance(module, nn.Embedding):
        raise TypeError(f"the word embedding is of type {type(module).__name__}; expected an nn.Embedding")
    if module.embedding_dim != width:
        raise ValueError(f"the rows of the word embedding have {module.embedding_dim} values; expected {width}")
    return module
