"""Texts to vectors: packed batches, no padding, any pooling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast.models.config import longest_input

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOLINGS = ("cls", "mean", "max", "pooler")


def packed(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Token ids (of single segments) as the packed input of a model: keywords for its forward.

    Returns:
        input_ids, token_type_ids int64 (T,), cu_seqlens int32 (B+1,), max_seqlen.
    """
    lengths = torch.tensor([len(ids) for ids in sequences], dtype=torch.int64)
    cu_seqlens = torch.zeros(len(sequences) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    input_ids = torch.tensor([i for ids in sequences for i in ids], dtype=torch.int64)
    return {
        "input_ids": input_ids.to(device),
        "token_type_ids": torch.zeros_like(input_ids).to(device),
        "cu_seqlens": cu_seqlens.to(device),
        "max_seqlen": int(lengths.max()) if len(sequences) else 0,
    }


def pool(hidden: Tensor, cu_seqlens: Tensor, pooling: str, pooler_output: Tensor | None = None) -> Tensor:
    """One vector a sequence from packed hidden states, in fp32.

    Args:
        hidden: (T, E).
        cu_seqlens: int32 (B+1,); no sequence is empty.
        pooling: cls takes the first token, mean and max go over all tokens, pooler takes `pooler_output`.
        pooler_output: (B, E), for pooling="pooler".

    Returns:
        (B, E) float32.
    """
    if pooling == "pooler":
        if pooler_output is None:
            raise ValueError("pooling is 'pooler' and the model has no pooler; choose cls, mean or max")
        return pooler_output.float()
    if pooling == "cls":
        return hidden[cu_seqlens[:-1].long()].float()
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(POOLINGS)}")
    return torch.segment_reduce(hidden.float(), pooling, lengths=cu_seqlens.long().diff(), axis=0)


def batches_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[list[int]]:
    """Indices in batches of at most `tokens_per_batch` tokens, longest first; a longer text is a batch of its own."""
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and total + lengths[index] > tokens_per_batch:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch


@torch.inference_mode()
def embed(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    normalize: bool = False,
    max_seqlen: int | None = None,
    tokens_per_batch: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """The vector of each text.

    Args:
        model: a BertModel in eval mode; runs on its device.
        tokenizer: as `bert_fast.data.load_tokenizer` gives it.
        texts: any number; the order of the result is theirs.
        pooling: cls, mean, max or pooler, see `pool`.
        normalize: scale each vector to length 1.
        max_seqlen: longer texts are cut to so many tokens; the model's maximum if None.
        tokens_per_batch: texts of like length are packed up to this.
        progress: called with the number of texts after each batch.

    Returns:
        (len(texts), E) float32 on the CPU.

    Raises:
        ValueError: the pooling is unknown, or `max_seqlen` is over the model's maximum.
    """
    config: Any = model.config
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(POOLINGS)}")
    longest = longest_input(config)
    if max_seqlen is not None and not 2 <= max_seqlen <= longest:
        raise ValueError(f"max_seqlen is {max_seqlen}; expected 2 to {longest}, the model's maximum")
    tokenizer.enable_truncation(max_seqlen or longest)
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    tokenizer.no_truncation()
    device = next(model.parameters()).device
    vectors = torch.empty(len(texts), config.hidden_size)
    for indices in batches_by_length([len(sequence) for sequence in ids], tokens_per_batch):
        inputs = packed([ids[index] for index in indices], device)
        out = model(**inputs)
        found = pool(out.last_hidden_state, inputs["cu_seqlens"], pooling, out.pooler_output)
        if normalize:
            found = torch.nn.functional.normalize(found, dim=-1)
        vectors[indices] = found.cpu()
        if progress is not None:
            progress(len(indices))
    return vectors
