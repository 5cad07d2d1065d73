"""The losses of sentence embeddings, on vectors of texts, of their pairs and of their negatives; summed over rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Vectors:
    """The vectors of a micro-batch of R rows.

    Attributes:
        texts, pairs: (R, E) floating point.
        negatives: (N, E), of any number for each row.
        negative_rows: int64 (N,), the row of each negative, in [0, R).
    """

    texts: Tensor
    pairs: Tensor
    negatives: Tensor
    negative_rows: Tensor

    def truncated(self, width: int) -> Vectors:
        """The first `width` components of each vector."""
        return self._with(lambda x: x[:, :width])

    def normalized(self) -> Vectors:
        """The vectors divided by their length."""
        return self._with(lambda x: F.normalize(x, dim=-1))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Vectors:
        return Vectors(change(self.texts), change(self.pairs), change(self.negatives), self.negative_rows)


def contrastive_loss(vectors: Vectors, temperature: float, same: Tensor) -> Tensor:
    """Multiple negatives ranking: classify the pair of each text among all pairs and negatives, by cosine.

    Args:
        vectors: of R rows and N negatives.
        temperature: divides the cosines.
        same: bool (R, R + N), the pairs and negatives that are no negatives of a row, such as copies of its pair; a
            row's own pair is a candidate all the same.
    """
    unit = vectors.normalized()
    cosines = unit.texts @ torch.cat([unit.pairs, unit.negatives]).T / temperature
    targets = torch.arange(len(unit.texts), device=cosines.device)
    others = same.clone()
    others[targets, targets] = False
    return F.cross_entropy(cosines.masked_fill(others, -torch.inf), targets, reduction="sum")


def triplet_loss(vectors: Vectors, margin: float) -> Tensor:
    """max(0, margin - cos(text, pair) + cos(text, negative)) for each negative; the mean over those of a row."""
    unit = vectors.normalized()
    rows = unit.negative_rows
    closer = (unit.texts[rows] * (unit.pairs[rows] - unit.negatives)).sum(-1)
    counts = rows.bincount(minlength=len(unit.texts))
    return ((margin - closer).clamp(min=0) / counts[rows]).sum()


def cosine_loss(vectors: Vectors, scores: Tensor) -> Tensor:
    """(cos(text, pair) - score)^2; `scores` is (R,)."""
    return (_cosines(vectors) - scores).square().sum()


def cosent_loss(vectors: Vectors, scores: Tensor, temperature: float) -> Tensor:
    """CoSENT: for all pairs i and j of texts with score_i < score_j,

        R * log(1 + sum exp((cos_i - cos_j) / temperature))

    Args:
        vectors: of R rows.
        scores: (R,), of which only the order counts.
        temperature: divides the cosines.
    """
    cosines = _cosines(vectors) / temperature
    differences = cosines[:, None] - cosines
    ordered = scores[:, None] < scores
    terms = differences.masked_fill(~ordered, -torch.inf).flatten()
    return len(cosines) * torch.cat([terms.new_zeros(1), terms]).logsumexp(0)


def margin_mse_loss(vectors: Vectors, margins: Tensor) -> Tensor:
    """(text . pair - text . negative - margin)^2, with dot products of the vectors as they are.

    Args:
        vectors: with one negative for each row, in the order of the rows.
        margins: (R,), the teacher's score of the pair minus that of the negative.
    """
    return ((vectors.texts * (vectors.pairs - vectors.negatives)).sum(-1) - margins).square().sum()


def same_texts(texts: Sequence[object], pairs: Sequence[object], negatives: Sequence[object]) -> Tensor:
    """bool (R, R + N): where a pair or negative equals the text of a row, or its pair."""
    numbers: dict[object, int] = {}
    rows, candidates, others = (
        torch.tensor([numbers.setdefault(text, len(numbers)) for text in part], dtype=torch.int64)
        for part in (texts, pairs, negatives)
    )
    columns = torch.cat([candidates, others])
    return (columns == rows[:, None]) | (columns == candidates[:, None])


def _cosines(vectors: Vectors) -> Tensor:
    unit = vectors.normalized()
    return (unit.texts * unit.pairs).sum(-1)
