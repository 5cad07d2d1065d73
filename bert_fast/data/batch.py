"""A packed batch of training examples: no padding, one example after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """B examples of T tokens together.

    Attributes:
        input_ids: int64 (T,), [CLS] A [SEP] B [SEP] of each example, masked.
        token_type_ids: int64 (T,), 0 for [CLS] A [SEP], 1 for B [SEP].
        position_ids: int64 (T,), from 0 in each example.
        cu_seqlens: int32 (B + 1,), where each example starts, and T.
        max_seqlen: tokens of the longest example.
        labels: int64 (T,), the true token where one is to be predicted, -100 elsewhere.
        next_sentence_label: int64 (B,), 0 where B follows A, 1 where it is from another document, -100 without B.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor
    next_sentence_label: Tensor

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.input_ids.numel()

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.next_sentence_label.numel()

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """The batch with its tensors on `device`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, from which a copy to a GPU need not be waited for."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **pinned)

    @classmethod
    def joined(cls, batches: Sequence[PackedBatch]) -> PackedBatch:
        """One batch of the examples of several, in order."""
        if len(batches) == 1:
            return batches[0]
        ends, total = [torch.zeros(1, dtype=torch.int32)], 0
        for batch in batches:
            ends.append(batch.cu_seqlens[1:] + total)
            total += batch.num_tokens
        names = ("input_ids", "token_type_ids", "position_ids", "labels", "next_sentence_label")
        values: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
        return cls(cu_seqlens=torch.cat(ends), max_seqlen=max(batch.max_seqlen for batch in batches), **values)
