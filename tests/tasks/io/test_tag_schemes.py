"""Tags to entities and back, in three schemes, and what seqeval makes of the same sequences."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics.sequence_labeling import get_entities

from bert_fast.tasks.alignment import split_words
from bert_fast.tasks.io.tag_schemes import (
    SCHEMES,
    Entity,
    convert_tags,
    entities_in_text,
    guess_scheme,
    problems,
    read_tags,
    tags_of_text,
    write_tags,
)

SENTENCE = {
    "iob1": ["I-P", "O", "I-P", "I-P", "B-P", "I-Q"],
    "iob2": ["B-P", "O", "B-P", "I-P", "B-P", "B-Q"],
    "iobes": ["S-P", "O", "B-P", "E-P", "S-P", "S-Q"],
}
ENTITIES = [Entity("P", 0, 1), Entity("P", 2, 4), Entity("P", 4, 5), Entity("Q", 5, 6)]
TAGS = st.lists(
    st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("P", "Q-R"))]), max_size=12
)


@st.composite
def segmentations(draw: st.DrawFn) -> tuple[list[Entity], int]:
    """Random entities side by side, and the number of words."""
    kinds = draw(st.lists(st.tuples(st.sampled_from(["", "P", "Q"]), st.integers(1, 4)), max_size=8))
    found, place = [], 0
    for kind, length in kinds:
        if kind:
            found.append(Entity(kind, place, place + length))
        place += length
    return found, place


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_says_the_same_in_its_own_tags(scheme: str) -> None:
    assert write_tags(ENTITIES, 6, scheme) == SENTENCE[scheme]
    assert read_tags(SENTENCE[scheme]) == ENTITIES
    assert problems(SENTENCE[scheme], scheme) == []
    assert guess_scheme([SENTENCE[scheme], []]) == scheme
    for other in SCHEMES:
        assert convert_tags(SENTENCE[other], scheme) == SENTENCE[scheme]


@given(segmentations(), st.sampled_from(SCHEMES))
def test_entities_round_trip_and_what_is_written_is_valid(drawn: tuple[list[Entity], int], scheme: str) -> None:
    entities, length = drawn
    tags = write_tags(entities, length, scheme)
    assert len(tags) == length
    assert read_tags(tags) == entities
    assert problems(tags, scheme) == []


@given(TAGS)
@settings(deadline=None)
def test_any_sequence_is_read_as_seqeval_reads_it(tags: list[str]) -> None:
    assert read_tags(tags) == [Entity(kind, first, last + 1) for kind, first, last in get_entities(tags)]


@pytest.mark.parametrize(
    ("scheme", "tags", "expected"),
    [
        ("iob2", ["O", "I-P"], [(1, "I-P continues no P")]),
        ("iob2", ["B-P", "I-Q"], [(1, "I-Q continues no Q")]),
        ("iob2", ["B-P", "E-P"], [(1, "E-P is not of IOB2")]),
        ("iob1", ["B-P", "I-P"], [(0, "B-P follows no P")]),
        ("iobes", ["B-P", "O"], [(0, "B-P is not followed by E-P")]),
        ("iobes", ["B-P", "I-P"], [(1, "I-P is not followed by E-P")]),
        ("iobes", ["S-P", "I-P", "E-P"], [(1, "I-P continues no P")]),
        ("iobes", ["E-P"], [(0, "E-P continues no P")]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_invalid_sequences_are_named(scheme: str, tags: list[str], expected: list[tuple[int, str]]) -> None:
    assert problems(tags, scheme) == expected
    repaired = convert_tags(tags, scheme)
    assert problems(repaired, scheme) == []
    assert read_tags(repaired) == read_tags(tags)


@given(TAGS, st.sampled_from(SCHEMES))
def test_a_sequence_without_problems_is_what_its_entities_are_written_as(tags: list[str], scheme: str) -> None:
    assert (problems(tags, scheme) == []) == (convert_tags(tags, scheme) == tags)


def test_tags_of_no_scheme() -> None:
    assert guess_scheme([["NOUN", "VERB"]]) is None
    for tag in ("X-PER", "B-", "B", ""):
        with pytest.raises(ValueError, match="is no entity tag"):
            read_tags([tag])
    with pytest.raises(ValueError, match="the scheme is 'bilou'; expected one of iob1, iob2, iobes"):
        write_tags([], 1, "bilou")


def test_entities_that_no_tags_can_say() -> None:
    with pytest.raises(ValueError, match="overlap; a word has one tag"):
        write_tags([Entity("P", 0, 2), Entity("Q", 1, 3)], 4, "iob2")
    for wrong in (Entity("P", 1, 1), Entity("P", 3, 5), Entity("P", -1, 2)):
        with pytest.raises(ValueError, match="does not lie in 4 words"):
            write_tags([wrong], 4, "iob2")


def test_entities_by_the_characters_of_a_text() -> None:
    text = "Ada met 李雷 in Москва"
    spans = split_words(text)
    assert [text[start:end] for start, end in spans] == ["Ada", "met", "李", "雷", "in", "Москва"]
    tags = ["B-P", "O", "B-P", "I-P", "O", "B-L"]
    entities = entities_in_text(tags, spans)
    assert [(kind, text[start:end]) for kind, start, end in entities] == [("P", "Ada"), ("P", "李雷"), ("L", "Москва")]
    assert tags_of_text(entities, spans, "iob2") == tags
    with pytest.raises(ValueError, match="does not start and end with a word"):
        tags_of_text([Entity("P", 1, 3)], spans, "iob2")
