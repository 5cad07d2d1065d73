"""The tag schemes of named entities: IOB1, IOB2 and IOBES.

    words    Ada  met  Charles Babbage  Lovelace
    IOB1     I-P  O    I-P     I-P      B-P       B: the entity follows one of its kind
    IOB2     B-P  O    B-P     I-P      B-P       B: first word of an entity
    IOBES    S-P  O    B-P     E-P      S-P       E: last word, S: an entity of one word

Every sequence can be decoded, as by conlleval and seqeval: an entity ends where its kind changes, and starts at its
first word even without B. `violations` lists the tags that a scheme forbids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
SCHEMES = ("iob1", "iob2", "iobes")
_PREFIXES = {"iob1": "IB", "iob2": "IB", "iobes": "IBES"}


class Entity(NamedTuple):
    """An entity over the words [start, end)."""

    kind: str
    start: int
    end: int


class Violation(NamedTuple):
    """The index of a word whose tag its scheme forbids, and the reason."""

    word: int
    text: str


def split_tag(tag: str) -> tuple[str, str]:
    """Split a tag into its prefix and the kind of its entity: ("B", "PER"), ("O", "").

    Raises:
        ValueError: the tag is neither O nor a prefix (B, I, E, S) with a kind.
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    if prefix not in ("B", "I", "E", "S") or not dash or not kind:
        raise ValueError(f"{tag!r} is not an entity tag; expected O, or B-, I-, E- or S- followed by a kind")
    return prefix, kind


def tags_to_entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sequence of tags in any scheme, in order."""
    entities: list[Entity] = []
    start, before, kind = 0, OUTSIDE, ""
    for word, tag in enumerate([*tags, OUTSIDE]):
        prefix, new_kind = split_tag(tag)
        continues = before in ("B", "I") and prefix in ("I", "E") and kind == new_kind
        if not continues:
            if before != OUTSIDE:
                entities.append(Entity(kind, start, word))
            start = word
        before, kind = prefix, new_kind
    return entities


def entities_to_tags(entities: Iterable[Entity], length: int, scheme: str) -> list[str]:
    """The tags of `length` words with these entities.

    Raises:
        ValueError: the scheme is unknown, an entity is empty or out of range, or two entities overlap.
    """
    check_scheme(scheme)
    tags = [OUTSIDE] * length
    last: Entity | None = None
    for entity in sorted(entities, key=lambda entity: (entity.start, entity.end)):
        kind, start, end = entity
        if not 0 <= start < end <= length:
            raise ValueError(f"{entity} is out of range; expected 0 <= start < end <= {length}")
        if last is not None and start < last.end:
            raise ValueError(f"{last} and {entity} overlap; expected at most one entity per word")
        inside = "I"
        first = "I" if scheme == "iob1" and (last is None or last[::2] != (kind, start)) else "B"
        tags[start:end] = [f"{inside}-{kind}"] * (end - start)
        tags[start] = f"{first}-{kind}"
        if scheme == "iobes":
            tags[end - 1] = f"{'S' if end - start == 1 else 'E'}-{kind}"
        last = entity
    return tags


def convert_tags(tags: Sequence[str], scheme: str) -> list[str]:
    """The tags of the same entities in another scheme."""
    return entities_to_tags(tags_to_entities(tags), len(tags), scheme)


def violations(tags: Sequence[str], scheme: str) -> list[Violation]:
    """The tags of a sequence that `scheme` forbids.

    Raises:
        ValueError: the scheme is unknown, or a value is not an entity tag.
    """
    check_scheme(scheme)
    violated: list[Violation] = []
    before, kind_before = OUTSIDE, ""
    for word, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = split_tag(tag)
        follows = before if kind == kind_before else OUTSIDE
        if prefix != OUTSIDE and prefix not in _PREFIXES[scheme]:
            violated.append(Violation(word, f"{tag} is not a tag of {scheme.upper()}"))
        elif scheme == "iob1":
            if prefix == "B" and follows == OUTSIDE:
                violated.append(Violation(word, f"{tag} does not follow an entity {kind}"))
        elif prefix in ("I", "E") and follows not in ("B", "I"):
            violated.append(Violation(word, f"{tag} does not continue an entity {kind}"))
        elif scheme == "iobes" and before in ("B", "I") and not (prefix in ("I", "E") and follows != OUTSIDE):
            violated.append(Violation(word - 1, f"{before}-{kind_before} is not followed by E-{kind_before}"))
        before, kind_before = prefix, kind
    return violated


def is_entity_tag(tag: str) -> bool:
    """Whether a tag has the form of an entity tag."""
    try:
        split_tag(tag)
    except ValueError:
        return False
    return True


def guess_scheme(sentences: Iterable[Sequence[str]]) -> str | None:
    """The scheme with the fewest violations in these tags; None if they are not entity tags (parts of speech, say).

    Ties (no two adjacent entities, for example) are resolved in the order IOB2, IOBES, IOB1.
    """
    sentences = list(sentences)
    tags = {tag for sentence in sentences for tag in sentence}
    if not all(map(is_entity_tag, tags)):
        return None
    counts = {
        scheme: sum(len(violations(sentence, scheme)) for sentence in sentences) for scheme in ("iob2", "iobes", "iob1")
    }
    return min(counts, key=counts.__getitem__)


def check_scheme(scheme: str) -> None:
    """Raise ValueError if the scheme is unknown."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; expected one of {', '.join(SCHEMES)}")


def tags_to_char_entities(tags: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[Entity]:
    """The entities of tagged words as character ranges of the text; `spans` are the ranges of the words."""
    return [Entity(kind, spans[start][0], spans[end - 1][1]) for kind, start, end in tags_to_entities(tags)]


def char_entities_to_tags(entities: Iterable[Entity], spans: Sequence[tuple[int, int]], scheme: str) -> list[str]:
    """The tags of words from entities as character ranges of the text; the inverse of `tags_to_char_entities`.

    Args:
        entities: as character ranges.
        spans: the character range of each word.
        scheme: of the tags.

    Raises:
        ValueError: an entity does not start and end at word boundaries, or two entities overlap.
    """
    starts = {start: word for word, (start, _) in enumerate(spans)}
    ends = {end: word + 1 for word, (_, end) in enumerate(spans)}
    word_entities = []
    for entity in entities:
        kind, start, end = entity
        if start not in starts or end not in ends:
            raise ValueError(f"{entity} does not start and end at word boundaries of the text")
        word_entities.append(Entity(kind, starts[start], ends[end]))
    return entities_to_tags(word_entities, len(spans), scheme)
