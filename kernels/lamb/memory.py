"""Lists of tensors as kernels read them: elements that are adjacent in memory, in the same order in each list."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GRADS = 1  # the list that is read only


def same_dense_memory(tensors: Sequence[Tensor]) -> bool:
    """Whether all have the same strides and no gaps between elements."""
    if all(x.is_contiguous() for x in tensors):
        return True
    first = tensors[0]
    return all(x.stride() == first.stride() for x in tensors) and bool(
        torch.ops.aten.is_non_overlapping_and_dense(first)
    )


def dense(lists: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """The lists, with copies of tensors whose strides differ or have gaps; (original, copy) of those written."""
    lists = [list(tensors) for tensors in lists]
    copied = []
    for index, tensors in enumerate(zip(*lists, strict=True)):
        if not same_dense_memory(tensors):
            for number, x in enumerate(tensors):
                lists[number][index] = x.contiguous()
                if number != _GRADS and not x.is_contiguous():
                    copied.append((x, lists[number][index]))
    return lists, copied
