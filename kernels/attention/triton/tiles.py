"""The tiles of attention's Triton kernels, by matrix instructions, element size and head dimension.

Not measured on a GPU yet (benchmarks/results/PENDING.md): chosen by the compiler's registers, spills and shared memory
(benchmarks/results/triton_compile.json) and by the arithmetic of README.md, "Tiles".
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiles:
    """A kernel's tile of scores, queries by keys, its warps and its software pipelining stages.

    maxnreg: the most registers that a thread may take. 255 is what a GPU has: without it the compiler sometimes chooses
    128 by itself, and spills.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    maxnreg: int | None = None


@dataclass(frozen=True)
class LongLaunch:
    """The three kernels of the long regime."""

    fwd: Tiles
    dq: Tiles
    dkv: Tiles


@dataclass(frozen=True)
class ShortLaunch:
    """A launch of the short regime.

    largest_d: the largest padded D; block_s: rows of a tile for each sequence; tile: rows of the forward kernel's tile;
    chunk: queries that the backward kernel of one sequence takes at a time, or 0 for the kernel of several sequences,
    which uses `tile`.
    """

    largest_d: int
    block_s: int
    tile: int
    fwd_warps: int
    bwd_warps: int
    chunk: int


# By (bytes of an element, padded D), for wgmma: 64 rows on 4 warps are the least that it takes.
_HOPPER = {
    (2, 16): LongLaunch(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
    (2, 32): LongLaunch(Tiles(128, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3)),
    (2, 64): LongLaunch(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    (2, 128): LongLaunch(Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2), Tiles(32, 64, 8, 2)),
    (2, 256): LongLaunch(Tiles(64, 32, 8, 1), Tiles(32, 32, 8, 1), Tiles(32, 32, 8, 1)),
    (4, 16): LongLaunch(Tiles(32, 32, 4, 1), Tiles(32, 16, 8, 1), Tiles(32, 32, 8, 1)),
    (4, 32): LongLaunch(Tiles(32, 32, 4, 1), Tiles(32, 16, 8, 1), Tiles(32, 32, 8, 1)),
    (4, 64): LongLaunch(Tiles(32, 32, 4, 1), Tiles(32, 16, 8, 1, 255), Tiles(32, 32, 8, 1)),
    (4, 128): LongLaunch(Tiles(32, 32, 8, 1), Tiles(16, 16, 4, 1), Tiles(32, 32, 8, 1, 255)),
    (4, 256): LongLaunch(Tiles(16, 16, 4, 1), Tiles(16, 16, 8, 1), Tiles(16, 16, 8, 1)),
}
# What differs for the other families. mma.sync keeps operands and sums in registers, so its tiles are smaller.
_MMA = {
    (2, 16): replace(_HOPPER[2, 16], dkv=Tiles(32, 64, 4, 3)),
    (2, 32): replace(_HOPPER[2, 32], dkv=Tiles(32, 64, 4, 3)),
    (2, 64): LongLaunch(Tiles(64, 64, 4, 3, 255), Tiles(64, 32, 4, 2), Tiles(32, 32, 4, 2)),
    (2, 128): replace(_HOPPER[2, 128], fwd=Tiles(128, 32, 8, 2), dq=Tiles(32, 32, 8, 2)),
}
# tcgen05 has a memory of its own for sums.
_BLACKWELL = {
    (2, 32): replace(_HOPPER[2, 32], dkv=Tiles(64, 64, 8, 3)),
    (2, 64): replace(_HOPPER[2, 64], dkv=Tiles(64, 64, 8, 2)),
    (2, 128): replace(_HOPPER[2, 128], fwd=Tiles(128, 32, 8, 2), dkv=Tiles(64, 64, 8, 2)),
    (4, 256): replace(_HOPPER[4, 256], fwd=Tiles(16, 16, 8, 1)),
}
LONG = {80: _HOPPER | _MMA, 90: _HOPPER, 100: _HOPPER | _BLACKWELL}
# The mask takes the registers of 64 queries, which spill.
_DKV_WITH_DROPOUT = Tiles(32, 64, 4, 2)
# Two programs an SM: without this limit the compiler takes 150 registers of a thread, and one fits.
_TWO_PROGRAMS = Tiles(128, 64, 8, 3, maxnreg=128)

# Ordered by the longest sequence and the largest D: tiles of 64 rows are the least that wgmma takes, so shorter
# sequences share one; 128 rows need twice the warps for the same registers per thread.
_SHORT = (
    ShortLaunch(64, 16, 64, 4, 4, 0),
    ShortLaunch(64, 32, 64, 4, 4, 32),
    ShortLaunch(64, 64, 64, 4, 4, 32),
    ShortLaunch(128, 64, 64, 4, 8, 32),
    ShortLaunch(64, 128, 128, 8, 8, 32),
)
_SHORT_MMA = tuple(replace(s, fwd_warps=8) if s.largest_d == 128 else s for s in _SHORT)
SHORT = {80: _SHORT_MMA, 90: _SHORT, 100: _SHORT}


def long_launch(family: int, element_size: int, dim: int, block_d: int, dropout: bool) -> LongLaunch:
    """The kernels of the long regime.

    Args:
        family: see `triton_launch.family`.
        element_size: bytes, 2 or 4.
        dim, block_d: D, and D padded to a power of two.
        dropout: whether the call has dropout, whose mask takes registers.
    """
    chosen = LONG[family][element_size, block_d]
    if (family, element_size, block_d) == (90, 2, 64) and dropout:
        return replace(chosen, dkv=_DKV_WITH_DROPOUT)
    if (family, element_size, dim) == (90, 2, 64):
        return replace(chosen, fwd=_TWO_PROGRAMS)
    return chosen


def short_launch(family: int, element_size: int, block_d: int, max_seqlen: int) -> ShortLaunch | None:
    """The first launch of SHORT that takes `max_seqlen` and D; None for the long regime.

    float32 always takes the long regime: without tensor cores of its precision large tiles gain nothing.
    """
    if element_size == 4:
        return None
    return next((s for s in SHORT[family] if max_seqlen <= s.block_s and block_d <= s.largest_d), None)
