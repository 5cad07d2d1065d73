"""Entities as tags of words: IOB1, IOB2 and IOBES.

    words    Ada  met  Charles Babbage  Lovelace
    IOB1     I-P  O    I-P     I-P      B-P       B where an entity follows one of its type
    IOB2     B-P  O    B-P     I-P      B-P       B where an entity starts
    IOBES    S-P  O    B-P     E-P      S-P       E where it ends, S where it is one word

Reading takes every sequence, as conlleval and seqeval do: an entity ends where its type does, and one that nothing
starts starts with its first word. `problems` tells what a scheme forbids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "O"
SCHEMES = ("iob1", "iob2", "iobes")
_PREFIXES = {"iob1": "IB", "iob2": "IB", "iobes": "IBES"}


class Entity(NamedTuple):
    """An entity of the words `start` to `end`, the end excluded."""

    kind: str
    start: int
    end: int


class Problem(NamedTuple):
    """A tag that its scheme forbids where it stands, and why."""

    word: int
    text: str


def split_tag(tag: str) -> tuple[str, str]:
    """A tag's prefix and the kind of its entity: ("B", "PER"), ("O", "").

    Raises:
        ValueError: it is neither O nor a prefix (B, I, E, S) with a kind.
    """
    if tag == OUTSIDE:
        return OUTSIDE, ""
    prefix, dash, kind = tag.partition("-")
    if prefix not in ("B", "I", "E", "S") or not dash or not kind:
        raise ValueError(f"{tag!r} is no entity tag; expected O, or B-, I-, E- or S- and the entity's kind")
    return prefix, kind


def read_tags(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sequence of tags in any of the schemes, in order."""
    found: list[Entity] = []
    start, before, kind = 0, OUTSIDE, ""
    for word, tag in enumerate([*tags, OUTSIDE]):
        prefix, new_kind = split_tag(tag)
        goes_on = before in ("B", "I") and prefix in ("I", "E") and kind == new_kind
        if not goes_on:
            if before != OUTSIDE:
                found.append(Entity(kind, start, word))
            start = word
        before, kind = prefix, new_kind
    return found


def write_tags(entities: Iterable[Entity], length: int, scheme: str) -> list[str]:
    """The tags of `length` words with these entities.

    Raises:
        ValueError: the scheme is unknown, an entity is empty or not inside the words, or two of them overlap.
    """
    check_scheme(scheme)
    tags = [OUTSIDE] * length
    last: Entity | None = None
    for entity in sorted(entities, key=lambda entity: (entity.start, entity.end)):
        kind, start, end = entity
        if not 0 <= start < end <= length:
            raise ValueError(f"the entity {entity} does not lie in {length} words")
        if last is not None and start < last.end:
            raise ValueError(f"the entities {last} and {entity} overlap; a word has one tag")
        inside = "I"
        first = "I" if scheme == "iob1" and (last is None or last[::2] != (kind, start)) else "B"
        tags[start:end] = [f"{inside}-{kind}"] * (end - start)
        tags[start] = f"{first}-{kind}"
        if scheme == "iobes":
            tags[end - 1] = f"{'S' if end - start == 1 else 'E'}-{kind}"
        last = entity
    return tags


def convert_tags(tags: Sequence[str], scheme: str) -> list[str]:
    """The same entities in another scheme."""
    return write_tags(read_tags(tags), len(tags), scheme)


def problems(tags: Sequence[str], scheme: str) -> list[Problem]:
    """What `scheme` forbids in a sequence of tags.

    Raises:
        ValueError: the scheme is unknown, or a tag is of no scheme.
    """
    check_scheme(scheme)
    found: list[Problem] = []
    before, kind_before = OUTSIDE, ""
    for word, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = split_tag(tag)
        follows = before if kind == kind_before else OUTSIDE
        if prefix != OUTSIDE and prefix not in _PREFIXES[scheme]:
            found.append(Problem(word, f"{tag} is not of {scheme.upper()}"))
        elif scheme == "iob1":
            if prefix == "B" and follows == OUTSIDE:
                found.append(Problem(word, f"{tag} follows no {kind}"))
        elif prefix in ("I", "E") and follows not in ("B", "I"):
            found.append(Problem(word, f"{tag} continues no {kind}"))
        elif scheme == "iobes" and before in ("B", "I") and not (prefix in ("I", "E") and follows != OUTSIDE):
            found.append(Problem(word - 1, f"{before}-{kind_before} is not followed by E-{kind_before}"))
        before, kind_before = prefix, kind
    return found


def is_entity_tag(tag: str) -> bool:
    """Whether a tag has the form of one of the schemes."""
    try:
        split_tag(tag)
    except ValueError:
        return False
    return True


def guess_scheme(sentences: Iterable[Sequence[str]]) -> str | None:
    """The scheme that forbids nothing in these tags; None where they are no entity tags (parts of speech, say).

    What fits several schemes (no two entities side by side) goes to IOB2, then IOBES, then IOB1; what fits none to the
    one with the fewest problems.
    """
    sentences = list(sentences)
    tags = {tag for sentence in sentences for tag in sentence}
    if not all(map(is_entity_tag, tags)):
        return None
    counts = {
        scheme: sum(len(problems(sentence, scheme)) for sentence in sentences) for scheme in ("iob2", "iobes", "iob1")
    }
    return min(counts, key=counts.__getitem__)


def check_scheme(scheme: str) -> None:
    """ValueError unless the scheme is known."""
    if scheme not in SCHEMES:
        raise ValueError(f"the scheme is {scheme!r}; expected one of {', '.join(SCHEMES)}")


def entities_in_text(tags: Sequence[str], spans: Sequence[tuple[int, int]]) -> list[Entity]:
    """The entities of tagged words by the characters of the text: `spans` are those of the words."""
    return [Entity(kind, spans[start][0], spans[end - 1][1]) for kind, start, end in read_tags(tags)]


def tags_of_text(entities: Iterable[Entity], spans: Sequence[tuple[int, int]], scheme: str) -> list[str]:
    """The tags of a text's words, `spans`, from entities by characters; undoes `entities_in_text`.

    Raises:
        ValueError: an entity does not start and end with a word, or two overlap.
    """
    starts = {start: word for word, (start, _) in enumerate(spans)}
    ends = {end: word + 1 for word, (_, end) in enumerate(spans)}
    found = []
    for entity in entities:
        kind, start, end = entity
        if start not in starts or end not in ends:
            raise ValueError(f"the entity {entity} does not start and end with a word of the text")
        found.append(Entity(kind, starts[start], ends[end]))
    return write_tags(found, len(spans), scheme)
