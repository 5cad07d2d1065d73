"""Whole words that `##` pieces don't show: segmented text and Chinese; and spans of words."""

from __future__ import annotations

import math
import random
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from bert_fast.data import (
    Example,
    PrepareConfig,
    PretrainingData,
    PretrainingDataConfig,
    prepare,
    save_tokenizer,
    train_vocab,
)
from bert_fast.data.host_numpy import CONTINUES, span_thresholds
from bert_fast.data.shards import read_manifest
from bert_fast.data.tokens import Encoder

CHARACTERS = "天地人日月山水火木金土石田禾竹米舟車馬鳥魚虫"


def chinese_documents(count: int = 60, seed: int = 0) -> list[list[list[str]]]:
    """Documents of sentences of words of 1 to 4 characters; the words are made up."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(CHARACTERS, k=generator.choice([1, 2, 2, 2, 3, 4]))) for _ in range(300)]
    return [
        [[*generator.choices(words, k=generator.randint(5, 20)), "。"] for _ in range(generator.randint(2, 8))]
        for _ in range(count)
    ]


def encoder(folder: Path, text: list[str], words: str, size: int = 200) -> Encoder:
    folder.mkdir(exist_ok=True)
    save_tokenizer(train_vocab(text, vocab_size=size), folder)
    return Encoder(folder / "tokenizer.json", words)


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("天地 人 日月山 。", [2, 1, 3, 1]),
        ("don't  stop", [3, 1]),
        ("A-B Été x", [3, 1, 1]),
        ("天", [1]),
    ],
    ids=["chinese", "apostrophe", "accents", "one-token"],
)
def test_marks_of_segmented_text(tmp_path, sentence, words):
    text = ["don't stop a-b ete x " + " ".join(CHARACTERS + "。")] * 5
    marked = encoder(tmp_path / "v", text, "spaces")
    plain = encoder(tmp_path / "v", text, "pieces")
    document = [" ".join(sentence.split())]
    [(tokens, ends)] = marked.encode([document])
    [(ids, plain_ends)] = plain.encode([document])
    np.testing.assert_array_equal(tokens & ~CONTINUES, ids)
    np.testing.assert_array_equal(ends, plain_ends)
    assert marked.unknown == 0
    starts = np.flatnonzero(tokens & CONTINUES == 0)
    assert np.diff(starts, append=tokens.size).tolist() == words


def test_marks_of_chinese_words_are_those_of_rjieba(tmp_path):
    import rjieba

    sentence = "我们在北京大学学习自然语言处理，明天去上海。"
    [(tokens, _)] = encoder(tmp_path / "v", [sentence] * 5, "rjieba").encode([[sentence]])
    starts = np.flatnonzero(tokens & CONTINUES == 0)
    words = rjieba.cut(sentence)
    assert "北京大学" in words
    assert np.diff(starts, append=tokens.size).tolist() == [len(word) for word in words]


def test_without_rjieba_prepare_fails_before_it_reads_the_corpus(text_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    with pytest.raises(ImportError, match="rjieba"):
        prepare(PrepareConfig(str(tmp_path / "data"), [str(text_file)], words="rjieba", progress=False))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def segmented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of made-up Chinese, a sentence a line, words between spaces."""
    folder = tmp_path_factory.mktemp("chinese")
    documents = ["\n".join(" ".join(words) for words in document) for document in chinese_documents()]
    (folder / "text.txt").write_text("\n\n".join(documents))
    config = PrepareConfig(str(folder / "data"), [str(folder / "text.txt")], words="spaces", vocab_size=60)
    config.progress = False
    prepare(config)
    return folder / "data"


def opened(folder: Path, **changes: object) -> PretrainingData:
    return PretrainingData(
        PretrainingDataConfig(**{"folder": str(folder), "seq_len": 64, "token_budget": 256, **changes})
    )


def words_of(data: PretrainingData, example: Example) -> list[list[int]]:
    """The positions of each word of an example, from the marks of the shards."""
    words: list[list[int]] = []
    for start, length, first in (
        (example.a_start, example.a_length, 1),
        (example.b_start, example.b_length, example.a_length + 2),
    ):
        tokens = data.store.gather(np.array([start]), np.array([length]))
        for i, token in enumerate(tokens.tolist()):
            if i and token & CONTINUES:
                words[-1].append(first + i)
            else:
                words.append([first + i])
    return words


def test_whole_words_of_several_characters_are_masked_together(segmented):
    assert read_manifest(segmented)["settings"]["words"] == "spaces"
    data = opened(segmented)
    long_words = 0
    for i in range(data.num_examples()):
        example = data.example(0, i)
        assert max(example.input_ids.max(), example.labels.max()) < data.vocab_size, "a mark is in an id"
        for word in words_of(data, example):
            chosen = example.labels[word] != -100
            assert chosen.all() or not chosen.any()
            long_words += bool(chosen.all() and len(word) > 1)
    assert long_words > 200
    alone = opened(segmented, whole_words=False)
    parted = sum(
        0 < (example.labels[word] != -100).sum() < len(word)
        for i in range(alone.num_examples())
        for example in [alone.example(0, i)]
        for word in words_of(alone, example)
    )
    assert parted > 200, "without whole_words single characters are masked"


def test_no_word_is_cut_between_two_examples(segmented):
    """Sentences of more than half an example are cut; at words."""
    data = opened(segmented, seq_len=16)
    plan = data.plan(0)
    tokens = data.store.gather(plan.a_start, np.ones_like(plan.a_start))
    assert (tokens & CONTINUES == 0).all()


def test_span_lengths_are_geometric_up_to_ten_words():
    thresholds = span_thresholds(10, 0.2)
    shares = np.diff(np.concatenate([[0], thresholds, [2**32]])) / 2**32
    expected = np.array([0.2 * 0.8**k for k in range(10)])
    # A threshold is a multiple of 2^-32 (2.3e-10), and a share the difference of two.
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=1e-9)
    # 3.797 is rounded to three decimals.
    assert (shares * np.arange(1, 11)).sum() == pytest.approx(3.797, abs=1e-3), "3.8 in the paper"
    assert span_thresholds(1, 0.2).size == 0


def test_spans_are_runs_of_words_of_the_lengths_that_were_drawn(segmented):
    data = opened(segmented, seq_len=512, token_budget=512, max_span=10, next_sentence=False)
    single = opened(segmented, seq_len=512, token_budget=512, next_sentence=False)
    runs: list[int] = []
    for epoch in range(20):
        for i in range(data.num_examples(epoch)):
            example = data.example(epoch, i)
            words = words_of(data, example)
            chosen = [bool((example.labels[word] != -100).all()) for word in words]
            assert all(taken or (example.labels[word] == -100).all() for taken, word in zip(chosen, words, strict=True))
            edges = np.flatnonzero(np.diff([False, *chosen, False]))
            runs += [int(end - start) for start, end in edges.reshape(-1, 2)]
            count = int((example.labels != -100).sum())
            assert count <= max(1, math.ceil(0.15 * (example.input_ids.size - 2)))
            expected = single.example(epoch, i)
            assert abs(count - int((expected.labels != -100).sum())) <= 4, "the budget is the same as without spans"
    # Longer than 3.8 if two spans meet, shorter if the budget ends one; without spans the mean is 1.18.
    assert len(runs) > 1000
    assert 2.5 < np.mean(runs) < 4.5
    assert max(runs) >= 10


def test_the_tokens_of_a_span_are_replaced_alike(segmented):
    data = opened(segmented, seq_len=512, token_budget=512, max_span=10, next_sentence=False)
    mixed, pairs = 0, 0
    for epoch in range(10):
        for i in range(data.num_examples(epoch)):
            example = data.example(epoch, i)
            chosen = np.flatnonzero(example.labels != -100)
            masked = example.input_ids == 4
            for left, right in pairwise(chosen.tolist()):
                if right == left + 1:
                    pairs += 1
                    mixed += masked[left] != masked[right]
    assert pairs > 1000
    # Neighbours differ only where two spans meet; if each token were replaced independently, 0.32 would.
    assert mixed < 0.1 * pairs
