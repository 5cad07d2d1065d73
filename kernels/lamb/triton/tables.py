"""Tables on the device with which a multi-tensor kernel finds its tensors.

`layout` has the chunks of each tensor and depends on the sizes alone, `pointers` has the addresses. Both are int64
tensors on the device, built once for each set of sizes or addresses and cached: the key is the whole contents, so a
cached table is never stale. Building one copies from the host, which a CUDA graph must not capture.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 8192  # elements of one program; a multiple of BLOCK in operators.py
_MAX_TABLES = 1024  # of each kind; pointers take 32 bytes per tensor, a layout 16 per tensor and 8 per chunk


class _TableCache:
    """Tables by their contents: the most recently used, and all that a CUDA graph has captured."""

    def __init__(self) -> None:
        self.recent: OrderedDict[Hashable, Tensor] = OrderedDict()
        self.captured: dict[Hashable, Tensor] = {}

    def get(self, key: Hashable, device: torch.device, build: Callable[[], Tensor], blocking: bool) -> Tensor:
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        table = self.captured.get(key, self.recent.get(key))
        if table is None:
            if capturing:
                raise RuntimeError(
                    "lamb: these tensors are new to the CUDA graph that is being captured; run one step with the same "
                    "tensors before, and keep the gradients in their memory (zero_grad(set_to_none=False))"
                )
            host = build()
            table = host.to(device) if blocking or device.type != "cuda" else _from_pinned(host, device)
        if capturing:  # replays read the table at this address for as long as the graph exists
            self.captured[key] = table
        else:
            self.recent[key] = table
            self.recent.move_to_end(key)
            if len(self.recent) > _MAX_TABLES:
                self.recent.popitem(last=False)
            if device.type == "cuda":  # it may be freed while another stream still reads it
                table.record_stream(torch.cuda.current_stream(device))
        return table


def _from_pinned(host: Tensor, device: torch.device) -> Tensor:
    return host.pin_memory().to(device, non_blocking=True)


_layouts, _pointers = _TableCache(), _TableCache()


class Tables(NamedTuple):
    """The tables of a launch over `chunks` programs.

    layout: int64, the number of elements of each tensor, its first chunk, then the tensor of each chunk.
    pointers: int64 (lists, tensors), addresses.
    """

    layout: Tensor
    pointers: Tensor
    tensors: int
    chunks: int
    aligned: bool  # every address is a multiple of 16

    @staticmethod
    def of(lists: Sequence[Sequence[Tensor]]) -> Tables:
        """The tables of lists of tensors, dense, not empty, and of the same sizes in each list."""
        device = lists[0][0].device
        sizes = tuple(x.numel() for x in lists[0])
        addresses = tuple(x.data_ptr() for tensors in lists for x in tensors)
        # Unsynchronized streams may share a layout, so the host waits for its copy, once. Pointers are shared only by
        # steps on the same tensors, which must be synchronized anyway.
        layout = _layouts.get((device, sizes), device, lambda: _layout(sizes), blocking=True)
        pointers = _pointers.get(
            (device, addresses), device, lambda: torch.tensor(addresses, dtype=torch.int64), blocking=False
        )
        aligned = all(address % 16 == 0 for address in addresses)
        return Tables(layout, pointers, len(sizes), layout.shape[0] - 2 * len(sizes), aligned)


def _layout(sizes: tuple[int, ...]) -> Tensor:
    elements = torch.tensor(sizes, dtype=torch.int64)
    chunks = (elements + CHUNK - 1) // CHUNK
    return torch.cat([elements, chunks.cumsum(0) - chunks, torch.arange(len(sizes)).repeat_interleave(chunks)])


@dataclass(frozen=True)
class Group:
    """Tensors of one launch: the lists of the call, one dtype in each list."""

    lists: tuple[tuple[Tensor, ...], ...]

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        return tuple(tensors[0].dtype for tensors in self.lists)


def groups(lists: Sequence[Sequence[Tensor]]) -> Iterator[Group]:
    """The tensors of `lists`, without empty ones, grouped by their dtypes in each list."""
    by_dtypes: dict[tuple[torch.dtype, ...], list[tuple[Tensor, ...]]] = {}
    for tensors in zip(*lists, strict=True):
        if tensors[0].numel():
            by_dtypes.setdefault(tuple(x.dtype for x in tensors), []).append(tensors)
    for rows in by_dtypes.values():
        yield Group(tuple(zip(*rows, strict=True)))
