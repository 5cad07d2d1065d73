"""From token vectors to the vector of a text: pooling, and the precision of the result."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

# sentence-transformers' names, and "pooler", the output of BERT's own pooler.
POOLINGS = ("cls", "mean", "max", "mean_sqrt_len_tokens", "weightedmean", "lasttoken", "pooler")
PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def check_pooling(pooling: Any) -> tuple[str, ...]:
    """The names in `pooling`, one or several. ValueError where one is unknown or there is none."""
    names = (pooling,) if isinstance(pooling, str) else pooling
    if isinstance(names, (list, tuple)) and names and all(name in POOLINGS for name in names):
        return tuple(names)
    raise ValueError(f"pooling is {reprlib.repr(pooling)}; expected one of {', '.join(POOLINGS)}, or several of them")


def pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    pooling: str | Sequence[str],
    pooler_output: Tensor | None = None,
    *,
    prompt_length: int | Tensor = 0,
) -> Tensor:
    """Pool packed hidden states to one vector per sequence, in float32.

    With tokens h_1 ... h_n, "mean" is sum(h_i) / n, "mean_sqrt_len_tokens" sum(h_i) / sqrt(n), "weightedmean"
    sum(i * h_i) / sum(i), "max" the maximum of each component, "cls" h_1, "lasttoken" h_n.

    Args:
        hidden: (T, E) floating point.
        cu_seqlens: int32 (B+1,); no sequence is empty.
        pooling: one of `POOLINGS`, or several, whose vectors are concatenated; "pooler" takes `pooler_output`.
        pooler_output: (B, E), for "pooler".
        prompt_length: leave out this number of tokens at the start of each sequence, all of which are longer: one for
            all, or int64 (B,). The weights of "weightedmean" still count them.

    Returns:
        (B, E) float32; (B, n * E) for n names.

    Raises:
        ValueError: `pooling` is unknown, or has "pooler" and `pooler_output` is None.
    """
    names, starts = check_pooling(pooling), cu_seqlens[:-1].long()
    lengths = cu_seqlens.long().diff()
    tokens = hidden.float()
    positions: Tensor | None = None  # of a token in its sequence, from 0
    without_prompt = isinstance(prompt_length, Tensor) or prompt_length > 0
    if without_prompt or "weightedmean" in names:
        positions = torch.arange(tokens.shape[0], device=tokens.device) - starts.repeat_interleave(lengths)
    if without_prompt:
        assert positions is not None
        first = prompt_length.repeat_interleave(lengths) if isinstance(prompt_length, Tensor) else prompt_length
        kept = positions >= first
        tokens, positions, lengths = tokens[kept], positions[kept], lengths - prompt_length
        starts = lengths.cumsum(0) - lengths
    vectors = []
    for name in names:
        if name == "pooler":
            if pooler_output is None:
                raise ValueError("pooling is 'pooler' and the model has no pooler; choose cls, mean or max")
            vectors.append(pooler_output.float())
        elif name == "cls":
            vectors.append(tokens[starts])
        elif name == "lasttoken":
            vectors.append(tokens[starts + lengths - 1])
        elif name == "mean_sqrt_len_tokens":
            means = torch.segment_reduce(tokens, "mean", lengths=lengths, axis=0)
            vectors.append(means * lengths.unsqueeze(1).sqrt())
        elif name == "weightedmean":
            assert positions is not None
            weights = (positions + 1).to(tokens.dtype).unsqueeze(1)
            sums = torch.segment_reduce(tokens * weights, "sum", lengths=lengths, axis=0)
            vectors.append(sums / torch.segment_reduce(weights, "sum", lengths=lengths, axis=0))
        else:
            vectors.append(torch.segment_reduce(tokens, name, lengths=lengths, axis=0))
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=1)


def check_precision(precision: Any) -> None:
    """ValueError unless `precision` is one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {reprlib.repr(precision)}; expected one of {', '.join(PRECISIONS)}")


def quantize_embeddings(vectors: np.ndarray[Any, Any], precision: str, ranges: Any = None) -> np.ndarray[Any, Any]:
    """Vectors in fewer bits, as sentence-transformers' function of this name.

    "uint8" is floor((x - low) / (high - low) * 255), where low and high are the component's `ranges`; "int8" is 128
    less. "ubinary" is a bit a component, 1 where it is positive, 8 in a byte; "binary" is 128 less.

    Args:
        vectors: (n, D) floating point.
        precision: one of `PRECISIONS`.
        ranges: (2, D), the minimum and maximum of each component, for int8 and uint8; None for those of `vectors`, of
            which more than one is then needed.

    Returns:
        (n, D) float32, int8 or uint8; for binary int8, for ubinary uint8, (n, ceil(D / 8)).

    Raises:
        ValueError: `precision` is unknown, or the ranges would be those of a single vector.
    """
    import numpy as np

    check_precision(precision)
    if precision == "float32":
        return vectors.astype(np.float32, copy=False)
    if precision.endswith("binary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if precision == "ubinary" else (bits ^ 128).view(np.int8)  # 128 less, modulo 256
    if ranges is None and len(vectors) == 1:
        raise ValueError(
            f"precision is {precision!r} and there is a single vector; its components have no range: pass several "
            "texts, or call bert_fast.models.pooling.quantize_embeddings with ranges"
        )
    if not len(vectors):
        return vectors.astype(np.int8 if precision == "int8" else np.uint8)
    low, high = (vectors.min(axis=0), vectors.max(axis=0)) if ranges is None else np.asarray(ranges, dtype=np.float32)
    steps = (high - low) / 255
    steps = np.where(steps == 0, 1, steps)
    levels = np.clip(np.floor((vectors - low) / steps), 0, 255)
    return levels.astype(np.uint8) if precision == "uint8" else (levels - 128).astype(np.int8)
