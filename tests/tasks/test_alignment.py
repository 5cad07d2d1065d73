"""Characters and words to pieces and back, on text that the tokenizer changes on the way."""

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
    piece_range,
    split_words,
    spread,
    text_pieces,
    windows,
    word_pieces,
)

# Plain letters, composed and combining accents, ideographs, kana, Hangul (which comes apart into several pieces),
# emoji with joiners, selectors and skin tones, zero-width and control characters, capitals that change their length,
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
    """A vocabulary with the letters of ALPHABET but one, as they stand and taken apart: the rest is [UNK]."""
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
    """A span of characters, as pieces, as characters: every character that a piece stands for is still in it, and what
    came on top belongs to the same pieces, or is marks of the last letter."""
    start, end = sorted(min(place, len(text)) for place in cut)
    spans = pieces_of(tokenizer, text).spans
    assert all(first < last <= len(text) for first, last in spans)
    assert [span[0] for span in spans] == sorted(span[0] for span in spans)
    covered = {place for first, last in spans for place in range(first, last)}
    found = piece_range(spans, start, end)
    if found is None:
        assert not covered & set(range(start, end))
        return
    got = character_range(text, spans, *found)
    assert covered & set(range(start, end)) <= set(range(*got))
    own = {place for first, last in spans[slice(*found)] for place in range(first, last)}
    extra = (set(range(*got)) - own) & set(range(max(own) + 1, len(text)))
    assert all(unicodedata.category(text[place]).startswith("M") for place in extra)
    assert piece_range(spans, *got) == found, "a second time changes nothing"


@given(text=TEXTS)
@RELAXED
def test_words_of_a_text_round_trip_through_pieces(tokenizer: Tokenizer, text: str) -> None:
    """Each word, found by its pieces, is the word but for dropped characters at its ends."""
    pieces = pieces_of(tokenizer, text)
    spans = pieces.spans
    covered = {place for first, last in spans for place in range(first, last)}
    for start, end in split_words(text):
        found = piece_range(spans, start, end)
        if found is None:
            continue
        first, last = character_range(text, spans, *found)
        if not start <= first < last <= end:
            # Kana is a word here and part of a word for BERT; what is unknown in such a word makes it one piece.
            assert tokenizer.token_to_id("[UNK]") in pieces.ids[slice(*found)]
            continue
        assert not covered & (set(range(start, first)) | set(range(last, end)))


@given(words=WORDS)
@RELAXED
def test_labels_of_words_round_trip(tokenizer: Tokenizer, words: list[str]) -> None:
    pieces = word_pieces(tokenizer, [words])[0]
    labels = list(range(len(words)))
    spread_out = spread(pieces.words, labels, -100)
    places = first_pieces(pieces.words, len(words))
    assert len(spread_out) == len(pieces)
    for word, place in enumerate(places):
        if place is None:
            assert not pieces_of(tokenizer, words[word]).ids, "only what the tokenizer drops has no piece"
        else:
            assert spread_out[place] == word
    assert sorted(label for label in spread_out if label != -100) == [w for w, p in enumerate(places) if p is not None]
    assert spread(pieces.words, labels, -100, continuations=True) == pieces.words


@given(words=WORDS)
@RELAXED
def test_pieces_of_words_are_the_pieces_of_their_text(tokenizer: Tokenizer, words: list[str]) -> None:
    """Cutting a text into words beforehand, at white space, makes no difference to the model."""
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
    # Control characters that Python takes for white space part no words for the tokenizer, which drops them.
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
def test_windows_see_every_piece_and_answer_for_it_once(
    length: int, size: int, overlap: int, lengths: list[int]
) -> None:
    if overlap >= size:
        with pytest.raises(ValueError, match="can't overlap by"):
            windows(length, size, overlap)
        return
    words = [word for word, count in enumerate(lengths) for _ in range(count)][:length]
    for found in (windows(length, size, overlap), windows(length, size, overlap, words)):
        assert found[0].start == 0
        assert found[-1].end == length
        assert all(window.end - window.start <= size for window in found)
        assert all(a.end - b.start == overlap for a, b in pairwise(found))
        assert all(window.start <= window.core[0] <= window.core[1] <= window.end for window in found)
        assert [place for window in found for place in range(*window.core)] == list(range(length))


def test_the_core_of_a_window_is_what_it_sees_best() -> None:
    assert windows(10, 6, 2) == [Window(0, 6, (0, 5)), Window(4, 10, (5, 10))]
    assert windows(6, 6, 2) == [Window(0, 6, (0, 6))]
    assert windows(0, 6, 2) == [Window(0, 0, (0, 0))]
    # The word of pieces 4 and 5 is answered for by the second window, which has all of it.
    assert windows(10, 6, 2, [0, 1, 2, 3, 4, 4, 5, 6, 7, 8]) == [Window(0, 6, (0, 4)), Window(4, 10, (4, 10))]
    # That of pieces 3 to 5 starts before the second window: it can't be helped.
    assert windows(10, 6, 2, [0, 1, 2, 3, 3, 3, 5, 6, 7, 8]) == [Window(0, 6, (0, 5)), Window(4, 10, (5, 10))]


def test_known_texts(tokenizer: Tokenizer) -> None:
    text = "a cafe\u0301, 한글 中文\u200b." + "b" * 120
    spans = pieces_of(tokenizer, text).spans
    for part, expected in (
        ("cafe\u0301", "cafe\u0301"),  # the accent is no piece where the tokenizer strips it, and part of the answer
        ("한", "한"),  # uncased, three pieces that share the one character
        ("中文", "中文"),
        ("文\u200b", "文"),
        ("bbb", "b" * 120),  # more than 100 letters are one [UNK]
    ):
        start = text.index(part)
        found = piece_range(spans, start, start + len(part))
        assert found is not None
        first, end = character_range(text, spans, *found)
        assert text[first:end] == expected
    assert piece_range(spans, text.index("\u200b"), text.index("\u200b") + 1) is None
