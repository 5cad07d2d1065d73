"""Shares of unknown tokens, for every kind of tokenizer."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from bert_fast.tasks.diagnostics import encoding_messages, unknown_share
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import Example

VOCABULARY = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "b": 5}
SCORES = [(token.replace("[UNK]", "<unk>"), -float(index)) for token, index in VOCABULARY.items()]
BYTES = {character: index for index, character in enumerate(pre_tokenizers.ByteLevel.alphabet())}


def with_special_tokens(model: models.Model) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(
        [token for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]") if tokenizer.token_to_id(token)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        (with_special_tokens(models.WordPiece(VOCABULARY, unk_token="[UNK]")), (0.25, "[UNK]")),
        (with_special_tokens(models.WordLevel(VOCABULARY, unk_token="[UNK]")), (0.25, "[UNK]")),
        (with_special_tokens(models.Unigram(SCORES, unk_id=1)), (0.25, "<unk>")),
        (with_special_tokens(models.BPE(BYTES, [])), (0.0, "")),
    ],
    ids=["WordPiece", "WordLevel", "Unigram", "bytes"],
)
def test_unknown_tokens_are_counted_among_those_that_are_not_special(
    tokenizer: Tokenizer, expected: tuple[float, str]
) -> None:
    examples = [Example(0, [2, 4, 1, 3], [0] * 4), Example(1, [2, 4, 5, 3], [0] * 4)]
    assert unknown_share(examples, tokenizer) == expected
    assert unknown_share([], tokenizer)[0] == 0.0


def test_messages_of_rows_with_several_examples() -> None:
    tokenizer = with_special_tokens(models.WordPiece(VOCABULARY, unk_token="[UNK]"))
    known = [Example(row, [2, 4, 5, 3], [0] * 4, truncated=row == 1) for row in (0, 1, 1, 2)]
    assert encoding_messages(known, tokenizer, TextSettings(max_length=4), "my.csv") == [
        "1 of 3 rows (33.3%) of my.csv have more than text.max_length, 4, tokens and are truncated; text.long is head"
    ]
    unknown = [Example(0, [2, 4, 1, 3], [0] * 4)]
    (message,) = encoding_messages(unknown, tokenizer, TextSettings(), "my.csv")
    assert message.startswith("warning: 50.0% of the tokens of my.csv are [UNK]; ")
