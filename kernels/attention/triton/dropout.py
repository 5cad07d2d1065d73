"""The dropout mask for tiles of scores: packed, one bit for each element, until it is used.

`keep_tile` of `_common/triton_philox.py` computes the same mask, but its bytes would have to be converted to the layout
of a tile of scores through shared memory. Here a group of 16 columns is 16 bits of one integer, and only these integers
change layout.
"""

from __future__ import annotations

import triton
import triton.language as tl

from bert_fast.kernels._common.triton_philox import load_rng_state


@triton.jit
def _at_least(word, addend):
    """Bits 0, 1, 16, 17: whether bytes 0, 1, 2, 3 of the word are at least 256 - addend, from the carry of each sum."""
    even = (word & 0x00FF00FF) + addend
    odd = ((word >> 8) & 0x00FF00FF) + addend
    return ((even >> 8) & 0x00010001) | ((odd >> 7) & 0x00020002)


@triton.jit
def keep_scores(
    rng_state, n, rows, first_group, threshold, ROWS: tl.constexpr, COLS: tl.constexpr, KEYS_FIRST: tl.constexpr
):
    """Which probabilities of head n are kept: bool (ROWS, COLS), queries by keys, or its transpose; as `keep_tile`."""
    GROUPS: tl.constexpr = COLS // 16
    key0, key1, offset = load_rng_state(rng_state)
    group = (first_group + tl.arange(0, GROUPS)).to(tl.uint32)
    zero = tl.zeros((ROWS, GROUPS), tl.uint32)
    c0 = group[None, :] + zero
    c1 = rows.to(tl.uint32)[:, None] + zero
    c2 = n.to(tl.uint32) + zero
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
    # tl.cast: Triton passes an integer that is 1 as a constant, which has no `to`.
    addend = tl.cast(256 - threshold, tl.uint32) * 0x00010001
    bits = _at_least(c0, addend) | (_at_least(c1, addend) << 2)
    bits |= (_at_least(c2, addend) << 4) | (_at_least(c3, addend) << 6)
    column = tl.arange(0, 16)
    place = (column // 4 * 2 + column % 2 + column % 4 // 2 * 16).to(tl.uint32)
    if KEYS_FIRST:
        bits = (tl.trans(bits)[:, None, :] >> place[None, :, None]).reshape(COLS, ROWS)
    else:
        bits = (bits[:, :, None] >> place[None, None, :]).reshape(ROWS, COLS)
    return (bits & 1) != 0
