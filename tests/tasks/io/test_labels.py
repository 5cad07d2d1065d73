"""Values of label columns: equal labels of several types, their order, lists, and marks of rows without a label."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from bert_fast.tasks.io.labels import (
    Labels,
    drop_unlabelled,
    is_missing,
    label_name,
    label_order,
    labels_that_look_missing,
    list_from_text,
)
from bert_fast.tasks.io.table import Table

ONES = [
    1,
    1.0,
    "1",
    " 1.0 ",
    "1.00",
    True,
    "True",
    "TRUE",
    np.int64(1),
    np.float32(1),
    np.bool_(True),
    Decimal("1.0"),
    b"1",
]


@pytest.mark.parametrize("one", ONES, ids=repr)
def test_equal_labels_of_all_types_are_one(one: Any) -> None:
    labels = Labels.fit([0, one, *ONES, "0.0", False])
    assert labels.names == ["0", "1"]
    assert labels.index(one) == 1
    assert Labels(["0", "1"]).index(one) == 1, "as restored"
    assert Labels.fit(["no", one, "yes"]).index(one) == Labels.fit(["no", one, "yes"]).index(1)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ([True, False, True], ["False", "True"]),
        (["true", "false"], ["false", "true"]),
        (["TRUE", "FALSE"], ["FALSE", "TRUE"]),
        (["true", "false", "half-true", "pants-fire"], ["false", "half-true", "pants-fire", "true"]),
        ([True, False, "unknown", "2"], ["2", "False", "True", "unknown"]),
        ([10, 9, "2", 1.5, "-3", "1e1x", "x"], ["-3", "1.5", "2", "9", "10", "1e1x", "x"]),
        (["01", "1", "0.5", "0.50"], ["0.5", "0.50", "01", "1"]),
        (["A ", " A", "B"], ["A", "B"]),
        (["--1", "+2", "1_000", "٣"], ["+2", "--1", "1_000", "٣"]),
        ([0.1, 0.25], ["0.1", "0.25"]),
        ([2**70, 1e22], ["1180591620717411303424", "10000000000000000000000"]),
    ],
    ids=str,
)
def test_names_and_their_order(values: list[Any], names: list[str]) -> None:
    assert Labels.fit(values).names == names
    for value in values:
        assert Labels(names).index(value) is not None


def test_numbers_come_first_by_value() -> None:
    assert label_order(["b", "10", "9", "-1", "2.5", "a", "1e3"]) == ["-1", "2.5", "9", "10", "1e3", "a", "b"]
    assert label_name(7.0) == "7"
    assert is_missing(Decimal("nan"))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('["a", "b"]', ["a", "b"]),
        ("['a', 'b']", ["a", "b"]),
        ("['it\\'s', \"b, c\"]", ["it's", "b, c"]),
        ("['a' 'b c'\n 'd']", ["a", "b c", "d"]),
        ("[a, b c]", ["a", "b c"]),
        ("[0, 1, 1]", [0, 1, 1]),
        ("[0 1 1]", ["0", "1", "1"]),
        ("[]", []),
        ("[ ]", []),
        ("('a', 'b')", ["a", "b"]),
        ("{'b', 'a'}", ["a", "b"]),
        ("{2, 1}", [1, 2]),
        ("['a', None]", ["a", None]),
        ("(a) or (b)", None),
        ("(sic)", None),
        ("{a, b}", None),
        ("{'a': 1, 'b': 0}", None),
        ("a, b", None),
        ("[a] said [b]", None),
        ("[a", None),
        ("['a', ['b']]", None),
        ("[" * 100_000 + "]" * 100_000, None),
        ("[__import__('os')]", ["__import__('os')"]),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_lists_that_are_written_as_text(text: str, values: list[Any] | None) -> None:
    assert list_from_text(text) == values


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ({"a": 5, "-": 2}, "'-' (2 rows)"),
        ({"0": 5, "1": 5, "-1": 3}, "'-1' (3 rows)"),
        ({"0": 5, "1": 5, "2": 4, "-1": 3}, "'-1' (3 rows)"),
        ({"-1": 3, "1": 4}, ""),
        ({"-2": 1, "-1": 3, "0": 1, "1": 4}, ""),
        ({"nan": 1, "a": 2, "N/A": 3, "None": 1}, "'nan' (1 rows), 'N/A' (3 rows), 'None' (1 rows)"),
        ({"a": 1, "b": 2, "nanny": 3, "no": 1}, ""),
    ],
    ids=str,
)
def test_labels_that_look_as_if_a_row_had_none(counts: dict[str, int], found: str) -> None:
    message = labels_that_look_missing(counts)
    assert (found in message and "set no_label to [" in message) if found else message == ""


def test_rows_without_a_label_are_dropped_and_counted() -> None:
    values = ["a", None, "-", float("nan"), " ", "-1.0", -1, "b", "nan"]
    table = Table({"label": values}, "my.csv")
    assert drop_unlabelled(table, "label", None) == (table, "")
    dropped, message = drop_unlabelled(table, "label", ["-", -1])
    assert dropped["label"] == ["a", "b", "nan"]
    assert dropped.numbers == [1, 8, 9]
    assert message.startswith("my.csv: 6 of 9 rows have no label (")
    assert drop_unlabelled(dropped, "label", [])[1] == ""
