"""What could stand where a text says [MASK]."""

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
    """A token and its probability."""

    token: str
    probability: float


@torch.inference_mode()
def fill_mask(model: nn.Module, tokenizer: Tokenizer, text: str, *, top_k: int = 5) -> list[list[Candidate]]:
    """The likeliest tokens for each [MASK] of `text`, each filled on its own.

    Args:
        model: a BertForMaskedLM in eval mode.
        tokenizer: as `bert_fast.data.load_tokenizer` gives it.
        text: with at least one [MASK] (<mask> for RoBERTa's tokenizers).
        top_k: candidates a mask.

    Returns:
        For each [MASK], `top_k` candidates, likeliest first.

    Raises:
        ValueError: there is no [MASK] in the text, or the text is too long for the model.
    """
    encoding, mask = tokenizer.encode(text), mask_token(tokenizer)
    positions = [index for index, token in enumerate(encoding.tokens) if token == mask]
    if not positions:
        raise ValueError(f"no {mask} in {text!r}; write {mask} where a word is to be filled in")
    config: Any = model.config
    longest = longest_input(config)
    if len(encoding.ids) > longest:
        raise ValueError(f"the text has {len(encoding.ids)} tokens; the model takes at most {longest}")
    if not 1 <= top_k <= tokenizer.get_vocab_size():
        raise ValueError(f"top_k is {top_k}; expected 1 to {tokenizer.get_vocab_size()}, the size of the vocabulary")
    logits = model(**pack([encoding.ids], next(model.parameters()).device)).logits[positions].float()
    best = logits.softmax(-1).topk(top_k)
    return [
        [Candidate(str(tokenizer.id_to_token(i)), p) for i, p in zip(ids, probabilities, strict=True)]
        for ids, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
