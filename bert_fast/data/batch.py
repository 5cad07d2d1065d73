"""A packed batch of training examples: no padding, one example after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bert_fast.data.host_numpy import IGNORE


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
        label_rows: int64 (M,), where labels are not -100, and maybe others beside; None where nobody asked.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    labels: Tensor
    next_sentence_label: Tensor
    label_rows: Tensor | None = None

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

    def with_label_rows(self) -> PackedBatch:
        """The batch with `label_rows`; without tokens it has none."""
        return replace(self, label_rows=(self.labels != IGNORE).nonzero()[:, 0]) if self.num_tokens else self

    def padded(self, tokens: int, sequences: int, labels: int, max_seqlen: int) -> PackedBatch:
        """The batch in a fixed shape, with the same losses.

        Sequences of token 0 without labels fill it up to `tokens`, empty ones up to `sequences`; label_rows, where
        there are any, repeat row 0 up to `labels`. A batch with more sequences or labels than that gets twice, four
        times ... as many.

        Args:
            tokens: T of the result, at least that of the batch.
            sequences, labels: B and M of the result, at least 1.
            max_seqlen: of the result, at least that of the batch.
        """
        left = tokens - self.num_tokens
        if left < 0 or max_seqlen < self.max_seqlen:
            raise ValueError(
                f"the batch has {self.num_tokens} tokens in sequences of up to {self.max_seqlen}; expected at most "
                f"{tokens} and {max_seqlen}"
            )
        lengths = torch.full((-(-left // max_seqlen),), max_seqlen)
        if left:
            lengths[-1] = left - max_seqlen * (len(lengths) - 1)
        while sequences < self.num_sequences + len(lengths):
            sequences *= 2
        ends = self.num_tokens + torch.cat([lengths.cumsum(0), lengths.new_full((sequences,), left)])
        empty = torch.zeros(left, dtype=torch.int64)
        rows = self.label_rows
        if rows is not None:
            while labels < len(rows):
                labels *= 2
            rows = torch.cat([rows, rows.new_zeros(labels - len(rows))])
        pairs = torch.full((sequences - self.num_sequences,), IGNORE)
        return PackedBatch(
            input_ids=torch.cat([self.input_ids, empty]),
            token_type_ids=torch.cat([self.token_type_ids, empty]),
            position_ids=torch.cat([self.position_ids, torch.arange(left) % max_seqlen]),
            cu_seqlens=torch.cat([self.cu_seqlens, ends.to(torch.int32)])[: sequences + 1],
            max_seqlen=max_seqlen,
            labels=torch.cat([self.labels, torch.full((left,), IGNORE)]),
            next_sentence_label=torch.cat([self.next_sentence_label, pairs]),
            label_rows=rows,
        )

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
