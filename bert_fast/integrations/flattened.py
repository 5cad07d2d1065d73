"""Flattened inputs: a batch as one row without padding, as transformers' flash attention takes it.

`DataCollatorWithFlattening` of transformers and the automatic unpadding of sentence-transformers make them: input_ids
(1, T) with cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k, or with position_ids that restart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
LENGTHS = ("max_length_q", "max_length_k")
REGISTERED_NAME = "bert_fast"  # of `bert_fast.register`
FLATTENED_ARGUMENTS = {*BOUNDARIES, *LENGTHS, "seq_idx"}  # the last repeats the others


class Flattened(NamedTuple):
    """The sequences of one row of T tokens."""

    cu_seqlens: Tensor  # int32 (B+1,)
    max_seqlen: int
    position_ids: Tensor  # int64 (1, T)


def is_flash(config: Any) -> bool:
    """Whether the attention implementation is a flash attention, of transformers, of the hub's kernels or ours."""
    name = getattr(config, "_attn_implementation", None) or ""
    return "flash" in name or name == REGISTERED_NAME


def why_not_flattened(arguments: Mapping[str, Any], shape: tuple[int, int], longest: int) -> str | None:
    """Why a call with flattened inputs can't run on the kernels, or None, also for a call without.

    Args:
        arguments: of the forward.
        shape: of the ids.
        longest: the maximum length of a sequence.
    """
    given = [name for name in (*BOUNDARIES, *LENGTHS) if arguments.get(name) is not None]
    if not given:
        return None
    if len(given) < 4:
        return f"{', '.join(given)} came alone; expected {', '.join((*BOUNDARIES, *LENGTHS))}, all four"
    if arguments.get("attention_mask") is not None:
        return "cu_seq_lens_q came with attention_mask, which takes precedence in transformers"
    if shape[0] != 1:
        return f"cu_seq_lens_q came with {shape[0]} rows; expected flattened inputs of one row"
    starts, ends = (arguments[name] for name in BOUNDARIES)
    if not all(isinstance(x, Tensor) and x.dim() == 1 and not x.is_floating_point() for x in (starts, ends)):
        return "cu_seq_lens_q or cu_seq_lens_k is no tensor of integers with one dimension"
    if starts is not ends and (starts.shape != ends.shape or not _equal(starts, ends)):
        return "cu_seq_lens_q and cu_seq_lens_k differ; the kernels are for self-attention"
    if not torch.compiler.is_compiling() and int(arguments["max_length_q"]) > longest:
        return "the sequences are longer than config.max_position_embeddings allows"
    return None


def _equal(x: Tensor, y: Tensor) -> bool:
    # Values on a GPU are not read: that would synchronize.
    return x.device.type != "cpu" or torch.compiler.is_compiling() or torch.equal(x, y)


def restarts(config: Any, arguments: Mapping[str, Any], shape: tuple[int, int]) -> bool:
    """Whether position_ids alone may separate sequences: in one row, without mask, for a flash attention."""
    positions = arguments.get("position_ids")
    return (
        is_flash(config)
        and positions is not None
        and arguments.get("attention_mask") is None
        and arguments.get("cu_seq_lens_q") is None
        and shape[0] == 1
        and shape[1] > 1
    )


def flattened_of(config: Any, arguments: Mapping[str, Any], shape: tuple[int, int], first: int) -> Flattened | None:
    """The sequences of a call that `why_not_flattened` has no reason against; None where each row is a sequence.

    Args:
        config: the model's.
        arguments: of the forward.
        shape: of the ids, (1, T) where they are flattened.
        first: the position of a sequence's first token; position_ids that start at 0 are moved to it.
    """
    positions: Any = arguments.get("position_ids")
    cu_seqlens = arguments.get("cu_seq_lens_q")
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(torch.int32)
        max_seqlen = int(arguments["max_length_q"])
        if positions is None:
            tokens = torch.arange(shape[1], device=cu_seqlens.device)
            sequences = torch.bucketize(tokens, cu_seqlens[1:].long(), right=True)
            positions = tokens - cu_seqlens.long()[sequences]
    elif restarts(config, arguments, shape):
        # As in transformers: a sequence begins at each smallest position.
        flat = positions.reshape(-1)
        starts = (flat == flat.min()).nonzero().view(-1)
        if len(starts) == 1 or int(starts[0]) != 0:
            return None
        cu_seqlens = torch.cat([starts, starts.new_tensor([shape[1]])]).to(torch.int32)
        max_seqlen = int(cu_seqlens.diff().max())
    else:
        return None
    positions = positions.reshape(1, -1).long()
    return Flattened(cu_seqlens, max_seqlen, positions + first * (positions[:, :1] < first))
