"""Messages about the examples of a run: unknown tokens and truncated rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Example

if TYPE_CHECKING:
    from tokenizers import Tokenizer

UNKNOWN_SHARE = 0.01  # of the tokens, from which on a warning is due


def encoding_messages(examples: Sequence[Example], tokenizer: Tokenizer, text: TextSettings, source: str) -> list[str]:
    """Warnings if more than 1 % of the tokens are unknown, and if rows are truncated.

    Args:
        examples: of all rows.
        tokenizer: of the model.
        text: how the rows were tokenized.
        source: of the rows, for the messages.
    """
    messages = []
    share, token = unknown_share(examples, tokenizer)
    if share > UNKNOWN_SHARE:
        messages.append(
            f"warning: {share:.1%} of the tokens of {source} are {token}; expected a tokenizer with their characters "
            "and words: check the language of the model, and whether it is cased"
        )
    rows = {example.row for example in examples}
    truncated = {example.row for example in examples if example.truncated}
    if truncated:
        messages.append(
            f"{len(truncated):,} of {len(rows):,} rows ({len(truncated) / len(rows):.1%}) of {source} have more than "
            f"text.max_length, {text.max_length}, tokens and are truncated; text.long is {text.long}"
        )
    return messages


def unknown_share(examples: Sequence[Example], tokenizer: Tokenizer) -> tuple[float, str]:
    """The share of unknown tokens among those that are not special, and the unknown token ("" if there is none)."""
    unknown = getattr(tokenizer.model, "unk_token", None)
    names = [unknown] if unknown else ["[UNK]", "<unk>"]
    token = next((name for name in names if tokenizer.token_to_id(name) is not None), "")
    if not token:
        return 0.0, ""
    ids = np.fromiter(chain.from_iterable(example.input_ids for example in examples), np.int64)
    index = tokenizer.token_to_id(token)
    special = [number for number, item in tokenizer.get_added_tokens_decoder().items() if item.special]
    words = ids[~np.isin(ids, [number for number in special if number != index])]
    return (float((words == index).mean()) if len(words) else 0.0), token
