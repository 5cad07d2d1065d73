"""Tags to entities and back in every scheme, compared with seqeval; how the tags of public data are written."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.tasks.alignment import split_words
from bert_fast.tasks.io.tag_schemes import (
    SCHEMES,
    Entity,
    TagStyle,
    char_entities_to_tags,
    convert_tags,
    detect_style,
    entities_to_tags,
    tags_to_char_entities,
    tags_to_entities,
    violations,
    written_entities,
)

SENTENCE = {
    "iob1": ["I-P", "O", "I-P", "I-P", "B-P", "I-Q"],
    "iob2": ["B-P", "O", "B-P", "I-P", "B-P", "B-Q"],
    "iobes": ["S-P", "O", "B-P", "E-P", "S-P", "S-Q"],
}
WRITTEN = {
    **SENTENCE,
    "bilou": ["U-P", "O", "B-P", "L-P", "U-P", "U-Q", "B-P", "I-P", "L-P"],
    "bmes": ["S-P", "O", "B-P", "E-P", "S-P", "S-Q", "B-P", "M-P", "E-P"],
    "bmewo": ["W-P", "O", "B-P", "E-P", "W-P", "W-Q", "B-P", "M-P", "E-P"],
}
ENTITIES = [Entity("P", 0, 1), Entity("P", 2, 4), Entity("P", 4, 5), Entity("Q", 5, 6)]
TAGS = st.lists(
    st.sampled_from(["O", *(f"{prefix}-{kind}" for prefix in "BIES" for kind in ("P", "Q-R"))]), max_size=12
)


@st.composite
def segmentations(draw: st.DrawFn) -> tuple[list[Entity], int]:
    """Random, possibly adjacent entities, and the number of words."""
    kinds = draw(st.lists(st.tuples(st.sampled_from(["", "P", "Q"]), st.integers(1, 4)), max_size=8))
    entities, start = [], 0
    for kind, length in kinds:
        if kind:
            entities.append(Entity(kind, start, start + length))
        start += length
    return entities, start


@pytest.mark.parametrize("scheme", SENTENCE)
def test_every_scheme_represents_the_same_entities(scheme: str) -> None:
    assert entities_to_tags(ENTITIES, 6, scheme) == SENTENCE[scheme]
    assert tags_to_entities(SENTENCE[scheme]) == ENTITIES
    assert violations(SENTENCE[scheme], scheme) == []
    assert detect_style([SENTENCE[scheme], []]) == TagStyle(scheme)
    for other in SENTENCE:
        assert convert_tags(SENTENCE[other], scheme) == SENTENCE[scheme]


@given(segmentations(), st.sampled_from(SCHEMES))
def test_entities_round_trip_through_valid_tags(drawn: tuple[list[Entity], int], scheme: str) -> None:
    entities, length = drawn
    tags = entities_to_tags(entities, length, scheme)
    assert len(tags) == length
    assert tags_to_entities(tags) == entities
    assert violations(tags, scheme) == []


@given(TAGS)
@settings(deadline=None)
def test_any_sequence_is_decoded_as_by_seqeval(tags: list[str]) -> None:
    from seqeval.metrics.sequence_labeling import get_entities  # not in every environment that collects the tests

    assert tags_to_entities(tags) == [Entity(kind, first, last + 1) for kind, first, last in get_entities(tags)]


@pytest.mark.parametrize(
    ("scheme", "tags", "expected"),
    [
        ("iob2", ["O", "I-P"], [(1, "I-P does not continue an entity P")]),
        ("iob2", ["B-P", "I-Q"], [(1, "I-Q does not continue an entity Q")]),
        ("iob2", ["B-P", "E-P"], [(1, "E-P is not a tag of IOB2")]),
        ("iob1", ["B-P", "I-P"], [(0, "B-P does not follow an entity P")]),
        ("iobes", ["B-P", "O"], [(0, "B-P is not followed by E-P")]),
        ("iobes", ["B-P", "I-P"], [(1, "I-P is not followed by E-P")]),
        ("iobes", ["S-P", "I-P", "E-P"], [(1, "I-P does not continue an entity P")]),
        ("iobes", ["E-P"], [(0, "E-P does not continue an entity P")]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else value,
)
def test_violations_are_listed(scheme: str, tags: list[str], expected: list[tuple[int, str]]) -> None:
    assert violations(tags, scheme) == expected
    repaired = convert_tags(tags, scheme)
    assert violations(repaired, scheme) == []
    assert tags_to_entities(repaired) == tags_to_entities(tags)


@given(TAGS, st.sampled_from(SCHEMES))
def test_a_sequence_without_violations_is_canonical(tags: list[str], scheme: str) -> None:
    assert (violations(tags, scheme) == []) == (convert_tags(tags, scheme) == tags)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("form", ["prefix", "suffix", "letter"])
def test_written_tags_are_detected_read_and_written(scheme: str, form: str) -> None:
    forms = {"prefix": "{0}-{1}", "suffix": "{1}-{0}", "letter": "{0}"}
    parts = [tag.split("-") for tag in WRITTEN[scheme]]
    written = [tag[0] if tag[0] == "O" else forms[form].format(*tag) for tag in parts]
    kind = "_" if form == "letter" else "P"
    style = detect_style([written, ["O"]])
    assert style is not None
    assert style.form == form
    if form != "letter":  # P and Q are one kind then, and I-P I-Q of IOB1 one entity
        assert style.scheme == scheme
        assert tags_to_entities(style.read(written))[:3] == ENTITIES[:3]
    assert TagStyle(scheme, form).write(style.read(written)) == written
    assert tags_to_entities(style.read(written))[1][:2] == (kind, 2)
    assert written_entities(written) == tags_to_entities(style.read(written))
    lower = [tag.lower() if form == "letter" else tag.replace("B-", "b-").replace("O", "o") for tag in written]
    assert style.read(lower) == style.read(written)


@pytest.mark.parametrize(
    ("tags", "style"),
    [
        (["B_PER", "I_PER", "o"], TagStyle("iob2")),
        (["b-per", "i-per", "o"], TagStyle("iob2")),
        (["I:PER", "O", "I:LOC"], TagStyle("iob1")),
        (["B-B-ORG", "I-B-ORG"], TagStyle("iob2")),
        (["PER-B", "PER-I", "ORG/E-B"], TagStyle("iob2", "suffix")),
        (["O", "O"], TagStyle("iob2")),
        (["B", "M", "E", "S"], TagStyle("bmes", "letter")),
        (["PER", "O", "LOC"], None),
        (["NOUN", "VERB"], None),
        (["N", "V", "S", "B"], None),
        (["S", "B"], None),
        (["-LRB-", "S-BAR", "NN", "NN", "NN"], None),
        (["person-actor", "O", "location-GPE"], None),
        (["0", "1", "2"], None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_styles_of_public_data(tags: list[str], style: TagStyle | None) -> None:
    assert detect_style([tags]) == style


def test_values_that_are_not_entity_tags() -> None:
    for tag in ("X-PER", "B-", "B", ""):
        with pytest.raises(ValueError, match="is not an entity tag"):
            tags_to_entities([tag])
        with pytest.raises(ValueError, match=r"word 1: .* is not an entity tag such as B-PER"):
            TagStyle("iob2").read([tag])
    with pytest.raises(ValueError, match="scheme is 'bilouw'; expected one of iob1, iob2, iobes"):
        entities_to_tags([], 1, "bilouw")
    rows = [["B-PER", "O"]] * 50 + [["O", "X-PER"]]
    with pytest.raises(
        ValueError, match=r"row 51, word 2: 'X-PER' is not an entity tag, as others are, such as 'B-PER'"
    ):
        detect_style(rows)
    for outside in ("0", "OTHER", "-", "_"):
        with pytest.raises(ValueError, match=rf"row 1, word 2: '{outside}' is not an entity tag, .*it is O"):
            detect_style([["B-PER", *[outside] * 20]])
    with pytest.raises(ValueError, match=r"tags begin with B, M, U; expected the letters of one scheme: BI \(iob2\)"):
        detect_style([["B-P", "M-P", "U-P"]])


def test_entities_that_tags_can_not_represent() -> None:
    with pytest.raises(ValueError, match="overlap; expected at most one entity per word"):
        entities_to_tags([Entity("P", 0, 2), Entity("Q", 1, 3)], 4, "iob2")
    for wrong in (Entity("P", 1, 1), Entity("P", 3, 5), Entity("P", -1, 2)):
        with pytest.raises(ValueError, match="is out of range; expected 0 <= start < end <= 4"):
            entities_to_tags([wrong], 4, "iob2")


def test_entities_as_character_ranges() -> None:
    text = "Ada met 李雷 in Москва"
    spans = split_words(text)
    assert [text[start:end] for start, end in spans] == ["Ada", "met", "李", "雷", "in", "Москва"]
    tags = ["B-P", "O", "B-P", "I-P", "O", "B-L"]
    entities = tags_to_char_entities(tags, spans)
    assert [(kind, text[start:end]) for kind, start, end in entities] == [("P", "Ada"), ("P", "李雷"), ("L", "Москва")]
    assert char_entities_to_tags(entities, spans, "iob2") == tags
    with pytest.raises(ValueError, match="does not start and end at word boundaries"):
        char_entities_to_tags([Entity("P", 1, 3)], spans, "iob2")
