"""Sparse vectors of texts over the vocabulary, from a masked-LM head: SPLADE (Formal et al., 2021)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.models.embedding import WINDOW, TextTokens, batches_by_length, pack
from bert_fast.models.sentence import SentenceModules
from bert_fast.models.texts import as_iterable, check_integer_argument, evaluating, text_windows

LOGIT_ROWS = 512  # tokens whose logits are in memory at once; a longer text alone has more


def encode_sparse(
    model: nn.Module,
    tokenizer: Any,
    texts: str | Iterable[str],
    *,
    prompt: str | None = None,
    prompt_name: str | None = None,
    task: str | None = None,
    max_active_dims: int | None = None,
    max_seqlen: int | None = None,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
    modules: SentenceModules | None = None,
) -> Tensor:
    """Embed texts as sparse vectors. `BertForMaskedLM.encode_sparse` calls this with the model's tokenizer.

    Component v of a text with tokens t is max_t log(1 + relu(logit[t, v])); the folder of a SparseEncoder may ask for
    the sum over t, or for log(1 + ...) twice.

    Args:
        model: a BertForMaskedLM.
        tokenizer: as `bert_fast.data.load_tokenizer` returns it, or transformers' fast one.
        texts: a str, or any number of them: a sequence, an iterator, a Series, an array.
        prompt, prompt_name, task: see `bert_fast.models.embedding.encode`.
        max_active_dims: keep this number of the largest components; None for all, or as `modules` says.
        max_seqlen: longer texts are truncated to this number of tokens; None for that of `modules`, or the model's
            maximum.
        batch_tokens: texts of similar length are packed up to this; a longer text is a batch by itself.
        batch_size: the maximum number of texts in a batch; None for any number.
        modules: what the model's folder says about texts.

    Returns:
        (number of texts, V) float32, sparse COO and coalesced, on the CPU, in the order of `texts`; (V,) for a str.

    Raises:
        TypeError: the model is another, or a text is no str, by its index; or an argument has another type.
        ValueError: a number is out of range, there is no such prompt, or `modules` can't be applied.
    """
    from bert_fast.models.pretraining import BertForMaskedLM

    if not isinstance(model, BertForMaskedLM):
        raise TypeError(f"model is {type(model).__name__}; expected bert_fast's BertForMaskedLM")
    modules = modules or SentenceModules(pooling=("max",))
    modules.check()
    check_integer_argument("batch_tokens", batch_tokens, 1)
    if batch_size is not None:
        check_integer_argument("batch_size", batch_size, 1)
    if max_active_dims is not None:
        check_integer_argument("max_active_dims", max_active_dims, 1)
    options: Any = {"prompt": prompt, "prompt_name": prompt_name, "task": task, "max_seqlen": max_seqlen}
    tokens = TextTokens.of(model, tokenizer, modules, **options)
    texts = [texts] if (single := isinstance(texts, str)) else as_iterable(texts)
    limits: Any = {"batch_tokens": batch_tokens, "batch_size": batch_size, "max_active_dims": max_active_dims}
    none = torch.empty(2, 0, dtype=torch.int64), torch.empty(0), (0, model.config.vocab_size)
    parts = [torch.sparse_coo_tensor(*none, check_invariants=True)]
    with evaluating(model):
        for window in text_windows(texts, WINDOW):
            parts.append(sparse_ids(model, tokens(window), modules=modules, **limits))
    out = torch.cat(parts).coalesce()
    return out[0] if single else out


def sparse_ids(
    model: Any,
    ids: Sequence[list[int]],
    *,
    modules: SentenceModules,
    max_active_dims: int | None = None,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
) -> Tensor:
    """Embed sequences of token ids, as `TextTokens` returns them; threads may share a model that is in eval mode.

    Args:
        model, modules, max_active_dims, batch_tokens, batch_size: see `encode_sparse`.
        ids: B sequences of token ids, in any order.

    Returns:
        (B, V) float32, sparse COO and coalesced, on the CPU, in the order of `ids`.
    """
    dims = modules.max_active_dims if max_active_dims is None else max_active_dims
    rows: list[Tensor] = [torch.empty(2, 0, dtype=torch.int64)]
    values: list[Tensor] = [torch.empty(0)]
    with evaluating(model), torch.inference_mode():
        for indices in batches_by_length([len(sequence) for sequence in ids], batch_tokens, batch_size):
            for index, vector in zip(indices, _vectors(model, [ids[i] for i in indices], modules), strict=True):
                columns = vector.nonzero()[:, 0]
                if dims is not None and len(columns) > dims:
                    columns = vector.topk(dims).indices
                rows.append(torch.stack([torch.full_like(columns, index), columns]).cpu())
                values.append(vector[columns].cpu())
    with torch.inference_mode(False):
        size = (len(ids), model.config.vocab_size)
        coordinates, components = torch.cat(rows, 1).clone(), torch.cat(values).clone()
        return torch.sparse_coo_tensor(coordinates, components, size, check_invariants=True).coalesce()


def _vectors(model: Any, ids: list[list[int]], modules: SentenceModules) -> Iterable[Tensor]:
    """The dense vector (V,) of each sequence of token ids, one after the other."""
    inputs = pack(ids, next(model.parameters()).device)
    hidden = model.base_model(**inputs, return_dict=True).last_hidden_state
    start = 0
    for group in _in_order([len(sequence) for sequence in ids], LOGIT_ROWS):
        logits = model.cls.predictions(hidden[start : start + sum(group)]).float().relu_()
        start += sum(group)
        for part in logits.split(group):
            if modules.pooling == ("sum",):
                part = part.log1p_()
                yield (part.log1p_() if modules.activation == "log1p_relu" else part).sum(0)
            else:  # the logarithm is monotonic
                vector = part.amax(0).log1p_()
                yield vector.log1p_() if modules.activation == "log1p_relu" else vector


def _in_order(lengths: list[int], rows: int) -> Iterable[list[int]]:
    """Consecutive lengths, in groups of at most `rows` in sum; a longer one is a group by itself."""
    group: list[int] = []
    for length in lengths:
        if group and sum(group) + length > rows:
            yield group
            group = []
        group.append(length)
    if group:
        yield group
