"""The vocabulary: deterministic, BERT's, and loaded by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer, BertTokenizerFast

from bert_fast.data import PrepareConfig, prepare, save_tokenizer, train_vocab
from bert_fast.data.shards import TokenStore
from bert_fast.data.vocab import SPECIAL_TOKENS, is_lowercase, load_wordpiece, token_kinds

SENTENCES = ["The cat sat on the mat.", "The dog's café: a naïve déjà-vu?", "Cats and dogs, dogs and cats!"] * 3
TEXTS = [
    "The cat sat!",
    "CAFÉ au lait, naïve dogs; 12 x",
    "tabs\tand\nlines",
    "ünïcödé 東京 emoji 🙂",
    "don't [MASK] me",
    "",
    "a" * 150,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vocab")
    save_tokenizer(train_vocab(SENTENCES, vocab_size=120), folder)
    return folder


def test_special_tokens_come_first_then_letters_then_words(folder):
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert tokens[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(tokens) == len(set(tokens))
    assert {"cat", "##s", "the"} <= set(tokens)
    assert "café" not in tokens
    assert not any(token != token.lower() for token in tokens[5:])


@pytest.mark.parametrize("loader", [AutoTokenizer, BertTokenizerFast], ids=["auto", "fast"])
def test_transformers_loads_the_folder_and_agrees(folder, loader):
    theirs, ours = loader.from_pretrained(folder), load_wordpiece(folder)
    assert theirs.get_vocab() == ours.get_vocab()
    assert [theirs.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS] == [0, 1, 2, 3, 4]
    special = (theirs.pad_token, theirs.unk_token, theirs.cls_token, theirs.sep_token, theirs.mask_token)
    assert special == SPECIAL_TOKENS
    assert theirs.model_max_length == 512
    for text in TEXTS:
        encoded = ours.encode(text, "the dog")
        expected = theirs(text, "the dog")
        assert encoded.ids == expected["input_ids"]
        assert encoded.type_ids == expected["token_type_ids"]
        assert ours.decode(encoded.ids) == theirs.decode(expected["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize("lowercase", [True, False], ids=["uncased", "cased"])
def test_vocab_txt_alone_gives_the_same_tokenizer(tmp_path, lowercase):
    save_tokenizer(train_vocab(SENTENCES, vocab_size=120, lowercase=lowercase), tmp_path)
    expected = load_wordpiece(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").unlink()
    for tokenizer in (load_wordpiece(tmp_path), load_wordpiece(tmp_path / "vocab.txt")):
        assert is_lowercase(tokenizer) is lowercase
        assert [tokenizer.encode(text).ids for text in TEXTS] == [expected.encode(text).ids for text in TEXTS]


def test_training_is_deterministic(text_file):
    # The hash maps of the trainer are seeded for each training, so one process suffices to show differences.
    lines = text_file.read_text().splitlines()
    trained = {train_vocab(lines, vocab_size=600).to_str() for _ in range(4)}
    assert len(trained) == 1


def test_a_vocab_size_below_the_alphabet_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size is 20; expected at least \d+: the text has \d+ different"):
        train_vocab(SENTENCES, vocab_size=20)


def test_rare_letters_beyond_a_thousand_are_unknown():
    many = "".join(chr(0x4E00 + i) for i in range(1200))
    tokenizer = train_vocab([many, "common words " * 100], vocab_size=2100)
    assert tokenizer.get_vocab_size() <= 2100
    assert "common" in tokenizer.get_vocab()
    assert tokenizer.encode(chr(0x4E00 + 1199), add_special_tokens=False).tokens == ["[UNK]"]


def test_a_chinese_character_is_one_token_and_the_alphabet_can_be_larger():
    many = "".join(chr(0x4E00 + i) for i in range(1500))
    text = [many, "latin letters " * 10]
    tokens = train_vocab(text, vocab_size=2000, alphabet_size=8000).get_vocab()
    assert {character in tokens for character in many} == {True}
    assert not any(f"##{character}" in tokens for character in many)
    assert {"latin", "##a"} <= set(tokens)
    known = set(many) & set(train_vocab(text, vocab_size=2000).get_vocab())
    assert len(known) == 1000 - len(set("latinletters"))


def test_kinds_of_tokens(folder):
    tokenizer = load_wordpiece(folder)
    kinds = token_kinds(tokenizer)
    assert kinds[:5].tolist() == [2] * 5
    assert kinds[tokenizer.token_to_id("##s")] == 1
    assert kinds[tokenizer.token_to_id("the")] == 0
    assert kinds[tokenizer.token_to_id("!")] == 0


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "."])
def test_prepare_with_a_given_vocabulary(folder, text_file, tmp_path, name):
    output = tmp_path / "data"
    prepare(PrepareConfig(output=str(output), sources=[str(text_file)], vocab=str(folder / name), progress=False))
    assert (output / "vocab.txt").read_text() == (folder / "vocab.txt").read_text()
    assert AutoTokenizer.from_pretrained(output)(TEXTS[1]).input_ids == load_wordpiece(folder).encode(TEXTS[1]).ids


def test_the_name_of_a_special_token_in_a_text_is_text(tmp_path):
    lines = [f"never write [SEP] or [MASK] in text number {'x' * i}." for i in range(8)]
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    prepare(PrepareConfig(str(tmp_path / "data"), sources=[str(tmp_path / "a.txt")], vocab_size=100, progress=False))
    store = TokenStore(tmp_path / "data", "train")
    ends = store.sentence_ends
    starts = np.concatenate([[0], ends[:-1]])
    tokens = store.gather(starts, ends - starts)
    assert not np.isin(tokens, [0, 2, 3, 4]).any()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vocab.txt", "[PAD]\n[UNK]\n[CLS]\n[SEP]\nhello\n", r"vocab\.txt: the vocabulary has no \[MASK\]; BERT needs"),
        (
            "vocab.txt",
            "[PAD]\nhello\nhello\n",
            r"vocab\.txt: not a vocab\.txt .*the vocabulary has no unk_token, \[UNK\]",
        ),
        ("tokenizer.json", "{}", r"tokenizer\.json: not a tokenizer\.json"),
        ("tokenizer.json", Tokenizer(models.BPE()).to_str(), r"tokenizer\.json: a BPE tokenizer; expected BERT's"),
    ],
    ids=["no-mask", "twice", "empty-json", "bpe"],
)
def test_a_vocabulary_that_is_not_berts_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_wordpiece(tmp_path / name)


def test_a_missing_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json, a vocab\.txt or a folder with one of them"):
        load_wordpiece(tmp_path)


def test_an_invalid_config_of_vocab_txt_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, "a"]))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is \[1\]; expected an object"):
        load_wordpiece(tmp_path / "vocab.txt")
