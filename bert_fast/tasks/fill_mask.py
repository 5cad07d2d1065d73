"""Masked-token prediction: the most likely tokens for each [MASK] of a text."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from bert_fast.data.tokenizer import mask_token
from bert_fast.models.config import longest_input
from bert_fast.models.embedding import pack
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
        ValueError: the text has no [MASK] or is too long for the model, or top_k is out of range.
    """
    check_text(text, "text")
    tokenizer = as_tokenizer(tokenizer)
    encoding, mask = tokenizer.encode(text), mask_token(tokenizer)
    positions = [index for index, token in enumerate(encoding.tokens) if token == mask]
    if not positions:
        raise ValueError(f"no {mask} in {text!r}; expected at least one")
    config: Any = model.config
    longest = longest_input(config)
    if len(encoding.ids) > longest:
        raise ValueError(f"the text has {len(encoding.ids)} tokens; expected at most {longest}, the model's maximum")
    largest = min(tokenizer.get_vocab_size(), config.vocab_size)
    check_integer_argument("top_k", top_k, 1, largest, ", the vocabulary size")
    with evaluating(model), torch.inference_mode():
        logits = model(**pack([encoding.ids], next(model.parameters()).device)).logits[positions].float()
        tokens = [tokenizer.id_to_token(number) for number in range(logits.shape[1])]
        # A vocabulary that was padded has rows without a token: their probability counts, they are no candidates.
        no_token = torch.tensor([token is None for token in tokens], device=logits.device)
        best = logits.softmax(-1).masked_fill(no_token, -1.0).topk(top_k)
    return [
        [Candidate(tokens[i], p) for i, p in zip(ids, probabilities, strict=True)]
        for ids, probabilities in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
