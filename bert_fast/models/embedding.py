"""Text embeddings: tokenize in windows, pack texts of similar length without padding, pool."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast._ahead import map_ahead
from bert_fast._progress import ProgressBar
from bert_fast.models.config import BertConfig, longest_input
from bert_fast.models.loading import check_flags
from bert_fast.models.texts import as_iterable, as_tokenizer, check_integer_argument, evaluating, text_windows

if TYPE_CHECKING:
    import numpy as np
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


def batches_by_length(lengths: Sequence[int], batch_tokens: int, batch_size: int | None = None) -> Iterator[list[int]]:
    """Group indices to batches of at most `batch_tokens` tokens, longest first; a longer text is a batch by itself.

    Args:
        batch_size: the maximum number of indices in a batch; None for any number.
    """
    batch: list[int] = []
    total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and (total + lengths[index] > batch_tokens or len(batch) == batch_size):
            yield batch
            batch, total = [], 0
        batch.append(index)
        total += lengths[index]
    if batch:
        yield batch


def encode(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Iterable[str],
    *,
    pooling: str = "mean",
    normalize: bool = False,
    normalize_embeddings: bool = False,
    max_seqlen: int | None = None,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
    convert_to_numpy: bool = False,
    convert_to_tensor: bool = False,
    show_progress_bar: bool | None = False,
) -> Tensor | np.ndarray[Any, Any]:
    """Embed texts. `BertModel.encode` calls this with the model's tokenizer.

    Texts are tokenized `WINDOW` at a time, in a thread while the model runs on the window before, sorted by length and
    packed: apart from the result, peak memory is independent of their number. Of a text with more than `max_seqlen`
    tokens only a part is tokenized, which has the same first tokens (`bert_fast.data.leading`). The model runs in eval
    mode; then every module has the mode again that it had. Several threads may share one model that is in eval mode,
    and one tokenizer.

    Args:
        model: a BertModel, or transformers' (fused or not) that returns last_hidden_state; runs on its device.
        tokenizer: as `bert_fast.data.load_tokenizer` returns it, or transformers' fast one.
        texts: a str, or any number of them: a sequence, an iterator, a Series, an array.
        pooling: "cls", "mean", "max" or "pooler", see `pool`.
        normalize: scale each vector to length 1. `normalize_embeddings` is sentence-transformers' name for it.
        max_seqlen: longer texts are truncated to this number of tokens; None for the model's maximum.
        batch_tokens: texts of similar length are packed up to this; a longer text is a batch by itself.
        batch_size: the maximum number of texts in a batch; None for any number.
        convert_to_numpy: return a NumPy array. `convert_to_tensor`, the default, takes precedence, as in
            sentence-transformers.
        show_progress_bar: on stderr, with tqdm.

    Returns:
        (number of texts, E) float32 on the CPU, in the order of `texts`; (E,) for a str.

    Raises:
        TypeError: `texts` is no str and has none, or a text is none, by its index; or an argument has another type.
        ValueError: `pooling` is unknown, a number is out of range, or the tokenizer pads or truncates.
        ImportError: `show_progress_bar` is True and tqdm is not installed.
    """
    from bert_fast.data.tokenizer import check_rows  # tokenizers is optional

    config: Any = model.config
    longest = _check_arguments(config, pooling, max_seqlen, batch_tokens, batch_size)
    flags = (normalize, normalize_embeddings, convert_to_numpy, convert_to_tensor, show_progress_bar or False)
    check_flags(**dict(zip(_FLAGS, flags, strict=True)))
    tokenizer = as_tokenizer(tokenizer)
    check_rows(tokenizer, config.vocab_size, "encode")
    ids_of = partial(_leading_ids, tokenizer, longest, _num_trailing_special(tokenizer))
    batches = (batch_tokens, batch_size)
    texts = [texts] if (single := isinstance(texts, str)) else as_iterable(texts)
    count = len(texts) if isinstance(texts, Sized) else None
    vectors: list[Tensor] = []
    progress = ProgressBar(count, shown=bool(show_progress_bar), unit="text", required=True)
    with evaluating(model), progress as bar, closing(map_ahead(ids_of, text_windows(texts, WINDOW))) as windows:
        for ids in windows:
            vectors.append(_embed(model, ids, pooling, batches, bar, normalize=normalize or normalize_embeddings))
    out = _concatenate(vectors, config.hidden_size)
    out = out[0] if single else out
    return out.numpy() if convert_to_numpy and not convert_to_tensor else out


def _concatenate(parts: list[Tensor], width: int) -> Tensor:
    """`parts`, of (B, width) each, as one ordinary tensor; the list is emptied, to free their memory one by one."""
    with torch.inference_mode(False):
        out = torch.empty(sum(part.shape[0] for part in parts), width)
        start = out.shape[0]
        while parts:
            part = parts.pop()
            start -= part.shape[0]
            out[start : start + part.shape[0]] = part
    return out


_FLAGS = ("normalize", "normalize_embeddings", "convert_to_numpy", "convert_to_tensor", "show_progress_bar")


def _embed(
    model: nn.Module,
    ids: list[list[int]],
    pooling: str,
    batches: tuple[int, int | None],
    bar: ProgressBar,
    *,
    normalize: bool,
) -> Tensor:
    """The vectors of sequences of token ids: (B, E)."""
    config: Any = model.config
    with torch.inference_mode(False):  # an ordinary tensor, which takes part in training
        vectors = torch.empty(len(ids), config.hidden_size)
    with torch.inference_mode():
        for indices in batches_by_length([len(sequence) for sequence in ids], *batches):
            hidden, cu_seqlens, pooler_output = _forward(model, [ids[index] for index in indices])
            pooled = pool(hidden, cu_seqlens, pooling, pooler_output)
            if normalize:
                pooled = torch.nn.functional.normalize(pooled, dim=-1)
            vectors[torch.tensor(indices)] = pooled.cpu()
            bar.update(len(indices))
    return vectors


def _check_arguments(
    config: Any, pooling: Any, max_seqlen: int | None, batch_tokens: int, batch_size: int | None
) -> int:
    """The maximum number of tokens of a text; raises where an argument of `encode` is wrong."""
    if pooling not in POOLINGS:
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(POOLINGS)}")
    check_integer_argument("batch_tokens", batch_tokens, 1)
    if batch_size is not None:
        check_integer_argument("batch_size", batch_size, 1)
    longest = longest_input(config)
    if max_seqlen is not None:
        check_integer_argument("max_seqlen", max_seqlen, 2, longest, ", the model's maximum")
    return int(max_seqlen or longest)


def _num_trailing_special(tokenizer: Tokenizer) -> int:
    """The number of special tokens that the tokenizer appends to a text."""
    mask = tokenizer.encode("a").special_tokens_mask
    return mask[::-1].index(0) if 0 in mask else 1


def _leading_ids(tokenizer: Tokenizer, longest: int, num_trailing: int, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, truncated to `longest`; of a long text only a part is tokenized.

    Raises:
        ValueError: a text has none.
    """
    from bert_fast.data.leading import encode_leading

    encodings = encode_leading(
        tokenizer, texts, longest, tokenizer.encode_batch_fast, lambda encoding: len(encoding) > longest
    )
    ids = [_truncate(encoding.ids, longest, num_trailing) for encoding in encodings]
    if not all(ids):
        raise ValueError(f"the text {texts[ids.index([])]!r} has no tokens: the tokenizer adds no special tokens")
    return ids


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
