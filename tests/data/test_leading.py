"""The first tokens of a text from a part of it are those of the whole text, for every class of tokenizers."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Encoding, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from bert_fast.data import leading, load_tokenizer, train_vocab
from bert_fast.data.leading import cuts_of, encode_leading

SENTENCES = [
    "The café near the old house, where Zoë sings; naïve coöperation — “quoted” words, 1234 and 5678!",
    "北京是中国的首都。 東京 は 日本 の 首都 です。 Ελλάδα ΣΑΣ Москва 한국어 हिन्दी עברית 🙂 👩‍👩‍👧 İß ﬁne ½",
]
UNITS = [
    *("the", "The", "don't", "'s", " ", "  ", "\t", "\n", "\r\n", "\u2028", "\xa0", "\u3000", "\x00", "\ufffd"),
    *("café", "zoe\u0301", "\u0301", "\u0300\u0327", "\u0600", "\u0d4e", "\u200b", "\u200d", "\xad", "ﬁ", "½", "¨"),
    *("北京", "首", "は", "。", "한국", "\u1100\u1161\u11a8", "हिन्दी", "ΣΑΣ", "Σ", "İß", "🙂", "👩‍👩‍👧", "\U00011f02"),
    *(",", "…", "!", "-", "``", "1", "234", "x1", "<mask>", "[MASK]", "<ent>", "new", "ly", "a_b", "z" * 30),
]


def bert(**options: Any) -> Tokenizer:
    """A trained WordPiece vocabulary under another normalizer."""
    tokenizer = train_vocab(SENTENCES * 3, vocab_size=300)
    tokenizer.normalizer = normalizers.BertNormalizer(**options)
    return tokenizer


def unigram(normalizer: Any, pre_tokenizer: Any) -> Tokenizer:
    """A vocabulary with pieces over several words, which only the pre-tokenizer keeps apart."""
    pieces = {*"abcdefghijklmnopqrstuvwxyz▁北京首都はΣσ12,.", "▁the", "the▁", "he▁c", "京首", "▁", "caf", "x1", "e▁"}
    vocabulary = [("<unk>", 0.0), *((piece, -2.0 / len(piece) - 1.0) for piece in sorted(pieces))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    return wrapped(tokenizer)


def bpe(pre_tokenizer: Any, **options: Any) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ġ", "Ġ"), ("e", "Ġ"), ("Ċ", "Ċ"), ("n", "e"), ("ne", "w")]
    names = dict.fromkeys([*alphabet, *(first + second for first, second in merges)])
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, **options))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens(["<s>", "</s>", AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.add_tokens([AddedToken("<ent>", rstrip=True), AddedToken("new", single_word=True)])
    ids = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    return tokenizer


def words_and_spaces() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])


def several_spaces() -> Any:
    return normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])


MADE: dict[str, Callable[[], Tokenizer]] = {
    "bert": bert,
    "bert-cased": lambda: bert(lowercase=False, strip_accents=False),
    "bert-no-cjk": lambda: bert(handle_chinese_chars=False),
    "bert-not-cleaned": lambda: bert(clean_text=False),
    "byte-level": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "byte-level-prefix": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "unigram": lambda: unigram(several_spaces(), words_and_spaces()),
    "unigram-metaspace": lambda: unigram(normalizers.NFKC(), pre_tokenizers.Metaspace()),
    "unigram-nfc": lambda: unigram(
        normalizers.Sequence([normalizers.NFC(), normalizers.Strip(), normalizers.Replace("``", '"')]),
        pre_tokenizers.Sequence([pre_tokenizers.Punctuation("merged_with_next"), pre_tokenizers.Metaspace()]),
    ),
}
FAMILY = ("roberta", "xlm-roberta", "camembert", "distilbert", "electra")
tokenizer_names = pytest.mark.parametrize("name", [*MADE, *FAMILY, "sentencepiece"])


def sentencepiece_folder(folder: Path) -> Path:
    """An XLM-RoBERTa tokenizer as a sentencepiece model, which has its own table of normalization (nmt_nfkc)."""
    sentencepiece = pytest.importorskip("sentencepiece")
    (folder / "config.json").write_text('{"model_type": "xlm-roberta"}')
    (folder / "text").write_text("\n".join(SENTENCES * 30))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=150,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return folder


@pytest.fixture(scope="module")
def tokenizer_of(
    tokenizer_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Tokenizer]:
    made: dict[str, Tokenizer] = {}

    def make(name: str) -> Tokenizer:
        if name == "sentencepiece":
            return load_tokenizer(sentencepiece_folder(tmp_path_factory.mktemp(name)))
        return MADE[name]() if name in MADE else load_tokenizer(tokenizer_folder(name))

    def tokenizer(name: str) -> Tokenizer:
        if name not in made:
            made[name] = make(name)
        return made[name]

    return tokenizer


def first_ids(tokenizer: Tokenizer, texts: list[str], count: int) -> tuple[list[list[int]], int]:
    """The first ids of each text, with the special token before them, and the characters that were tokenized."""
    read = 0

    def encode(parts: list[str]) -> list[Encoding]:
        nonlocal read
        read += sum(map(len, parts))
        return tokenizer.encode_batch_fast(parts)

    special = tokenizer.num_special_tokens_to_add(False)
    encodings = encode_leading(tokenizer, texts, count, encode, lambda one: len(one) - special > count)
    return [encoding.ids[: count + 1] for encoding in encodings], read


@tokenizer_names
def test_every_part_up_to_a_cut_has_the_first_tokens_of_the_text(
    name: str, tokenizer_of: Callable[[str], Tokenizer]
) -> None:
    """Of every two units, with and without white space between them, and of random texts of units and characters."""
    tokenizer, draw = tokenizer_of(name), random.Random(0)
    places = cuts_of(tokenizer)
    assert places is not None
    texts = [first + space + second for first, second in product(UNITS, UNITS) for space in ("", " ", "\n")]
    planes = [range(0x20, 0x3000), range(0x3000, 0xD800), range(0xE000, 0x20000)]
    for _ in range(200):
        characters = [chr(draw.choice(draw.choice(planes))) for _ in range(20)]
        texts.append("".join(draw.choices([*UNITS, *characters, *" " * 20, *"\n" * 5], k=80)))
    parts = [(index, text[: place.start()]) for index, text in enumerate(texts) for place in places.finditer(text)]
    assert len(parts) > 3000
    ids = [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]
    encodings = tokenizer.encode_batch_fast([part for _, part in parts])
    for (index, part), encoding in zip(parts, encodings, strict=True):
        length = len(encoding) - 1
        assert encoding.ids[:length] == ids[index][:length], (texts[index], len(part))


@tokenizer_names
def test_first_tokens_of_random_texts(
    name: str, tokenizer_of: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, draw = tokenizer_of(name), random.Random(0)
    monkeypatch.setattr(leading, "CHARACTERS", 1)
    texts = ["".join(draw.choices([*UNITS, " ", " ", " "], k=draw.randint(0, 400))) for _ in range(60)]
    texts += ["", " " * 500, "the " * 400, "z" * 500, "北京" * 300]
    for count in (0, 1, 7, 40):
        ids, read = first_ids(tokenizer, texts, count)
        assert ids == [encoding.ids[: count + 1] for encoding in tokenizer.encode_batch(texts)]
        assert count > 7 or read < sum(map(len, texts)), "no text was cut"


def test_ideographs_are_cut_apart_where_the_tokenizer_sets_them_apart() -> None:
    text = "北京是中国的首都" * 1000
    assert first_ids(bert(), [text], 10)[1] < 200
    assert first_ids(bert(handle_chinese_chars=False), [text], 10)[1] == len(text)


def with_token(content: str, **flags: Any) -> Tokenizer:
    tokenizer = bert()
    tokenizer.add_tokens([AddedToken(content, **flags)])
    return tokenizer


@pytest.mark.parametrize(
    ("make", "cut"),
    [
        (lambda: bpe(pre_tokenizers.ByteLevel(use_regex=False)), "the the"),
        (lambda: bpe(pre_tokenizers.ByteLevel(), dropout=0.5), "the the"),
        (lambda: bpe(pre_tokenizers.Split(Regex("the the|."), "isolated")), "the the"),
        (lambda: unigram(None, None), "the the"),
        (lambda: unigram(None, pre_tokenizers.Metaspace(split=False)), "the c"),
        (lambda: unigram(normalizers.Replace(" ", "▁"), pre_tokenizers.Whitespace()), "the c"),
        (lambda: unigram(normalizers.Replace(Regex("e c"), "x"), words_and_spaces()), "the c"),
        (lambda: with_token("the cat", normalized=False), "the cat"),
        (lambda: with_token("The\xa0Cat", normalized=True), "the cat"),
        (lambda: with_token("the ", normalized=False), "the cat"),
    ],
    ids=["bytes", "dropout", "split", "none", "unsplit", "replaced", "regex", "added", "normalized", "trailing"],
)
def test_a_tokenizer_that_may_see_across_reads_whole_texts(make: Callable[[], Tokenizer], cut: str) -> None:
    """`cut` is a text that such a tokenizer doesn't split at its space."""
    tokenizer, text = make(), f"{cut} " * 200
    assert cuts_of(tokenizer) is None
    assert first_ids(tokenizer, [text], 2)[1] == len(text)


def test_an_added_token_of_two_ideographs_is_not_cut() -> None:
    tokenizer, text = with_token("国的", normalized=False), "北京是中国的首都" * 100
    assert first_ids(tokenizer, [text], 10)[1] == len(text)
    assert first_ids(tokenizer, ["首都 " * 1000], 10)[1] < 200


def test_a_book_costs_what_its_first_tokens_cost() -> None:
    tokenizer = bert()
    page, book = SENTENCES[0] * 60, SENTENCES[0] * 20_000

    def seconds(text: str) -> float:
        times = []
        for _ in range(5):
            begin = time.process_time()  # of all threads
            first_ids(tokenizer, [text], 512)
            times.append(time.process_time() - begin)
        return min(times)

    assert first_ids(tokenizer, [book], 512)[1] < 2 * leading.CHARACTERS * 512
    # Tokenizing the whole book takes over a hundred times as long as a page.
    assert seconds(book) < 5 * seconds(page)
