"""The tokenizers of every architecture compared with transformers: texts, pairs, words, questions, older files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from bert_fast.data import load_tokenizer
from bert_fast.data.tokenizer import mask_token
from bert_fast.tasks.alignment import piece_range, special_tokens_of, text_pieces, word_pieces
from bert_fast.tasks.encoding import encode_texts, encode_windows
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.settings import TextSettings
from bert_fast.tasks.task import make_task

FAMILY = ["roberta", "xlm-roberta", "camembert", "distilbert", "electra"]
UNITS = ["the", "The", " ", "  ", "\t", "café", "zoe\u0301", "北京", "は", "🙂", "👩‍👩‍👧", "\u200b", ",", "…", "x1",
         "Москва", "extraordinarily", "\xa0", "<mask>"]  # fmt: skip
Folder = Callable[[str], Path]


def random_texts(count: int, seed: int) -> list[str]:
    generator = random.Random(seed)
    return [
        "",
        " ",
        *("".join(generator.choices([*UNITS, " ", " "], k=generator.randint(1, 24))) for _ in range(count)),
    ]


@pytest.fixture(params=FAMILY)
def folder(request: pytest.FixtureRequest, tokenizer_folder: Folder) -> Path:
    return tokenizer_folder(request.param)


@pytest.mark.parametrize("paired", [False, True], ids=["texts", "pairs"])
@pytest.mark.parametrize(
    ("truncation", "long"),
    [("longest_first", "head"), ("longest_first", "tail"), ("only_first", "head"), ("only_second", "head")],
)
def test_encodings_equal_those_of_transformers(folder: Path, paired: bool, truncation: Any, long: Any) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    theirs.truncation_side = "right" if long == "head" else "left"
    short = random_texts(40, 1) if truncation == "longest_first" else ["the cat"] * 42
    texts, pairs = random_texts(40, 0), short if paired else None
    if truncation == "only_second" and paired:
        texts, pairs = short, texts
    encodings = encode_texts(ours, texts, pairs, TextSettings(max_length=20, truncation=truncation, long=long))
    expected = theirs(
        texts,
        pairs,
        truncation=truncation if paired else True,
        max_length=20,
        return_offsets_mapping=True,
        return_token_type_ids=True,
    )
    assert [one.ids for one in encodings] == expected["input_ids"]
    assert [one.offsets for one in encodings] == expected["offset_mapping"]
    assert [one.type_ids for one in encodings] == expected["token_type_ids"]
    assert max(len(one.ids) for one in encodings) == 20
    assert theirs.mask_token == mask_token(ours)


@pytest.mark.parametrize("long", ["windows", "head_tail"])
def test_text_long_does_not_affect_texts_that_fit(folder: Path, long: Any) -> None:
    tokenizer, texts = load_tokenizer(folder), random_texts(30, 2)
    plain = encode_texts(tokenizer, texts, texts, TextSettings(max_length=512))
    parts = encode_windows(tokenizer, texts, texts, TextSettings(max_length=512, long=long))
    assert [(one.ids, one.offsets, one.type_ids) for one in plain] == [
        (one.ids, one.offsets, one.type_ids) for (one,) in parts
    ]
    cut = encode_windows(tokenizer, texts, None, TextSettings(max_length=12, long=long, overlap=2))
    for text, pieces, windows in zip(texts, text_pieces(tokenizer, texts), cut, strict=True):
        spans = {(i, start, end) for i, (start, end) in zip(pieces.ids, pieces.spans, strict=True)}
        for one in windows:
            places = zip(one.ids, one.offsets, one.special_tokens_mask, strict=True)
            # The offsets of Unigram include the space before a word, those of text_pieces don't.
            shown = {(i, text[a:b].strip()) for i, (a, b), special in places if not special and text[a:b].strip()}
            assert shown <= {(i, text[start:end].strip()) for i, start, end in spans}


def test_lists_of_words_are_tokenized_as_by_transformers(folder: Path) -> None:
    sentences = [text.split() for text in random_texts(40, 3)]
    expected = AutoTokenizer.from_pretrained(folder, add_prefix_space=True)(
        sentences, is_split_into_words=True, add_special_tokens=False
    )
    pieces = word_pieces(load_tokenizer(folder), sentences)
    assert [one.ids for one in pieces] == expected["input_ids"]
    assert [one.words for one in pieces] == [expected.word_ids(row) for row in range(len(sentences))]


def test_wrapped_pieces_equal_the_encoding(folder: Path) -> None:
    tokenizer, texts = load_tokenizer(folder), random_texts(20, 4)
    pieces = text_pieces(tokenizer, texts)
    for count in (1, 2):
        special = special_tokens_of(tokenizer, count)
        assert special.size == tokenizer.num_special_tokens_to_add(count == 2)
        for text, one in zip(texts, pieces, strict=True):
            encoding = tokenizer.encode(*[text] * count)
            ids, types, starts = special.wrap(*[one.ids] * count)
            assert (ids, types) == (encoding.ids, encoding.type_ids)
            assert [ids[start : start + len(one)] for start in starts] == [one.ids] * count


def test_answers_round_trip_through_targets(folder: Path) -> None:
    """Every word is an answer, without the space before it, and decoding its target returns it."""
    tokenizer = load_tokenizer(folder)
    words = ["the", "café", "near", "Москва", "2024", "runs,", "🙂", "again"]
    context = "  " + "  ".join(words)
    rows = [{"text": word, "answer_start": context.index(word)} for word in words]
    table = Table(
        {"question": ["where ?"] * len(words), "context": [context] * len(words), "answers": [[r] for r in rows]}
    )
    columns = {name: name for name in table.columns}
    task = make_task("question-answering", {"overlap": 4, "max_answer": 40})
    task.fit(table, columns)
    spans = text_pieces(tokenizer, [context])[0].spans
    assert all(context[a:b] == context[a:b].strip() for a, b in spans)
    for example in task.encode(table, columns, tokenizer, TextSettings(max_length=30), training=True):
        word = words[example.row]
        start = context.index(word)
        window_context = example.extra
        first, end = piece_range(spans, start, start + len(word)) or (0, 0)
        inside = window_context.window.start <= first and end <= window_context.window.end
        shift = window_context.offset - window_context.window.start
        assert example.target == ((first + shift, end - 1 + shift) if inside else (0, 0))
        if inside:
            scores = np.zeros((len(example.input_ids), 2))
            scores[example.target[0], 0] = scores[example.target[1], 1] = 9.0
            prediction = task.decode([scores], [example], table, columns)[example.row]
            known = tokenizer.token_to_id("[UNK]") is None
            assert prediction["answer"] == word or not known
            assert prediction["answer"] in (word, word.rstrip(","))


def test_max_length_must_exceed_the_special_tokens(tokenizer_folder: Folder) -> None:
    tokenizer = load_tokenizer(tokenizer_folder("roberta"))
    with pytest.raises(ValueError, match=r"max_length is 4; expected more than the 4 special tokens of a pair"):
        encode_texts(tokenizer, ["a"], ["b"], TextSettings(max_length=4))


def test_vocab_json_and_merges_txt(tokenizer_folder: Folder, tmp_path: Path) -> None:
    source = tokenizer_folder("roberta")
    expected = load_tokenizer(source)
    Tokenizer.from_file(str(source / "tokenizer.json")).model.save(str(tmp_path))
    # As in published files, <mask> is part of the vocabulary.
    vocab = json.loads((tmp_path / "vocab.json").read_text()) | {"<mask>": expected.token_to_id("<mask>")}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    loaded = load_tokenizer(tmp_path)
    for text in random_texts(40, 5):
        text = text.replace("<mask>", "")  # whose preceding space depends on the version of transformers
        one, other = loaded.encode(text, "b"), expected.encode(text, "b")
        assert (one.ids, one.offsets, one.type_ids) == (other.ids, other.offsets, other.type_ids)


@pytest.mark.parametrize("model_type", ["xlm-roberta", "camembert"])
def test_sentencepiece(model_type: str, tokenizer_folder: Folder, tmp_path: Path) -> None:
    """With sentencepiece its file loads as in transformers; without it the error says what to install."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    if find_spec("sentencepiece") is None:
        (tmp_path / "sentencepiece.bpe.model").write_bytes(b"")
        with pytest.raises(ImportError, match=r"needed to convert it, .* pip install 'bert_fast\[tokenizers\]'"):
            load_tokenizer(tmp_path)
        return
    import sentencepiece

    (tmp_path / "text").write_text("\n".join(["the small cat sees a red house"] * 50 + ["où est le café ?"] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "sentencepiece.bpe"),
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    loaded, expected = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ("the cat", " a  café, où ", "zzz 北京"):
        one = loaded.encode(text, "house")
        assert one.ids == expected(text, "house")["input_ids"]
        assert len(one.ids) > 6
    assert special_tokens_of(loaded, 2).size == 4


def test_the_package_that_converts_older_files_is_named(
    tokenizer_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bert_fast.data.tokenizer as module

    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"")
    find = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == "sentencepiece" else find(name))
    with pytest.raises(
        ImportError, match=r"has sentencepiece\.bpe\.model .* sentencepiece, .*'bert_fast\[tokenizers\]'"
    ):
        load_tokenizer(tmp_path)


def test_invalid_tokenizer_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"or with one of vocab\.json with merges\.txt, sentencepiece\.bpe\.model"):
        load_tokenizer(tmp_path)
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.ByteLevel()
    plain.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="the tokenizer adds no special tokens"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer\.json is \[1\]; expected an object"):
        load_tokenizer(tmp_path)
