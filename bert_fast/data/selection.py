"""Selects the documents to keep and to hold out, by their 64-bit hashes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bert_fast.data.host_numpy import Array

_BUCKET = 2**23  # number of documents whose hashes are sorted at once; about 50 bytes each


def _digests(folders: list[Path]) -> Iterator[Array]:
    for folder in folders:
        yield np.load(folder / "digests.npy")


def select(folders: list[Path], max_documents: int | None, *, drop_duplicates: bool) -> tuple[list[Array], int]:
    """The documents to keep, bool (documents,) for each finished part, and the number of duplicates dropped."""
    keep = [np.ones(digests.size, dtype=bool) for digests in _digests(folders)]
    remaining = sum(mask.size for mask in keep) if max_documents is None else max_documents
    for mask in keep:
        mask[remaining:] = False
        remaining -= min(remaining, mask.size)
    before = sum(int(mask.sum()) for mask in keep)
    if drop_duplicates:
        _drop_later(folders, keep, max(1, -(-before // _BUCKET)))
    return keep, before - sum(int(mask.sum()) for mask in keep)


def _drop_later(folders: list[Path], keep: list[Array], buckets: int) -> None:
    """Keep only the first document with a given hash; hashes are sorted in buckets, by remainder, to bound memory."""
    for bucket in range(buckets):
        columns = []
        for number, digests in enumerate(_digests(folders)):
            rows = np.flatnonzero(keep[number] & (digests % np.uint64(buckets) == bucket))
            columns.append((digests[rows], np.full(rows.size, number, dtype=np.int32), rows.astype(np.int32)))
        digests, part, row = (np.concatenate(column) for column in zip(*columns, strict=True))
        later = np.ones(digests.size, dtype=bool)
        later[np.unique(digests, return_index=True)[1]] = False
        for number in np.unique(part[later]).tolist():
            keep[number][row[later & (part == number)]] = False


def heldout_threshold(folders: list[Path], keep: list[Array], fraction: float) -> int:
    """The largest hash of a held-out document, -1 for none; copies of a document are in the same split.

    Hashes are uniform, so a fraction of their range is that fraction of the documents. At least two different documents
    are held out, and at least two are left for training.

    Raises:
        ValueError: there are fewer than four different documents.
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
            "held out (or set heldout_fraction to 0); if each line is a document, set boundary=line"
        )
    return min(max(int(fraction * 2**64), int(low[1])), int(high[-3]))
