"""The dropout mask of `_common/philox.py` inside Triton kernels: the same bits.

One call of the generator decides 16 neighbouring columns, so a tile of the mask takes a sixteenth as many calls, whose
bytes are then spread over it: about 3 integer operations per element instead of 60.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_rng_state(rng_state):
    """(key0, key1, offset) uint32 from the int64 (2,) tensor (seed, offset)."""
    seed = tl.load(rng_state)
    key0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return key0, key1, (tl.load(rng_state + 1) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def keep_tile(key0, key1, offset, plane, rows, first_group, threshold, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Which elements of a tile are kept: bool (ROWS, COLS), COLS a multiple of 16.

    rows: (ROWS,) integers, the index of each row; first_group: the tile's first column / 16; plane: a scalar;
    threshold: 1 to 255, elements whose byte is below it are dropped.
    """
    GROUPS: tl.constexpr = COLS // 16
    group = (first_group + tl.arange(0, GROUPS)).to(tl.uint32)
    zero = tl.zeros((ROWS, GROUPS), tl.uint32)
    c0 = group[None, :] + zero
    c1 = rows.to(tl.uint32)[:, None] + zero
    c2 = plane.to(tl.uint32) + zero
    c3 = offset + zero
    for _ in tl.static_range(7):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ key0
        c1 = low1
        c2 = high0 ^ c3 ^ key1
        c3 = low0
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    # (ROWS, GROUPS, 2, 2), where the last two indices a, b are of word 2 a + b; then the four bytes of each word.
    words = tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape(ROWS, GROUPS * 4)
    shifts = (8 * tl.arange(0, 4)).to(tl.uint32)
    random_bytes = (words[:, :, None] >> shifts[None, None, :]) & 255
    return (random_bytes >= threshold).reshape(ROWS, COLS)
