"""The ids of every tokenizer that the files of a checkpoint can describe are those of AutoTokenizer of transformers 5.

transformers 4 gives other ids where it reads the normalizer of tokenizer.json, so it is no yardstick here.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from bert_fast.data import copy_tokenizer, load_tokenizer
from bert_fast.data.tokenizer import check_rows, count_ids

pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="transformers 5 is the yardstick")

LETTERS = [*"abcdefgihkéÉnAB東京ß.,-!'[]<>ac_", "##a", "##b", "##c", "##é", "##e", "##東", "##s", "e", "i\u0307"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cab", "##ab", "CAB", "café", "cafe", "東京", *LETTERS]
TEXTS = [
    "cab CAB Café cafe\u0301 東京a bİß",
    "[MASK] [cls] <ent>cab<ent> ac [NEW] x[NEW]y a_b",
    "",
    " \u2028a\x00b\ufeffc\u200dd\u0085e ",
    "a" * 120 + " cab",
]
CHARACTERS = st.one_of(
    st.sampled_from([*"abcé東 .[]<>", "CAB", "[NEW]", "<ent>", "[MASK]", "e\u0301"]), st.characters(codec="utf-8")
)
RANDOM_TEXT = st.lists(CHARACTERS, max_size=25).map("".join)
TOKEN = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": True}


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        data = content if isinstance(content, bytes) else None
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
        (folder / name).write_bytes(text.encode() if data is None else data)
    return folder


def check(folder: Path, texts: list[str] = TEXTS, copy: Path | None = None) -> None:
    """Compare ids, types and special tokens with AutoTokenizer, and those of a copy with both."""
    theirs, ours = AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    tokenizers = [ours]
    if copy is not None:
        copy.mkdir(exist_ok=True)
        copy_tokenizer(folder, copy, model_max_length=40)
        if (folder / "config.json").is_file():
            (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
        copied = AutoTokenizer.from_pretrained(copy)
        assert copied.model_max_length == 40
        assert {
            role: str(name) for role, name in copied.special_tokens_map.items() if "special_tokens" not in role
        } == {role: str(name) for role, name in theirs.special_tokens_map.items() if "special_tokens" not in role}
        assert copied.get_vocab() == theirs.get_vocab()
        tokenizers += [copied._tokenizer, load_tokenizer(copy)]
    for tokenizer in tokenizers:
        assert tokenizer.get_vocab() == theirs.get_vocab()
        for text in texts:
            expected = theirs(text, "cab a", return_token_type_ids=True)
            encoded = tokenizer.encode(text, "cab a")
            assert encoded.ids == expected["input_ids"], text
            assert encoded.type_ids == expected["token_type_ids"]
            assert tokenizer.encode(text).ids == theirs(text)["input_ids"]


BERT = {"vocab.txt": "\n".join(WORDS) + "\n", "config.json": {"model_type": "bert"}}
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "do_lower_case": st.booleans(),
        "strip_accents": st.sampled_from([None, True, False]),
        "tokenize_chinese_chars": st.booleans(),
        "split_special_tokens": st.booleans(),
        "do_basic_tokenize": st.just(True),
        "never_split": st.just(None),
        "model_max_length": st.just(7),
        "tokenizer_class": st.sampled_from(["BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "ElectraTokenizerFast"]),
        "additional_special_tokens": st.lists(st.sampled_from(["[NEW]", "<ent>", "cab"]), unique=True, max_size=2),
        "extra_special_tokens": st.one_of(
            st.lists(st.sampled_from(["[NEW]", "<e>"]), unique=True, max_size=2), st.just({"entity_token": "<ent>"})
        ),
        "entity_token": st.just("<ent>"),
        "mask_token": st.sampled_from(["[MASK]", "<mask>", {"__type": "AddedToken", "content": "[MASK]", **TOKEN, "lstrip": True}]),
        "added_tokens_decoder": st.sampled_from(
            [
                {"0": {"content": "[PAD]", **TOKEN}, "60": {"content": "<ent>", **TOKEN, "special": False}},
                {"99": {"content": "x", **TOKEN, "special": False, "normalized": True, "single_word": True},
                 "9": {"content": "[NEW]", **TOKEN, "rstrip": True}},
                {},
            ]
        ),
    },
)  # fmt: skip
OLDER = st.fixed_dictionaries(
    {},
    optional={
        "special_tokens_map.json": st.sampled_from(
            [
                {"mask_token": {"content": "[MASK]", **TOKEN, "lstrip": True}},
                {"cls_token": "[CLS]", "additional_special_tokens": ["<ent>", "[NEW]"]},
                {"other_token": "<ent>"},
                {"extra_special_tokens": ["[NEW]"]},
            ]
        ),
        "added_tokens.json": st.sampled_from([{"<ent>": 50, "[NEW]": 49}, {"cab": 5, "zz": 90}]),
    },
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=SETTINGS, older=OLDER, as_json=st.booleans(), texts=st.lists(RANDOM_TEXT, max_size=4))
def test_wordpiece_with_any_settings(tmp_path_factory, values, older, as_json, texts):
    folder = write(tmp_path_factory.mktemp("tokenizer"), {**BERT, **older, "tokenizer_config.json": values})
    if as_json:
        made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        made.add_tokens([AddedToken("[NEW]", special=True), "<ent>"])
        made.save(str(folder / "tokenizer.json"))
    check(folder, [*TEXTS, *texts], folder / "copy")
