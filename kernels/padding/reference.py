"""Unpad and pad in eager PyTorch: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def unpad_indices_reference(mask: Tensor) -> tuple[Tensor, Tensor]:
    """mask bool (B, S) -> flat positions of the real tokens, int64 (T,), and cu_seqlens int32 (B+1,)."""
    lengths = mask.sum(dim=1, dtype=torch.int32)
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    return mask.flatten().nonzero().squeeze(1), cu_seqlens


def gather_rows_reference(x: Tensor, indices: Tensor) -> Tensor:
    """x (R, ...), indices (T,) -> (T, ...)."""
    return x[indices]


def scatter_rows_reference(x: Tensor, indices: Tensor, rows: int) -> Tensor:
    """x (T, ...), indices (T,), each at most once -> (rows, ...), zeros elsewhere."""
    return x.new_zeros(rows, *x.shape[1:]).index_copy(0, indices, x)
