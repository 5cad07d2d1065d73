"""The dropout mask: a pure function of (seed, offset, plane, row, column), the same bits in every implementation.

Philox4x32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). One call returns
128 bits, which decide 16 neighbouring columns, a byte each:

    counter = (column // 16, row, plane, offset mod 2^32)      key = (seed mod 2^32, seed >> 32)
    byte    = (word[column % 16 // 4] >> 8 * (column % 4)) & 255
    keep    = byte >= threshold,  threshold = round(256 p)

Kept values are scaled by 256 / (256 - threshold), the inverse of the probability actually used: the expectation is
exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bert_fast.kernels._common.checks import LARGEST, check_number, check_rng_state

ROUNDS = 7
_MULTIPLIER = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK32 = 0xFFFFFFFF


def new_rng_state(device: torch.device | str, count: int | None = None) -> Tensor:
    """Draw (seed, offset) from torch's generator of `device`: int64 (2,), or (count, 2) for several calls.

    No synchronization with the device; reproducible by `torch.manual_seed`.
    """
    return torch.randint(0, 2**63 - 1, (2,) if count is None else (count, 2), dtype=torch.int64, device=device)


def dropout_threshold(dropout_p: float) -> int:
    """The number of the 256 byte values that drop an element; 0 for no dropout.

    Raises ValueError where `dropout_p` is outside [0, 1) or rounds to dropping none (but 0 itself) or all elements.
    """
    check_number("dropout_p", dropout_p, -LARGEST, LARGEST, "0 or a probability from 1/512 to 511/512 (steps of 1/256)")
    if dropout_p == 0.0:
        return 0
    threshold = int(dropout_p * 256 + 0.5) if 0.0 < dropout_p < 1.0 else 0
    if not 1 <= threshold <= 255:
        raise ValueError(
            f"dropout_p is {dropout_p}; expected 0 or a probability from 1/512 to 511/512 (steps of 1/256)"
        )
    return threshold


def dropout_state(dropout_p: float, rng_state: Tensor | None, x: Tensor) -> Tensor | None:
    """The state that an implementation gets: `rng_state`, checked; a new one for None; None where nothing is dropped.

    Raises ValueError where `dropout_threshold` does, or where `rng_state` has another shape than (2,) or another device
    than `x`; TypeError where its dtype is not int64.
    """
    if rng_state is not None:
        check_rng_state(rng_state, x)
    if dropout_threshold(dropout_p) == 0:
        return None
    return new_rng_state(x.device) if rng_state is None else rng_state.contiguous()


def _round(counter: list[Tensor], key: tuple[Tensor, Tensor]) -> list[Tensor]:
    # int64 products wrap modulo 2^64, so their low 64 bits are exact; the mask undoes the shift's sign extension.
    first, second = counter[0] * _MULTIPLIER[0], counter[2] * _MULTIPLIER[1]
    return [
        ((second >> 32) & _MASK32) ^ counter[1] ^ key[0],
        second & _MASK32,
        ((first >> 32) & _MASK32) ^ counter[3] ^ key[1],
        first & _MASK32,
    ]


def dropout_multiplier(rng_state: Tensor, dropout_p: float, planes: int, rows: int, cols: int) -> Tensor:
    """0 for a dropped element, 256 / (256 - threshold) for a kept one: float64 (planes, rows, cols).

    Args:
        rng_state: int64 (2,), seed and offset.
        dropout_p: probability of dropping, see `dropout_threshold`.
    """
    device = rng_state.device
    threshold = dropout_threshold(dropout_p)
    group = torch.arange((cols + 15) // 16, device=device).view(1, 1, -1)
    row = torch.arange(rows, device=device).view(1, -1, 1)
    plane = torch.arange(planes, device=device).view(-1, 1, 1)
    return multiplier_at(rng_state, threshold, plane, row, group)[..., :cols]


def multiplier_at(rng_state: Tensor, threshold: int, plane: Tensor, row: Tensor, group: Tensor) -> Tensor:
    """The multipliers of whole groups of 16 columns, for index tensors that broadcast to (P, R, G): (P, R, 16 G)."""
    shape = torch.broadcast_shapes(plane.shape, row.shape, group.shape)
    seed, offset = rng_state[0], rng_state[1]
    counter = [part.expand(shape) for part in (group, row, plane, (offset & _MASK32).view(1, 1, 1))]
    key = (seed & _MASK32, (seed >> 32) & _MASK32)
    for step in range(ROUNDS):
        if step:
            key = ((key[0] + _WEYL[0]) & _MASK32, (key[1] + _WEYL[1]) & _MASK32)
        counter = _round(counter, key)
    words = torch.stack(counter, dim=-1)  # (P, R, G, 4)
    shifts = torch.tensor([0, 8, 16, 24], device=rng_state.device)
    random_bytes = (words.unsqueeze(-1) >> shifts) & 255  # (P, R, G, 4, 4)
    scale = 256.0 / (256 - threshold)
    return ((random_bytes >= threshold).double() * scale).reshape(*shape[:-1], shape[-1] * 16)
