"""Sentences of raw text, and equality of documents."""

from __future__ import annotations

import pytest

from bert_fast.data.cleaning import Raw, clean, digest, split_sentences, splitter


@pytest.mark.parametrize(
    ("text", "language", "expected"),
    [
        ("One. Two! Three? Four", "en", ["One.", "Two!", "Three?", "Four"]),
        ("Dr. Smith came at 5 p.m. He sat down.", "en", ["Dr. Smith came at 5 p.m.", "He sat down."]),
        ("Das gilt z. B. hier. Dort nicht.", "de", ["Das gilt z. B. hier.", "Dort nicht."]),
        ("今天天气很好。我们去公园吧！他说：“好的。”", "zh", ["今天天气很好。", "我们去公园吧！", "他说：“好的。”"]),
        ("", "en", []),
    ],
    ids=["plain", "abbreviations", "german", "chinese", "empty"],
)
def test_split_sentences(text, language, expected):
    assert split_sentences(text, language) == expected


WRAPPED = "A title\nA sentence that goes\non. Another.\n \nA paragraph."


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("lines", ["A title", "A sentence that goes", "on. Another.", "A paragraph."]),
        ("split", ["A title", "A sentence that goes", "on.", "Another.", "A paragraph."]),
        ("split_wrapped", ["A title A sentence that goes on.", "Another.", "A paragraph."]),
    ],
)
def test_modes_of_splitting(mode, expected):
    document, raw = clean(Raw("here", WRAPPED), splitter(mode, "en"), 1)
    assert document == expected
    assert raw.problem == ""


def test_near_empty_counts_visible_characters():
    raw = Raw("here", "a b\nc d")
    assert clean(raw, str.splitlines, 4)[0] == ["a b", "c d"]
    document, dropped = clean(raw, str.splitlines, 5)
    assert document == []
    assert (dropped.problem, dropped.detail) == ("near_empty", "4 characters")


def test_a_few_control_characters_do_not_drop_a_document():
    document, _ = clean(Raw("here", "A text with one stray \x07 bell in it."), str.splitlines, 1)
    assert document == ["A text with one stray \x07 bell in it."]


def test_equal_documents_share_a_digest():
    assert digest(["One is first.", "Two."]) == digest(["ONE IS  first.", "two."]) == digest(["One is first. Two."])
    assert digest(["\ufb01ne"]) == digest(["fine"]), "Unicode's compatibility forms are equal"
    assert digest(["One."]) != digest(["Two."])
