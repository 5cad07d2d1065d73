"""Extracts prose from docstrings.

Sentences are split by rules written for docstrings, which are full of dots that end no sentence, so that the built-in
corpus does not depend on the installed packages. Other text is split by sentencex, see `bert_fast.data.cleaning`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

from bert_fast._text import split_lines

# A full stop after one of these ends no sentence.
_ABBREVIATION = re.compile(
    r"e\.g|i\.e|etc|cf|vs|al|fig|eqs?|sec|no|vol|pp|dr|mrs?|ms|prof|st|jr|sr|inc|ltd|approx|resp|dept"
)
_BOUNDARY = re.compile(r"""[.!?]["')\]]*(\s+)(?=["'(\[]*[A-Z0-9])""")


def split_prose(text: str) -> list[str]:
    """Split text after `.`, `!` or `?` where a capital, a digit or a quote follows, and normalise white space.

    A heuristic for English: abbreviations and single initials do not end a sentence.
    """
    text = " ".join(text.split())
    sentences, begin = [], 0
    for match in _BOUNDARY.finditer(text):
        last_word = text[begin : match.start()].rsplit(" ", 1)[-1].lstrip("([\"'")
        if text[match.start()] == "." and (
            _ABBREVIATION.fullmatch(last_word.lower()) or re.fullmatch("[A-Z]", last_word)
        ):
            continue
        sentences.append(text[begin : match.start(1)])
        begin = match.end(1)
    sentences.append(text[begin:])
    return [sentence for sentence in sentences if sentence]


_RULE = re.compile(r"[\s=\-~*^+#`'\"_|:.]+")
_DIRECTIVE = re.compile(r"\.\. *(?P<name>[\w:-]+?):: *(?P<rest>.*)")
_KEPT_DIRECTIVES = {"note", "warning", "tip", "important", "seealso", "caution", "attention", "hint"}
_SECTION = re.compile(r"[A-Z][a-z]+( [A-Z]?[a-z]+)?:?")
_FIELD = re.compile(r":(param|parameter|arg|return|returns|raises?|keyword|ivar|cvar|var)\b[^:]*:\s*")
_DROPPED_FIELD = re.compile(r":(type|rtype|vartype)\b.*")
_SIGNATURE = re.compile(r"[\w*.,` /()\[\]-]+ : \S.*|[\w.]+\(.*\)( ->.*)?:?|[\w*.,/` -]+\(.*\): *")
_LIST_ITEM = re.compile(r"([-*•]|\d+[.)]|\(\w\)|[*`\w]+ +\([^)]*\):|[*`\w.]+ *[-\u2013:](?= )) +")
_INLINE = [
    (re.compile(r":math:`[^`]*`"), "\\\\"),  # a backslash makes the sentence fail `is_prose`
    (re.compile(r"(?::[\w:]+:)?`{1,2}[~!]?([^`]*?)(?:\s*<[^`<>]*>)?`{1,2}_{0,2}"), r"\1"),
    (re.compile(r"(?<=[a-z])\(e?s\)"), "s"),
    (re.compile(r"(?<![\w*])\*{1,2}([^*\s][^*]*?)\*{1,2}(?![\w*])"), r"\1"),
    (re.compile(r"\s*\[[\w#]+\]_"), ""),
]
_CODE = re.compile(r"\\|::|>>>| = |==|\$|\{|http")
_NO_LETTER = re.compile(r"[^A-Za-zÀ-ÿ ]")
_WORD = re.compile(r"""["'(\[]*[A-Za-z][A-Za-z'\u2019-]*["')\].,;:!?]*""")


def docstring_sentences(text: str) -> list[str]:
    """The sentences of a docstring without doctests, code, tables, headings, signatures and markup."""
    sentences = []
    for paragraph in _paragraphs(inspect.cleandoc(text)):
        for pattern, replacement in _INLINE:
            paragraph = pattern.sub(replacement, paragraph)
        sentences += [sentence for sentence in split_prose(paragraph) if is_prose(sentence)]
    return sentences


def is_prose(sentence: str) -> bool:
    """Whether a sentence looks like English prose: at least four words, mostly letters, no code or formula."""
    words = sentence.split()
    return (
        4 <= len(words) <= 120
        and not _CODE.search(sentence)
        and len(_NO_LETTER.findall(sentence)) <= 0.15 * len(sentence)
        and sum(1 for word in words if _WORD.fullmatch(word)) >= 0.75 * len(words)
    )


def _paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a cleaned docstring; a change of indentation or a list item starts one."""
    lines: list[str] = []
    indent, skip_deeper, in_doctest = 0, -1, False
    for line in [*split_lines(text.expandtabs()), ""]:
        stripped = line.strip()
        depth = len(line) - len(line.lstrip())
        if not stripped:
            in_doctest = False
            yield from _joined(lines)
            if lines and lines[-1].endswith("::"):
                skip_deeper = indent
            lines = []
            continue
        if skip_deeper >= 0:
            if depth > skip_deeper:
                continue
            skip_deeper = -1
        if in_doctest or stripped.startswith((">>>", "$ ", "In [")):
            in_doctest = True
            continue
        if _RULE.fullmatch(stripped) or stripped.startswith(("|", "+-")):
            # An underline makes the line above it a heading.
            lines = lines[:-1] if len(stripped) > 2 and stripped[0] in "=-~*^#" else lines
            continue
        if (directive := _DIRECTIVE.match(stripped)) or stripped.startswith(".. "):
            yield from _joined(lines)
            kept = directive and directive["name"].lower() in _KEPT_DIRECTIVES
            lines = [directive["rest"]] if directive and kept and directive["rest"] else []
            indent, skip_deeper = depth, -1 if kept else depth
            continue
        field = _FIELD.match(stripped)
        if lines and (depth != indent or field or _DROPPED_FIELD.match(stripped) or _LIST_ITEM.match(stripped)):
            # The first line of a definition may stand alone: a signature, a term, the start of a list item.
            item = depth > indent and len(lines) == 1 and _LIST_ITEM.match(lines[0])
            if not item or _SIGNATURE.fullmatch(lines[0]):
                yield from _joined(lines)
                lines = []
        if not lines or depth != indent:
            indent = depth
        lines.append(stripped[field.end() :] if field else stripped)
    yield from _joined(lines)


def _joined(lines: list[str]) -> Iterator[str]:
    if not lines or (len(lines) == 1 and (_SECTION.fullmatch(lines[0]) or _SIGNATURE.fullmatch(lines[0]))):
        return
    if _DROPPED_FIELD.match(lines[0]):
        return
    text = _LIST_ITEM.sub("", lines[0], count=1) + "".join(" " + line for line in lines[1:])
    yield re.sub(r"\s*::$", ":", text).strip()
