"""A packed batch of training examples: concatenated, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bert_fast.data.host_numpy import IGNORE


@dataclass(frozen=True)
class PackedBatch:
    """B examples with T tokens in total.

    Attributes:
        input_ids: int64 (T,), the masked tokens [CLS] A [SEP] B [SEP] of each example.
        token_type_ids: int64 (T,), 0 for [CLS] A [SEP], 1 for B [SEP].
        position_ids: int64 (T,), starting at 0 in each example.
        cu_seqlens: int32 (B + 1,), the start of each example, then T.
        max_seqlen: number of tokens of the longest example.
        labels: int64 (T,), the original token at each position to predict, -100 elsewhere.
        next_sentence_label: int64 (B,), 0 if B follows A, 1 if it is from another document, -100 without B.
        label_rows: int64 (M,), the positions of labels other than -100, possibly among others; None if not computed.
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
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, from which copies to a GPU are asynchronous."""
        pinned: dict[str, Any] = {
            name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **pinned)

    def with_label_rows(self) -> PackedBatch:
        """The batch with `label_rows`; an empty batch is returned as it is."""
        return replace(self, label_rows=(self.labels != IGNORE).nonzero()[:, 0]) if self.num_tokens else self

    def padded(self, tokens: int, sequences: int, labels: int, max_seqlen: int) -> PackedBatch:
        """The batch padded to a fixed shape, with the same losses.

        It is padded with sequences of token 0 without labels up to `tokens`, then with empty sequences up to
        `sequences`; label_rows, unless None, are padded with row 0 up to `labels`. If the batch has more sequences or
        labels, the limit is doubled until it suffices.

        Args:
            tokens: T of the result, at least that of the batch.
            sequences: B of the result, at least 1.
            labels: M of the result, at least 1.
            max_seqlen: max_seqlen of the result, at least that of the batch.

        Raises:
            ValueError: `tokens` or `max_seqlen` is less than that of the batch.
        """
        padding = tokens - self.num_tokens
        if padding < 0 or max_seqlen < self.max_seqlen:
            raise ValueError(
                f"the batch has {self.num_tokens} tokens in sequences of up to {self.max_seqlen}; expected at most "
                f"{tokens} and {max_seqlen}"
            )
        lengths = torch.full((-(-padding // max_seqlen),), max_seqlen)
        if padding:
            lengths[-1] = padding - max_seqlen * (len(lengths) - 1)
        while sequences < self.num_sequences + len(lengths):
            sequences *= 2
        ends = self.num_tokens + torch.cat([lengths.cumsum(0), lengths.new_full((sequences,), padding)])
        zeros = torch.zeros(padding, dtype=torch.int64)
        rows = self.label_rows
        if rows is not None:
            while labels < len(rows):
                labels *= 2
            rows = torch.cat([rows, rows.new_zeros(labels - len(rows))])
        pairs = torch.full((sequences - self.num_sequences,), IGNORE)
        return PackedBatch(
            input_ids=torch.cat([self.input_ids, zeros]),
            token_type_ids=torch.cat([self.token_type_ids, zeros]),
            position_ids=torch.cat([self.position_ids, torch.arange(padding) % max_seqlen]),
            cu_seqlens=torch.cat([self.cu_seqlens, ends.to(torch.int32)])[: sequences + 1],
            max_seqlen=max_seqlen,
            labels=torch.cat([self.labels, torch.full((padding,), IGNORE)]),
            next_sentence_label=torch.cat([self.next_sentence_label, pairs]),
            label_rows=rows,
        )

    @classmethod
    def joined(cls, batches: Sequence[PackedBatch]) -> PackedBatch:
        """The examples of several batches concatenated into one batch, in order."""
        if len(batches) == 1:
            return batches[0]
        ends, total = [torch.zeros(1, dtype=torch.int32)], 0
        for batch in batches:
            ends.append(batch.cu_seqlens[1:] + total)
            total += batch.num_tokens
        names = ("input_ids", "token_type_ids", "position_ids", "labels", "next_sentence_label")
        values: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in names}
        return cls(cu_seqlens=torch.cat(ends), max_seqlen=max(batch.max_seqlen for batch in batches), **values)
