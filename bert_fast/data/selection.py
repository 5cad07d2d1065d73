"""Which documents are kept, and which of them are held out: by the 64-bit hashes of all parts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bert_fast.data.host_numpy import Array

_BUCKET = 2**23  # documents whose hashes are sorted at once, which takes about 50 bytes each


def _digests(folders: list[Path]) -> Iterator[Array]:
    for folder in folders:
        yield np.load(folder / "digests.npy")


def select(folders: list[Path], max_documents: int | None, *, drop_duplicates: bool) -> tuple[list[Array], int]:
    """Which documents of each finished part are kept, bool (documents,) a part, and how many duplicates are not."""
    keep = [np.ones(digests.size, dtype=bool) for digests in _digests(folders)]
    left = sum(mask.size for mask in keep) if max_documents is None else max_documents
    for mask in keep:
        mask[left:] = False
        left -= min(left, mask.size)
    before = sum(int(mask.sum()) for mask in keep)
    if drop_duplicates:
        _drop_later(folders, keep, max(1, -(-before // _BUCKET)))
    return keep, before - sum(int(mask.sum()) for mask in keep)


def _drop_later(folders: list[Path], keep: list[Array], buckets: int) -> None:
    """Of the kept documents with the same hash keep the first; hashes are sorted by their remainders, one at a time."""
    for bucket in range(buckets):
        found, parts, rows = [], [], []
        for number, of_part in enumerate(_digests(folders)):
            chosen = np.flatnonzero(keep[number] & (of_part % np.uint64(buckets) == bucket))
            found.append(of_part[chosen])
            parts.append(np.full(chosen.size, number, dtype=np.int32))
            rows.append(chosen.astype(np.int32))
        digests, part, row = np.concatenate(found), np.concatenate(parts), np.concatenate(rows)
        later = np.ones(digests.size, dtype=bool)
        later[np.unique(digests, return_index=True)[1]] = False
        for number in np.unique(part[later]).tolist():
            keep[number][row[later & (part == number)]] = False


def heldout_threshold(folders: list[Path], keep: list[Array], fraction: float) -> int:
    """The largest hash of a held-out document, -1 for none: so copies of a document fall on the same side.

    The hashes are as good as uniform, so a share of them is a share of the documents; where that is too few, two are
    held out, and two are left to train on.

    Raises:
        ValueError: there are not four different documents.
    """
    if fraction == 0.0:
        return -1
    low = high = np.empty(0, dtype=np.uint64)
    for digests, mask in zip(_digests(folders), keep, strict=True):
        unique = np.unique(digests[mask])
        low = np.unique(np.concatenate([low, unique[:4]]))[:4]
        high = np.unique(np.concatenate([high, unique[-4:]]))[-4:]
    if low.size < 4:
        raise ValueError(
            f"the corpus has {low.size} different documents; expected at least 4, 2 for training and 2 "
            "held out (or set heldout_fraction to 0); if a line is a document, set boundary=line"
        )
    return min(max(int(fraction * 2**64), int(low[1])), int(high[-3]))
