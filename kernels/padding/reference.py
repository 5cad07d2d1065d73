"""Unpad and pad in eager PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def unpad_indices_reference(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the real tokens and the bounds of the sequences.

    Args:
        mask: bool (B, S), True for a real token.

    Returns:
        indices int64 (T,), the flat positions b S + s of the real tokens in rising order; cu_seqlens int32 (B+1,), the
        running totals of the sequences' lengths, from 0.
    """
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    return mask.flatten().nonzero().squeeze(1), cu_seqlens


def gather_rows_reference(x: Tensor, indices: Tensor) -> Tensor:
    """out[t] = x[indices[t]]: x (R, ...) of any dtype, indices int64 (T,) -> (T, ...)."""
    return x[indices]


def scatter_rows_reference(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    """out[indices[t]] = x[t], zeros elsewhere: x (T, ...) of any dtype, indices int64 (T,) rising -> (rows, ...)."""
    return x.new_zeros(rows, *x.shape[1:]).index_copy(0, indices, x)
