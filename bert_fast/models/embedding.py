"""Text embeddings: tokenize in windows, pack texts of similar length without padding, pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast._progress import ProgressBar
from bert_fast.models.config import BertConfig, longest_input

if TYPE_CHECKING:
    from tokenizers import Tokenizer

POOLINGS = ("cls", "mean", "max", "pooler")
WINDOW = 4096  # texts tokenized at once; bounds the memory


def pack(sequences: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Pack token ids of single segments.

    Args:
        sequences: B sequences of token ids.
        device: of the result.

    Returns:
        Keywords for a model's forward: input_ids and token_type_ids int64 (T,), cu_seqlens int32 (B+1,), max_seqlen.
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
    """Pool packed hidden states to one vector per sequence, in float32.

    Args:
        hidden: (T, E) floating point.
        cu_seqlens: int32 (B+1,); no sequence is empty.
        pooling: "cls" takes the first token, "mean" and "max" reduce all tokens, "pooler" takes `pooler_output`.
        pooler_output: (B, E), for pooling="pooler".

    Returns:
        (B, E) float32.

    Raises:
        ValueError: `pooling` is unknown, or it is "pooler" and `pooler_output` is None.
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
    """Group indices to batches of at most `batch_tokens` tokens, longest first; a longer text is a batch by itself."""
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
    """Embed texts. `BertModel.encode` calls this with the model's tokenizer.

    Texts are tokenized `WINDOW` at a time, sorted by length and packed: apart from the result, peak memory is
    independent of their number. Several threads may share one model and tokenizer.

    Args:
        model: a BertModel in eval mode, or transformers' (fused or not) that returns last_hidden_state; runs on its
            device.
        tokenizer: as `bert_fast.data.load_tokenizer` returns it.
        texts: any number of strings.
        pooling: "cls", "mean", "max" or "pooler", see `pool`.
        normalize: scale each vector to length 1.
        max_seqlen: longer texts are truncated to this number of tokens; None for the model's maximum.
        batch_tokens: texts of similar length are packed up to this; a longer text is a batch by itself.
        show_progress_bar: on stderr, with tqdm.

    Returns:
        (len(texts), E) float32 on the CPU, in the order of `texts`; its `.numpy()` shares the memory.

    Raises:
        TypeError: `texts` is one string.
        ValueError: `pooling` is unknown, `batch_tokens` is less than 1, `max_seqlen` exceeds the model's maximum, or
            the tokenizer pads or truncates.
        ImportError: `show_progress_bar` is True and tqdm is not installed.
    """
    config: Any = model.config
    longest = _check_arguments(config, tokenizer, texts, pooling, max_seqlen, batch_tokens)
    num_trailing = _num_trailing_special(tokenizer)
    vectors = torch.empty(len(texts), config.hidden_size)
    with ProgressBar(len(texts), shown=show_progress_bar, unit="text", required=True) as bar:
        for start in range(0, len(texts), WINDOW):
            window = list(texts[start : start + WINDOW])
            encodings = tokenizer.encode_batch_fast(window)
            ids = [_truncate(encoding.ids, longest, num_trailing) for encoding in encodings]
            for indices in batches_by_length([len(sequence) for sequence in ids], batch_tokens):
                hidden, cu_seqlens, pooler_output = _forward(model, [ids[index] for index in indices])
                pooled = pool(hidden, cu_seqlens, pooling, pooler_output)
                if normalize:
                    pooled = torch.nn.functional.normalize(pooled, dim=-1)
                vectors[torch.tensor(indices) + start] = pooled.cpu()
                bar.update(len(indices))
    return vectors


def _check_arguments(
    config: Any, tokenizer: Tokenizer, texts: Sequence[str], pooling: str, max_seqlen: int | None, batch_tokens: int
) -> int:
    """The maximum number of tokens of a text; raises where an argument of `encode` is wrong."""
    if isinstance(texts, str):
        raise TypeError(f"texts is one str ({texts[:20]!r}); expected a sequence of str: [text]")
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(POOLINGS)}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; expected 1 or more")
    if (count := tokenizer.get_vocab_size()) > config.vocab_size:
        raise ValueError(f"the tokenizer has {count} tokens and the model {config.vocab_size} word embeddings")
    longest = longest_input(config)
    if max_seqlen is not None and not 2 <= max_seqlen <= longest:
        raise ValueError(f"max_seqlen is {max_seqlen}; expected 2 to {longest}, the model's maximum")
    if tokenizer.padding is not None or tokenizer.truncation is not None:
        raise ValueError("the tokenizer pads or truncates; call its no_padding() and no_truncation(), use max_seqlen")
    return max_seqlen or longest


def _num_trailing_special(tokenizer: Tokenizer) -> int:
    """The number of special tokens that the tokenizer appends to a text."""
    mask = tokenizer.encode("a").special_tokens_mask
    return mask[::-1].index(0) if 0 in mask else 1


def _truncate(ids: list[int], longest: int, num_trailing: int) -> list[int]:
    """At most `longest` tokens, the last `num_trailing` among them."""
    # The tokenizer's own truncation is a state of the tokenizer, which threads share.
    return ids if len(ids) <= longest else ids[: longest - num_trailing] + ids[len(ids) - num_trailing :]


def _forward(model: nn.Module, sequences: list[list[int]]) -> tuple[Tensor, Tensor, Tensor | None]:
    """hidden (T, E), cu_seqlens and pooler_output of one batch."""
    inputs = pack(sequences, next(model.parameters()).device)
    cu_seqlens = inputs["cu_seqlens"]
    if isinstance(model.config, BertConfig):  # ours: takes packed input
        out = model(**inputs, return_dict=True)
        hidden = out.last_hidden_state
    else:
        mask = torch.arange(inputs["max_seqlen"], device=cu_seqlens.device) < cu_seqlens.diff().unsqueeze(1)
        ids = torch.zeros_like(mask, dtype=torch.int64).masked_scatter_(mask, inputs["input_ids"])
        out = model(input_ids=ids, attention_mask=mask.long(), return_dict=True)
        hidden = out.last_hidden_state[mask]
    return hidden, cu_seqlens, getattr(out, "pooler_output", None)
