"""Texts to vectors: tokenised a window at a time, in packed batches of like length, without padding, any pooling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast._progress import ProgressBar
from bert_fast.models.bert import BertModel
from bert_fast.models.config import longest_input

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOLINGS = ("cls", "mean", "max", "pooler")
WINDOW = 4096  # texts that are tokenised at once: what bounds the memory beside the result


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


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of at most `batch_tokens` tokens, longest first; a longer text is a batch of its own."""
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and total + lengths[index] > batch_tokens:
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch


@torch.inference_mode()
def encode(
    model: nn.Module,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    pooling: str = "mean",
    normalize: bool = False,
    max_seqlen: int | None = None,
    batch_tokens: int = 8192,
    show_progress_bar: bool = False,
) -> Tensor:
    """The vector of each text. `BertModel.encode` is this with the model's own tokenizer.

    Texts are tokenised `WINDOW` at a time, sorted by length and packed, so that the memory beside the result does not
    grow with their number. May run in several threads on one model and tokenizer at once.

    Args:
        model: a BertModel in eval mode, or transformers' (fused or not) that returns last_hidden_state; runs on its
            device.
        tokenizer: as `bert_fast.data.load_tokenizer` gives it.
        texts: any number; the order of the result is theirs.
        pooling: cls, mean, max or pooler, see `pool`.
        normalize: scale each vector to length 1.
        max_seqlen: longer texts are cut to so many tokens; the model's maximum if None.
        batch_tokens: texts of like length are packed up to this; a longer one is a batch of its own.
        show_progress_bar: on stderr, by tqdm.

    Returns:
        (len(texts), E) float32 on the CPU; its `.numpy()` shares the memory.

    Raises:
        TypeError: `texts` is one string.
        ValueError: the pooling is unknown, `batch_tokens` is less than 1, `max_seqlen` is over the model's maximum, or
            the tokenizer pads or cuts by itself.
        ImportError: a progress bar is asked for and tqdm is not installed.
    """
    config: Any = model.config
    longest = _checked(config, tokenizer, texts, pooling, max_seqlen, batch_tokens)
    ending = _special_behind(tokenizer)
    vectors = torch.empty(len(texts), config.hidden_size)
    with ProgressBar(len(texts), shown=show_progress_bar, unit="text", required=True) as bar:
        for start in range(0, len(texts), WINDOW):
            window = list(texts[start : start + WINDOW])
            ids = [_cut(found.ids, longest, ending) for found in tokenizer.encode_batch_fast(window)]
            for indices in batches_by_length([len(sequence) for sequence in ids], batch_tokens):
                found = pool(*_hidden(model, [ids[index] for index in indices], pooling))
                if normalize:
                    found = torch.nn.functional.normalize(found, dim=-1)
                vectors[torch.tensor(indices) + start] = found.cpu()
                bar.update(len(indices))
    return vectors


def _checked(
    config: Any, tokenizer: Tokenizer, texts: Sequence[str], pooling: str, max_seqlen: int | None, batch_tokens: int
) -> int:
    """The most tokens of a text; raises where an argument of `encode` is wrong."""
    if isinstance(texts, str):
        raise TypeError(f"texts is one str ({texts[:20]!r}); expected a sequence of them: [text]")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(POOLINGS)}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; expected 1 or more")
    longest = longest_input(config)
    if max_seqlen is not None and not 2 <= max_seqlen <= longest:
        raise ValueError(f"max_seqlen is {max_seqlen}; expected 2 to {longest}, the model's maximum")
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise ValueError("the tokenizer pads or cuts; call its no_padding() and no_truncation(), max_seqlen cuts here")
    return max_seqlen or longest


def _special_behind(tokenizer: Tokenizer) -> int:
    """How many special tokens the tokenizer puts behind a text."""
    mask = tokenizer.encode("a").special_tokens_mask
    return mask[::-1].index(0) if 0 in mask else 1


def _cut(ids: list[int], longest: int, ending: int) -> list[int]:
    """At most `longest` tokens, of which the last `ending` stay. A tokenizer that is told to cut serves one thread."""
    return ids if len(ids) <= longest else ids[: longest - ending] + ids[len(ids) - ending :]


def _hidden(model: nn.Module, sequences: list[list[int]], pooling: str) -> tuple[Tensor, Tensor, str, Tensor | None]:
    """The arguments of `pool` for one batch."""
    inputs = packed(sequences, next(model.parameters()).device)
    ends = inputs["cu_seqlens"]
    if isinstance(model, BertModel):
        out = model(**inputs, return_dict=True)
        hidden = out.last_hidden_state
    else:
        mask = torch.arange(inputs["max_seqlen"], device=ends.device) < ends.diff().unsqueeze(1)
        ids = torch.zeros_like(mask, dtype=torch.int64).masked_scatter_(mask, inputs["input_ids"])
        out = model(input_ids=ids, attention_mask=mask.long(), return_dict=True)
        hidden = out.last_hidden_state[mask]
    return hidden, ends, pooling, getattr(out, "pooler_output", None)
