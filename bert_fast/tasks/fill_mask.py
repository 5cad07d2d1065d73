"""Masked-token prediction: the most likely tokens for each [MASK] of a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from bert_fast.data.tokenizer import mask_token
from bert_fast.models.config import longest_input
from bert_fast.models.embedding import pack

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class Candidate(NamedTuple):
    """A predicted token and its probability."""

    token: str
    probability: float


@torch.inference_mode()
def fill_mask(model: nn.Module, tokenizer: Tokenizer, text: str, *, top_k: int = 5) -> list[list[Candidate]]:
    """Predict the most likely tokens for each [MASK] of `text`, independently of the other masks.

    Args:
        model: a BertForMaskedLM in eval mode.
        tokenizer: from `bert_fast.data.load_tokenizer`.
        text: with at least one [MASK] (<mask> for RoBERTa's tokenizers).
        top_k: candidates per mask.

    Returns:
        For each [MASK], `top_k` candidates, most likely first.

    Raises:
        ValueError: the text has no [MASK] or is too long for the model, or top_k is out of range.
    """
    encoding, mask = tokenizer.encode(text), mask_token(tokenizer)
    positions = [index for index, token in enumerate(encoding.tokens) if token == mask]
    if not positions:
        raise ValueError(f"no {mask} in {text!r}; expected at least one")
    config: Any = model.config
    longest = longest_input(config)
    if len(encoding.ids) > longest:
        raise ValueError(f"the text has {len(encoding.ids)} tokens; expected at most {longest}, the model's maximum")
    if not 1 <= top_k <= tokenizer.get_vocab_size():
        raise ValueError(f"top_k is {top_k}; expected 1 to {tokenizer.get_vocab_size()}, the vocabulary size")
    logits = model(**pack([encoding.ids], next(model.parameters()).device)).logits[positions].float()
    best = logits.softmax(-1).topk(top_k)
    return [
        [Candidate(str(tokenizer.id_to_token(i)), p) for i, p in zip(ids, probabilities, strict=True)]
        for ids, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
