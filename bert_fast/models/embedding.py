"""Text embeddings: tokenize in windows, pack texts of similar length without padding, pool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bert_fast._ahead import map_ahead
from bert_fast._progress import ProgressBar
from bert_fast.models.config import BertConfig, longest_input
from bert_fast.models.loading import check_flags
from bert_fast.models.pooling import check_precision, pool, quantize_embeddings
from bert_fast.models.sentence import SentenceModules
from bert_fast.models.texts import (
    Truncation,
    as_iterable,
    as_tokenizer,
    check_integer_argument,
    evaluating,
    text_windows,
)

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Encoding, Tokenizer

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
    pooling: str | Sequence[str] | None = None,
    prompt: str | None = None,
    prompt_name: str | None = None,
    task: str | None = None,
    normalize: bool = False,
    normalize_embeddings: bool = False,
    truncate_dim: int | None = None,
    precision: str = "float32",
    max_seqlen: int | None = None,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
    convert_to_numpy: bool = False,
    convert_to_tensor: bool = False,
    show_progress_bar: bool | None = False,
    modules: SentenceModules | None = None,
) -> Tensor | np.ndarray[Any, Any]:
    """Embed texts. `BertModel.encode` calls this with the tokenizer and the modules of the model's folder.

    Texts are tokenized `WINDOW` at a time, in a thread while the model runs on the window before, sorted by length and
    packed: apart from the result, peak memory is independent of their number. Of a text with more than `max_seqlen`
    tokens only a part is tokenized, which has the same first tokens (`bert_fast.data.leading`). The model runs in eval
    mode; then every module has the mode again that it had. Several threads may share one model that is in eval mode,
    and one tokenizer.

    Args:
        model: a BertModel, or transformers' (fused or not) that returns last_hidden_state; runs on its device.
        tokenizer: as `bert_fast.data.load_tokenizer` returns it, or transformers' fast one.
        texts: a str, or any number of them: a sequence, an iterator, a Series, an array.
        pooling: one of `bert_fast.models.pooling.POOLINGS`, or several, whose vectors are concatenated, in place of the
            pooling and all other modules of `modules`; None for those of `modules`.
        prompt: a text put before each text; "" for none.
        prompt_name: the name of one of the prompts of `modules`; None for its default prompt, if it has one.
        task: "query" or "document": the prompt of this name, and its own maximum length where there is one.
        normalize: scale each vector to length 1, also where no module does. `normalize_embeddings` is
            sentence-transformers' name for it.
        truncate_dim: the number of components to return, before they are scaled; None for all, or as `modules` says.
        precision: "float32", or "int8", "uint8", "binary" or "ubinary", see
            `bert_fast.models.pooling.quantize_embeddings`: int8 and uint8 depend on the range of these vectors.
        max_seqlen: longer texts are truncated to this number of tokens; None for that of `modules`, or the model's
            maximum.
        batch_tokens: texts of similar length are packed up to this; a longer text is a batch by itself.
        batch_size: the maximum number of texts in a batch; None for any number.
        convert_to_numpy: return a NumPy array. `convert_to_tensor`, the default, takes precedence, as in
            sentence-transformers.
        show_progress_bar: on stderr, with tqdm.
        modules: how texts become vectors; None for the mean of all tokens.

    Returns:
        (number of texts, D) float32 on the CPU, in the order of `texts`; (D,) for a str. D is the hidden size E unless
        `modules`, several poolings or `truncate_dim` change it. Of another dtype or width where `precision` says so.

    Raises:
        TypeError: `texts` is no str and has none, or a text is none, by its index; or an argument has another type.
        ValueError: `pooling` is unknown, a number is out of range, there is no such prompt, `modules` has one that
            can't be applied, or the tokenizer pads or truncates.
        ImportError: `show_progress_bar` is True and tqdm is not installed.
    """
    modules = _chosen(modules, pooling)
    check_integer_argument("batch_tokens", batch_tokens, 1)
    if batch_size is not None:
        check_integer_argument("batch_size", batch_size, 1)
    flags = (normalize, normalize_embeddings, convert_to_numpy, convert_to_tensor, show_progress_bar or False)
    check_flags(**dict(zip(_FLAGS, flags, strict=True)))
    check_precision(precision)
    options: Any = {"prompt": prompt, "prompt_name": prompt_name, "task": task, "max_seqlen": max_seqlen}
    tokens = TextTokens.of(model, tokenizer, modules, **options)
    width = embedding_width(model, modules, truncate_dim)
    texts = [texts] if (single := isinstance(texts, str)) else as_iterable(texts)
    count = len(texts) if isinstance(texts, Sized) else None
    parts: list[Tensor] = []
    progress = ProgressBar(count, shown=bool(show_progress_bar), unit="text", required=True)
    with evaluating(model), progress as bar, closing(map_ahead(tokens, text_windows(texts, WINDOW))) as windows:
        for ids in windows:
            parts.append(
                embed_ids(
                    model,
                    ids,
                    modules=modules,
                    prompt_length=tokens.prompt_length,
                    normalize=normalize or normalize_embeddings,
                    truncate_dim=truncate_dim,
                    batch_tokens=batch_tokens,
                    batch_size=batch_size,
                    progress=bar.update,
                )
            )
    out = _concatenate(parts, width)
    if precision != "float32":
        out = torch.from_numpy(quantize_embeddings(out.numpy(), precision))
    out = out[0] if single else out
    return out.numpy() if convert_to_numpy and not convert_to_tensor else out


def _chosen(modules: SentenceModules | None, pooling: Any) -> SentenceModules:
    modules = modules or SentenceModules()
    modules = modules if pooling is None else modules.with_pooling(pooling)
    modules.check()
    return modules


@dataclass(frozen=True)
class TextTokens:
    """Texts to token ids, with a prompt before them and cut to a maximum length; threads may share it.

    Attributes:
        tokenizer: of the model.
        cut: the truncation.
        prompt: the text put before each text.
        prompt_length: the number of a text's first tokens that are not pooled, for `embed_ids`.
    """

    tokenizer: Tokenizer
    cut: Truncation
    prompt: str
    prompt_length: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        tokenizer: Any,
        modules: SentenceModules,
        *,
        prompt: str | None = None,
        prompt_name: str | None = None,
        task: str | None = None,
        max_seqlen: int | None = None,
    ) -> TextTokens:
        """The arguments are those of `encode`, and so are the errors."""
        from bert_fast.data.tokenizer import check_rows  # tokenizers is optional

        if task not in (None, "query", "document"):
            raise ValueError(f"task is {task!r}; expected 'query', 'document' or None")
        config: Any = model.config
        longest = longest_input(config)
        if max_seqlen is not None:
            check_integer_argument("max_seqlen", max_seqlen, 2, longest, ", the model's maximum")
        longest = int(max_seqlen or modules.task_lengths.get(task or "") or modules.max_seqlen or longest)
        prompt = modules.prompt_of(prompt, prompt_name, task)
        tokenizer = as_tokenizer(tokenizer)
        check_rows(tokenizer, config.vocab_size, "encode")
        cut = Truncation.of(tokenizer, longest, modules.keep)
        length = 0 if modules.include_prompt or not prompt else cut.prompt_length(tokenizer, prompt)
        return cls(tokenizer, cut, prompt, length)

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The token ids of each text. ValueError for a text that has none beside those of the prompt."""
        prompted = [self.prompt + text for text in texts] if self.prompt else texts
        ids = [self.cut(encoding.ids) for encoding in self._encodings(prompted)]
        for sequence, text in zip(ids, texts, strict=True):
            if not sequence:
                raise ValueError(f"the text {text!r} has no tokens: the tokenizer adds no special tokens")
            if len(sequence) <= self.prompt_length:
                raise ValueError(
                    f"the text {text!r} has no tokens beside the {self.prompt_length} of the prompt, which are not "
                    "pooled; expected a shorter prompt"
                )
        return ids

    def _encodings(self, texts: list[str]) -> list[Encoding]:
        """The encodings of texts; where the tail is cut off, of a long text only those of a part."""
        from bert_fast.data.leading import encode_leading

        encode_batch, longest = self.tokenizer.encode_batch_fast, self.cut.longest
        if self.cut.keep != "head":
            return list(encode_batch(texts))
        return encode_leading(self.tokenizer, texts, longest, encode_batch, lambda encoding: len(encoding) > longest)


def embedding_width(model: nn.Module, modules: SentenceModules, truncate_dim: int | None = None) -> int:
    """The number of components of a vector; ValueError where `truncate_dim` is more than there are."""
    with torch.inference_mode():
        width = modules.apply(torch.zeros(1, _pooled_width(model, modules))).shape[1]
    truncate_dim = modules.truncate_dim if truncate_dim is None else truncate_dim
    if truncate_dim is None:
        return width
    check_integer_argument("truncate_dim", truncate_dim, 1, width, ", the width of a vector")
    return truncate_dim


def _pooled_width(model: Any, modules: SentenceModules) -> int:
    size: int = model.config.hidden_size
    with torch.inference_mode():
        tokens = torch.zeros(1, size)
        for step in modules.token_steps:
            tokens = step(tokens)
    return tokens.shape[1] * len(modules.pooling)


def embed_ids(
    model: nn.Module,
    ids: Sequence[list[int]],
    *,
    modules: SentenceModules | None = None,
    prompt_length: int | Sequence[int] = 0,
    normalize: bool = False,
    truncate_dim: int | None = None,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Embed sequences of token ids, as `TextTokens` returns them; threads may share a model that is in eval mode.

    Args:
        model, modules, normalize, truncate_dim, batch_tokens, batch_size: see `encode`.
        ids: B sequences of token ids, in any order; none is empty.
        prompt_length: the number of first tokens that are not pooled, one for all or one for each sequence.
        progress: called after each batch with its number of sequences.

    Returns:
        (B, D) float32 on the CPU, in the order of `ids`.
    """
    modules = modules or SentenceModules()
    width = embedding_width(model, modules, truncate_dim)
    prompts = torch.as_tensor(prompt_length, dtype=torch.int64).expand(len(ids))
    pooled = torch.empty(len(ids), _pooled_width(model, modules))
    with evaluating(model), torch.inference_mode():
        for indices in batches_by_length([len(sequence) for sequence in ids], batch_tokens, batch_size):
            rows = torch.tensor(indices)
            hidden, cu_seqlens, pooler_output = _forward(model, [ids[index] for index in indices])
            if modules.token_steps:  # small modules, on the CPU
                hidden, cu_seqlens = hidden.float().cpu(), cu_seqlens.cpu()
                for step in modules.token_steps:
                    hidden = step(hidden)
            left_out = prompts[rows].to(hidden.device) if prompts.any() else 0
            pooled[rows] = pool(hidden, cu_seqlens, modules.pooling, pooler_output, prompt_length=left_out).cpu()
            if progress is not None:
                progress(len(indices))
        vectors = modules.apply(pooled)[:, :width]
        vectors = nn.functional.normalize(vectors, dim=-1) if normalize else vectors
    with torch.inference_mode(False):  # an ordinary tensor, which takes part in training
        return torch.empty(vectors.shape).copy_(vectors)


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
