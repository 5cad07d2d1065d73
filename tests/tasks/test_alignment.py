"""Characters and words to pieces and back, on texts that the tokenizer changes."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from bert_fast.data import load_tokenizer
from bert_fast.data.vocab import SPECIAL_TOKENS
from bert_fast.tasks.alignment import (
    Pieces,
    Window,
    character_range,
    first_pieces,
    piece_labels,
    piece_range,
    split_words,
    text_pieces,
    windows,
    word_pieces,
)

# Plain letters, composed and combining accents, ideographs, kana, Hangul (which decomposes into several pieces),
# emoji with joiners, selectors and skin tones, zero-width and control characters, capitals whose lower case is longer,
# right-to-left letters, punctuation, white space of all kinds.
ALPHABET = "aabcAIé\u0301\u0327üßİ中文𠀀のハ한글👨👩🏽שλ.,-'\u2019 \t\n\u00a0\u3000"
ALPHABET += "\u200d\ufe0f\u200b\u2060\ufeff\x00\x07\ufffd"
TEXTS = st.lists(
    st.one_of(
        st.text(ALPHABET, max_size=8),
        st.text(max_size=6),
        st.integers(90, 130).map(lambda count: "ab" * (count // 2)),
        st.sampled_from(["cafés", "cafe\u0301s", "👨\u200d👩\u200d👧", "e" + "\u0301" * 5, " "]),
    ),
    max_size=6,
).map("".join)
WORDS = st.lists(TEXTS.map(lambda text: "".join(text.split())), max_size=8)
RELAXED = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A vocabulary of the letters of ALPHABET except one, composed and decomposed; everything else is [UNK]."""
    letters = set(ALPHABET) | set("".join(unicodedata.normalize("NFD", text) for text in (ALPHABET, ALPHABET.lower())))
    letters = {letter for letter in letters if letter not in "λ\n" and not letter.isspace()}
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = [*SPECIAL_TOKENS, *sorted(letters), *(f"##{letter}" for letter in sorted(letters)), "cafe", "##fe"]
    (folder / "vocab.txt").write_text("".join(f"{token}\n" for token in vocab), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(f'{{"do_lower_case": {str(request.param).lower()}}}')
    return load_tokenizer(folder)


def pieces_of(tokenizer: Tokenizer, text: str) -> Pieces:
    return text_pieces(tokenizer, [text])[0]


@given(text=TEXTS, cut=st.tuples(st.integers(0, 60), st.integers(0, 60)))
@RELAXED
def test_characters_round_trip(tokenizer: Tokenizer, text: str, cut: tuple[int, int]) -> None:
    """From characters to pieces and back, a span keeps every character that a piece covers, and gains only characters
    of the same pieces and marks of the last letter."""
    start, end = sorted(min(index, len(text)) for index in cut)
    spans = pieces_of(tokenizer, text).spans
    assert all(first < last <= len(text) for first, last in spans)
    assert [span[0] for span in spans] == sorted(span[0] for span in spans)
    covered = {index for first, last in spans for index in range(first, last)}
    pieces = piece_range(spans, start, end)
    if pieces is None:
        assert not covered & set(range(start, end))
        return
    characters = character_range(text, spans, *pieces)
    assert covered & set(range(start, end)) <= set(range(*characters))
    of_pieces = {index for first, last in spans[slice(*pieces)] for index in range(first, last)}
    extra = (set(range(*characters)) - of_pieces) & set(range(max(of_pieces) + 1, len(text)))
    assert all(unicodedata.category(text[index]).startswith("M") for index in extra)
    assert piece_range(spans, *characters) == pieces, "idempotent"


@given(text=TEXTS)
@RELAXED
def test_words_of_a_text_round_trip_through_pieces(tokenizer: Tokenizer, text: str) -> None:
    """The pieces of a word cover the word, except for removed characters at its ends."""
    pieces = pieces_of(tokenizer, text)
    spans = pieces.spans
    covered = {index for first, last in spans for index in range(first, last)}
    for start, end in split_words(text):
        word_pieces_range = piece_range(spans, start, end)
        if word_pieces_range is None:
            continue
        first, last = character_range(text, spans, *word_pieces_range)
        if not start <= first < last <= end:
            # Kana is a word here but part of a word for BERT, which makes the word with an unknown character one [UNK].
            assert tokenizer.token_to_id("[UNK]") in pieces.ids[slice(*word_pieces_range)]
            continue
        assert not covered & (set(range(start, first)) | set(range(last, end)))


@given(words=WORDS)
@RELAXED
def test_labels_of_words_round_trip(tokenizer: Tokenizer, words: list[str]) -> None:
    pieces = word_pieces(tokenizer, [words])[0]
    labels = list(range(len(words)))
    spread_out = piece_labels(pieces.words, labels, -100)
    places = first_pieces(pieces.words, len(words))
    assert len(spread_out) == len(pieces)
    for word, place in enumerate(places):
        if place is None:
            assert not pieces_of(tokenizer, words[word]).ids, "only words that the tokenizer removes have no piece"
        else:
            assert spread_out[place] == word
    assert sorted(label for label in spread_out if label != -100) == [w for w, p in enumerate(places) if p is not None]
    assert piece_labels(pieces.words, labels, -100, continuations=True) == pieces.words


@given(words=WORDS)
@RELAXED
def test_pieces_of_words_are_the_pieces_of_their_text(tokenizer: Tokenizer, words: list[str]) -> None:
    """Splitting a text at white space beforehand makes no difference to the model."""
    alone = word_pieces(tokenizer, [words])[0]
    together = pieces_of(tokenizer, " ".join(words))
    assert alone.ids == together.ids
    starts = [sum(len(word) + 1 for word in words[:index]) for index in range(len(words))]
    assert [
        (a + starts[w], b + starts[w]) for (a, b), w in zip(alone.spans, alone.words, strict=True)
    ] == together.spans


@given(text=TEXTS)
@RELAXED
def test_words_cover_all_but_white_space(text: str) -> None:
    spans = split_words(text)
    # Control characters that are white space in Python don't separate words: the tokenizer removes them.
    spaces = [c in "\t\n\r" or unicodedata.category(c).startswith("Z") for c in text]
    assert all(start < end and not any(spaces[start:end]) for start, end in spans)
    assert sum(end - start for start, end in spans) == len(text) - sum(spaces)
    assert spans == sorted(spans)


@given(
    length=st.integers(0, 60),
    size=st.integers(1, 20),
    overlap=st.integers(0, 19),
    lengths=st.lists(st.integers(1, 9), min_size=60, max_size=60),
)
@settings(max_examples=200, deadline=None)
def test_cores_of_windows_partition_the_pieces(length: int, size: int, overlap: int, lengths: list[int]) -> None:
    if overlap >= size:
        with pytest.raises(ValueError, match="expected 0 <= overlap < size"):
            windows(length, size, overlap)
        return
    words = [word for word, count in enumerate(lengths) for _ in range(count)][:length]
    for parts in (windows(length, size, overlap), windows(length, size, overlap, words)):
        assert parts[0].start == 0
        assert parts[-1].end == length
        assert all(window.end - window.start <= size for window in parts)
        assert all(a.end - b.start == overlap for a, b in pairwise(parts))
        assert all(window.start <= window.core[0] <= window.core[1] <= window.end for window in parts)
        assert [index for window in parts for index in range(*window.core)] == list(range(length))


def test_the_core_of_a_window_has_most_context() -> None:
    assert windows(10, 6, 2) == [Window(0, 6, (0, 5)), Window(4, 10, (5, 10))]
    assert windows(6, 6, 2) == [Window(0, 6, (0, 6))]
    assert windows(0, 6, 2) == [Window(0, 0, (0, 0))]
    # The word of pieces 4 and 5 is in the core of the second window, which contains all of it.
    assert windows(10, 6, 2, [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]) == [Window(0, 6, (0, 4)), Window(4, 10, (4, 10))]
    # The word of pieces 3 to 5 starts before the second window, and is divided.
    assert windows(10, 6, 2, [0, 1, 2, 3, 3, 3, 5, 6, 7, 8]) == [Window(0, 6, (0, 5)), Window(4, 10, (5, 10))]


def test_known_texts(tokenizer: Tokenizer) -> None:
    text = "a cafe\u0301, 한글 中文\u200b." + "b" * 120
    spans = pieces_of(tokenizer, text).spans
    for part, expected in (
        ("cafe\u0301", "cafe\u0301"),  # the accent is included even if the tokenizer removes it
        ("한", "한"),  # uncased, three pieces that share the one character
        ("中文", "中文"),
        ("文\u200b", "文"),
        ("bbb", "b" * 120),  # more than 100 letters are one [UNK]
    ):
        start = text.index(part)
        pieces = piece_range(spans, start, start + len(part))
        assert pieces is not None
        first, end = character_range(text, spans, *pieces)
        assert text[first:end] == expected
    assert piece_range(spans, text.index("\u200b"), text.index("\u200b") + 1) is None
