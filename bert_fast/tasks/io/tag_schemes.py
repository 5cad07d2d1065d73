"""The tag schemes of named entities: IOB1, IOB2, and IOBES under its other names and letters.

    words    Ada  met  Charles Babbage  Lovelace
    IOB1     I-P  O    I-P     I-P      B-P       B: the entity follows one of its kind
    IOB2     B-P  O    B-P     I-P      B-P       B: first word of an entity
    IOBES    S-P  O    B-P     E-P      S-P       E: last word, S: an entity of one word
    BILOU    U-P  O    B-P     L-P      U-P       L: last, U: unit
    BMES     S-P  O    B-P     E-P      S-P       M: middle, in place of I
    BMEWO    W-P  O    B-P     E-P      W-P       M: middle, W: whole

Functions take tags with the letters of IOBES; `TagStyle` translates those of data. Every sequence can be decoded, as by
conlleval and seqeval: an entity ends where its kind changes, and starts at its first word even without B. `violations`
lists the tags that a scheme forbids.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

OUTSIDE = "O"
NO_KIND = "_"  # of tags that are a letter alone, as in seqeval
# The letters of each scheme for B, I, E and S of IOBES.
_LETTERS = {"iob1": "BI", "iob2": "BI", "iobes": "BIES", "bilou": "BILU", "bmes": "BMES", "bmewo": "BMEW"}
SCHEMES = tuple(_LETTERS)
_CANONICAL = {"B": "B", "I": "I", "M": "I", "E": "E", "L": "E", "S": "S", "U": "S", "W": "S"}
ENTITY_TAG = re.compile(r"[BIESMLUW]-.+", re.DOTALL)  # in its most common form
_FORMS = {
    "prefix": re.compile(r"(?P<letter>[BIESMLUWbiesmluw])[-_:/](?P<kind>.+)", re.DOTALL),
    "suffix": re.compile(r"(?P<kind>.+)[-_:/](?P<letter>[BIESMLUWbiesmluw])", re.DOTALL),
    "letter": re.compile(r"(?P<letter>[BIESMLUWbiesmluw])(?P<kind>)"),
}


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
    """The tags of `length` words with these entities, with the letters of IOBES.

    Raises:
        ValueError: the scheme is unknown, an entity is empty or out of range, or two entities overlap.
    """
    letters = _letters(scheme)
    tags = [OUTSIDE] * length
    last: Entity | None = None
    for entity in sorted(entities, key=lambda entity: (entity.start, entity.end)):
        kind, start, end = entity
        if not 0 <= start < end <= length:
            raise ValueError(f"{entity} is out of range; expected 0 <= start < end <= {length}")
        if last is not None and start < last.end:
            raise ValueError(f"{last} and {entity} overlap; expected at most one entity per word")
        first = "I" if scheme == "iob1" and (last is None or last[::2] != (kind, start)) else "B"
        tags[start:end] = [f"I-{kind}"] * (end - start)
        tags[start] = f"{first}-{kind}"
        if len(letters) == 4:
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
    letters = "BIES"[: len(_letters(scheme))]
    violated: list[Violation] = []
    before, kind_before = OUTSIDE, ""
    for word, tag in enumerate([*tags, OUTSIDE]):
        prefix, kind = split_tag(tag)
        follows = before if kind == kind_before else OUTSIDE
        if prefix != OUTSIDE and prefix not in letters:
            violated.append(Violation(word, f"{tag} is not a tag of {scheme.upper()}"))
        elif scheme == "iob1":
            if prefix == "B" and follows == OUTSIDE:
                violated.append(Violation(word, f"{tag} does not follow an entity {kind}"))
        elif prefix in ("I", "E") and follows not in ("B", "I"):
            violated.append(Violation(word, f"{tag} does not continue an entity {kind}"))
        elif len(letters) == 4 and before in ("B", "I") and not (prefix in ("I", "E") and follows != OUTSIDE):
            violated.append(Violation(word - 1, f"{before}-{kind_before} is not followed by E-{kind_before}"))
        before, kind_before = prefix, kind
    return violated


@dataclass(frozen=True)
class TagStyle:
    """How the entity tags of data are written.

    Attributes:
        scheme: one of `SCHEMES`.
        form: "prefix" (B-PER), "suffix" (PER-B), or "letter" (B, without kinds).
    """

    scheme: str
    form: str = "prefix"

    def read(self, tags: Sequence[str]) -> list[str]:
        """The tags in the form and with the letters of IOBES; a letter and O may be lower-case.

        Raises:
            ValueError: a value is not a tag of this form.
        """
        read = []
        for word, tag in enumerate(tags):
            parsed = _parse(tag, self.form)
            if parsed is None:
                example = {"prefix": "B-PER", "suffix": "PER-B", "letter": "B"}[self.form]
                raise ValueError(f"word {word + 1}: {tag!r} is not an entity tag such as {example}, or O")
            letter, kind = parsed
            read.append(OUTSIDE if letter == OUTSIDE else f"{_CANONICAL[letter]}-{kind}")
        return read

    def write(self, tags: Sequence[str]) -> list[str]:
        """Tags with the letters of IOBES as tags of this style, in upper case; the inverse of `read`."""
        letters = dict(zip("BIES", _LETTERS[self.scheme], strict=False))
        written = []
        for tag in tags:
            prefix, kind = split_tag(tag)
            letter = letters.get(prefix, prefix)
            parts = {"prefix": f"{letter}-{kind}", "suffix": f"{kind}-{letter}", "letter": letter}
            written.append(OUTSIDE if prefix == OUTSIDE else parts[self.form])
        return written


def _parse(tag: str, form: str) -> tuple[str, str] | None:
    """The letter of a tag, in upper case, and its kind; None if it has another form."""
    if tag in ("O", "o"):
        return OUTSIDE, ""
    match = _FORMS[form].fullmatch(tag)
    return None if match is None else (match["letter"].upper(), match["kind"] or NO_KIND)


def detect_style(
    sentences: Iterable[Sequence[str]], where: Callable[[int], str] = lambda row: f"row {row + 1}"
) -> TagStyle | None:
    """How the tags of these sentences are written; None if they are not entity tags (parts of speech, say).

    The scheme is the one with the fewest violations among those whose letters the tags have. Ties (no two adjacent
    entities, for example) are resolved in the order IOB2, IOBES, IOB1.

    Args:
        sentences: the tags of each row.
        where: the place of a row, by its index, for messages.

    Raises:
        ValueError: half of the words or of the tags are of entities, but some tags are not, or they have letters of
            several schemes; the message names a tag and its place.
    """
    sentences = [list(sentence) for sentence in sentences]
    counts = Counter(tag for sentence in sentences for tag in sentence if tag not in ("O", "o"))
    by_form = {form: {tag: n for tag, n in counts.items() if _parse(tag, form)} for form in _FORMS}
    form = max(by_form, key=lambda form: sum(by_form[form].values()))
    tags = by_form[form]
    if not counts and any(sentences):
        return TagStyle("iob2")
    if not tags or (2 * sum(tags.values()) < counts.total() and 2 * len(tags) < len(counts)):
        return None  # entity tags by accident, if any, neither half of the words nor of the tags
    letters = {_FORMS[form].fullmatch(tag)["letter"].upper() for tag in tags}  # type: ignore[index]
    if form == "letter" and not ("B" in letters and letters & set("IEML")):
        return None  # a tag set of single letters, or one without first words
    if strays := [tag for tag in counts if tag not in tags]:
        row, tag = next((row, tag) for row, sentence in enumerate(sentences) for tag in sentence if tag in strays)
        more = f" (and {len(strays) - 1} other tags)" if len(strays) > 1 else ""
        raise ValueError(
            f"{where(row)}, word {sentences[row].index(tag) + 1}: {tag!r}{more} is not an entity tag, as others are, "
            f"such as {next(iter(tags))!r}; correct it (outside of entities it is O), or set options.scheme to none"
        )
    return TagStyle(_detect_scheme(sentences, letters, form), form)


def detect_form(sentences: Iterable[Sequence[str]]) -> str:
    """The form of most entity tags; see `TagStyle`."""
    counts = Counter(tag for sentence in sentences for tag in sentence if tag not in ("O", "o"))
    return max(_FORMS, key=lambda form: sum(counts[tag] for tag in counts if _parse(tag, form)))


def written_entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of a sequence of tags in any scheme and form, in order.

    Raises:
        ValueError: a value is not an entity tag.
    """
    return tags_to_entities(TagStyle("iobes", detect_form([tags])).read(tags))


def _detect_scheme(sentences: Sequence[Sequence[str]], letters: set[str], form: str) -> str:
    """The scheme whose letters these are, with the fewest violations."""
    if letters <= set("BIES"):
        canonical = [TagStyle("iobes", form).read(sentence) for sentence in sentences]
        counts = {scheme: sum(len(violations(tags, scheme)) for tags in canonical) for scheme in _PLAIN_SCHEMES}
        return min(counts, key=counts.__getitem__)
    for scheme in ("bilou", "bmes", "bmewo"):
        if letters <= set(_LETTERS[scheme]):
            return scheme
    raise ValueError(
        f"tags begin with {', '.join(sorted(letters))}; expected the letters of one scheme: "
        + ", ".join(f"{_LETTERS[scheme]} ({scheme})" for scheme in SCHEMES[1:])
    )


_PLAIN_SCHEMES = ("iob2", "iobes", "iob1")  # with the letters of IOBES, the most likely first


def _letters(scheme: str) -> str:
    """The letters of a scheme.

    Raises:
        ValueError: the scheme is unknown.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme is {scheme!r}; expected one of {', '.join(SCHEMES)}")
    return _LETTERS[scheme]


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
