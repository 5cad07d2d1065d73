"""Masked-token prediction: the most likely tokens for each [MASK] of a text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from bert_fast.data.tokenizer import check_rows, mask_token
from bert_fast.models.config import longest_input
from bert_fast.models.embedding import pack
from bert_fast.models.pretraining import BertForMaskedLM
from bert_fast.models.texts import as_tokenizer, check_integer_argument, check_text, evaluating


class Candidate(NamedTuple):
    """A predicted token and its probability."""

    token: str
    probability: float


def fill_mask(model: nn.Module, tokenizer: Any, text: str, *, top_k: int = 5) -> list[list[Candidate]]:
    """Predict the most likely tokens for each [MASK] of `text`, independently of the other masks.

    Args:
        model: a BertForMaskedLM. It runs in eval mode; then every module has the mode again that it had.
        tokenizer: from `bert_fast.data.load_tokenizer`, or transformers' fast one.
        text: with at least one [MASK] (<mask> for RoBERTa's tokenizers).
        top_k: candidates per mask.

    Returns:
        For each [MASK], `top_k` candidates, most likely first.

    Raises:
        TypeError: an argument has another type, or the text has a lone surrogate.
        ValueError: the text has no [MASK] or is too long for the model, top_k is out of range, or the tokenizer has
            more tokens than the model has rows. Rows without a token (padded vocabularies) are never candidates.
    """
    if not isinstance(model, BertForMaskedLM):
        raise TypeError(
            f"model is {type(model).__name__} of {type(model).__module__}; expected bert_fast's BertForMaskedLM"
        )
    check_text(text, "text")
    tokenizer = as_tokenizer(tokenizer)
    encoding, mask = tokenizer.encode(text), mask_token(tokenizer)
    positions = [index for index, token in enumerate(encoding.tokens) if token == mask]
    if not positions:
        raise ValueError(f"no {mask} in {text!r}; expected at least one")
    config: Any = model.config
    check_rows(tokenizer, config.vocab_size, "fill_mask")
    longest = longest_input(config)
    if len(encoding.ids) > longest:
        raise ValueError(f"the text has {len(encoding.ids)} tokens; expected at most {longest}, the model's maximum")
    ids = sorted(set(tokenizer.get_vocab().values()))
    check_integer_argument("top_k", top_k, 1, len(ids), ", the vocabulary size")
    with evaluating(model), torch.inference_mode():
        logits = model(**pack([encoding.ids], next(model.parameters()).device)).logits[positions].float()
        best = logits.softmax(-1)[:, ids].topk(top_k)
    return [
        [Candidate(str(tokenizer.id_to_token(ids[i])), p) for i, p in zip(row, probabilities, strict=True)]
        for row, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
