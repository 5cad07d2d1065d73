"""The parsers and splits of the examples, on made-up rows."""

from __future__ import annotations

from examples import chinese_ner, sentiment


def test_sentiment_is_the_sign_of_the_rating_without_zeros() -> None:
    rows = sentiment.parse("1\t2.3\tA fine film.\n2\t0.0\tSo so.\n3\t-0.6\tToo\ttepid \n")
    assert rows == [{"text": "A fine film.", "label": "positive"}, {"text": "Too\ttepid", "label": "negative"}]


def test_sentiment_splits_partition_the_rows() -> None:
    rows = [{"text": str(number), "label": "positive"} for number in range(103)]
    splits = sentiment.split(rows)
    assert {name: len(split) for name, split in splits.items()} == {"train": 79, "dev": 4, "test": 20}
    assert sorted(int(row["text"]) for split in splits.values() for row in split) == list(range(103))


def test_characters_of_a_chinese_name_continue_it() -> None:
    (row,) = chinese_ner.parse("江/nr  泽民/nr  在/p  北京/ns  会见/v  中共中央/nt")
    assert row["tokens"] == list("江泽民在北京会见中共中央")
    assert row["tags"] == [
        *("B-PER", "I-PER", "I-PER"), "O", *("B-LOC", "I-LOC"), "O", "O", *("B-ORG", "I-ORG", "I-ORG", "I-ORG"),
    ]  # fmt: skip


def test_a_third_nr_starts_another_name() -> None:
    (row,) = chinese_ner.parse("江/nr  泽民/nr  李/nr  鹏/nr")
    assert row["tags"] == ["B-PER", "I-PER", "I-PER", "B-PER", "I-PER"]


def test_a_line_is_split_into_sentences_and_a_slash_is_a_word() -> None:
    rows = chinese_ner.parse("好/a  。/w  //w  很/d  好/a")
    assert ["".join(row["tokens"]) for row in rows] == ["好。", "/很好"]


def test_long_sentences_are_truncated() -> None:
    (row,) = chinese_ner.parse("很/d  " * 200)
    assert len(row["tokens"]) == len(row["tags"]) == chinese_ner.LONGEST


def test_chinese_splits_follow_the_order_of_the_corpus() -> None:
    rows = [{"tokens": [str(number)], "tags": ["O"]} for number in range(25)]
    splits = chinese_ner.split(rows)
    assert [row["tokens"][0] for name in ("train", "dev", "test") for row in splits[name]] == [
        str(number) for number in range(25)
    ]
    assert [len(splits[name]) for name in ("train", "dev", "test")] == [20, 2, 3]
