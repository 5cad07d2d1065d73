"""CoNLL files as they are published: comments, columns, CoNLL-U, tabs and spaces; lines that are not words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bert_fast.tasks.io.columns import choose_columns
from bert_fast.tasks.io.sources import read_table
from bert_fast.tasks.io.table import Table
from bert_fast.tasks.token_classification import TokenClassification

CONLL_2003 = """-DOCSTART- -X- -X- O

EU NNP B-NP B-ORG
rejects VBZ B-VP O
German JJ B-NP B-MISC

Peter NNP B-NP B-PER
Blackburn NNP I-NP I-PER
"""
CONLLU = """# sent_id = 1
# text = Vamos al mar
1-2	Vámonos	_	_	_	_	_	_	_	_
1	Vamos	ir	VERB	V	Mood=Imp	0	root	_	_
2	nos	nosotros	PRON	P	_	1	obj	_	_
2.1	algo	algo	PRON	_	_	_	_	1:obj	_
3-4	al	_	_	_	_	_	_	_	_
3	a	a	ADP	S	_	5	case	_	_
4	el	el	DET	D	_	5	det	_	SpaceAfter=No
5	#	#	SYM	N	_	1	obl	_	_

# sent_id = 2
1	Sí	sí	INTJ	I	_	0	root	_	_
"""
GERMEVAL = """#	http://de.wikipedia.org/wiki/Manfred_Korfmann [2009-10-17]
1	Aufgrund	O	O
2	seiner	O	O
3	EU	B-ORG	B-LOC

#	http://de.wikipedia.org/wiki/Zweites [2009-10-17]
1	Berlin	B-LOC	O
"""
MULTICONER = """# id 5239d808-f300-46ea	domain=en

hi _ _ O
paris _ _ B-LOC
"""
WNUT = "@paulwalk\tO\n#\tO\n#ESB\tB-LOC\n\n# \tO\nit\tO\n"
TWO = "2 lines of comments"
MSRA = "中 B-NS\n国 E-NS\n的 O\n李 S-NR\n"


def table_of(tmp_path: Path, content: str, name: str = "a.conll") -> Table:
    (tmp_path / name).write_text(content, encoding="utf-8")
    return read_table(tmp_path / name)


def test_conll_2003(tmp_path: Path) -> None:
    table = table_of(tmp_path, CONLL_2003)
    assert table.columns == {
        "tokens": [["EU", "rejects", "German"], ["Peter", "Blackburn"]],
        "column2": [["NNP", "VBZ", "JJ"], ["NNP", "NNP"]],
        "column3": [["B-NP", "B-VP", "B-NP"], ["B-NP", "I-NP"]],
        "tags": [["B-ORG", "O", "B-MISC"], ["B-PER", "I-PER"]],
    }
    assert table.numbers == [3, 7]
    assert choose_columns(table, TokenClassification.roles) == {"tokens": "tokens", "tags": "tags"}


@pytest.mark.parametrize("name", ["a.conllu", "a.conll"])
def test_conll_u(name: str, tmp_path: Path) -> None:
    table = table_of(tmp_path, CONLLU, name)
    assert table["tokens"] == [["Vamos", "nos", "a", "el", "#"], ["Sí"]]
    assert table["upos"] == [["VERB", "PRON", "ADP", "DET", "SYM"], ["INTJ"]]
    assert table["misc"][0] == ["_", "_", "_", "SpaceAfter=No", "_"]
    assert table.numbers == [4, 13]
    assert table.notes == (
        "3 lines of comments", "CoNLL-U", "3 lines of multiword tokens or empty nodes skipped",
    )  # fmt: skip
    assert choose_columns(table, TokenClassification.roles) == {"tokens": "tokens", "tags": "upos"}
    xpos = choose_columns(table, TokenClassification.roles, {"tags": "xpos"})
    assert table[xpos["tags"]][1] == ["I"]


@pytest.mark.parametrize(
    ("content", "tokens", "tags", "notes"),
    [
        (GERMEVAL, [["Aufgrund", "seiner", "EU"], ["Berlin"]], [["O", "O", "B-LOC"], ["O"]], (TWO,)),
        (MULTICONER, [["hi", "paris"]], [["O", "B-LOC"]], ("1 lines of comments",)),
        (WNUT, [["@paulwalk", "#", "#ESB"], ["#", "it"]], [["O", "O", "B-LOC"], ["O", "O"]], ()),
        (MSRA, [["中", "国", "的", "李"]], [["B-NS", "E-NS", "O", "S-NR"]], ()),
        ("# text\na O\n# O\n\n# more text here\nb O\n", [["a", "#"], ["b"]], [["O", "O"], ["O"]], (TWO,)),
        ("a   O  \n\tb \t O\t\n  \nc O", [["a", "b"], ["c"]], [["O", "O"], ["O"]], ()),
        ("New York\tB-LOC\nis\tO\n", [["New York", "is"]], [["B-LOC", "O"]], ()),
        ("a\u2028b O\nc\u00a0d O\n\u3000e O\r\n", [["a\u2028b", "c\u00a0d", "\u3000e"]], [["O", "O", "O"]], ()),
        ("1 a B-X\n2 b O\n\n1 c O\n", [["a", "b"], ["c"]], [["B-X", "O"], ["O"]], ()),
        ("1990 CD O\n1 CD O\n", [["1990", "1"]], [["O", "O"]], ()),
        ("9" * 5000 + " CD O\n", [["9" * 5000]], [["O"]], ()),
        ("", [], [], ()),
    ],
    ids=["GermEval", "MultiCoNER", "WNUT", "MSRA", "#", " ", "tabs", "Unicode", "counted", "numbers", "digits", ""],
)  # fmt: skip
def test_other_files(content: str, tokens: Any, tags: Any, notes: Any, tmp_path: Path) -> None:
    table = table_of(tmp_path, content, "a.bio")
    assert (table["tokens"], table["tags"], table.notes) == (tokens, tags, notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("EU NNP B-ORG\nrejects VBZ\ncall NN O\n", r"line 2: 'rejects VBZ' has 2 columns; expected 3 as on most lines"),
        ("EU\tB-ORG\nrejects\t\ncall\tO\n", "line 2: 'rejects'; expected a token and its tag"),
        ("EU\tB-ORG\nNew York\ncall\tO\n", "line 2: 'New York'; expected a token and its tag"),
        ("EU\tB-ORG\n\tO\ncall\tO\n", r"line 2: '\\tO'; expected a token and its tag"),
        ("a O\nb c d O\ne O\n", "line 2: .* has 4 columns; expected 2"),
        ("#begin document (bc/cctv/00); part 000\nbc/cctv 0 0 In IN * - O\n", "line 1: the coreference format"),
        ("1\ta\tO\n2\tb\n3\tc\tO\n", r"line 2: .* has 2 tab-separated columns; expected 3"),
    ],
    ids=["missing column", "missing tag", "no tab", "missing token", "more columns", "CoNLL-2012", "counted"],
)
def test_lines_that_are_no_words_are_named(content: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(tmp_path, content)
