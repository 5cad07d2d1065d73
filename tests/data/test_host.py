"""The C++ and the numpy implementation of planning, packing and masking give the same bits and errors."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bert_fast.data import host_numpy
from bert_fast.data.examples import host

try:
    NATIVE = [host("cpp")]
except ImportError:  # not built: numpy only
    NATIVE = []
BOTH = ["numpy", *(["cpp"] if NATIVE else [])]
native = pytest.mark.parametrize("cpp", NATIVE, ids=["cpp"] * len(NATIVE))


def corpus(generator: np.random.Generator, limit: int, documents: int) -> tuple[np.ndarray, np.ndarray]:
    counts = generator.integers(1, 9, documents)
    unit_ends = np.cumsum(generator.integers(1, limit + 1, counts.sum()))
    return unit_ends, np.concatenate([[0], np.cumsum(counts)])


def masking(generator: np.random.Generator, vocab: int = 40, **changes: object) -> host_numpy.Masking:
    kinds = generator.choice([0, 0, 0, 1, 1, 2], vocab).astype(np.uint8)
    kinds[5] = 0
    values = {
        "kinds": kinds,
        "replacements": np.flatnonzero(kinds < 2).astype(np.int32),
        "cls_id": 2,
        "sep_id": 3,
        "mask_id": 4,
        "select_threshold": round(0.15 * 2**32),
        "mask_threshold": round(0.8 * 2**32),
        "random_threshold": round(0.9 * 2**32),
        "whole_words": True,
    }
    return host_numpy.Masking(**{**values, **changes})


def test_philox_is_the_published_generator():
    # The known answers of Random123 (kat_vectors, philox4x32-10).
    ones = 0xFFFFFFFF
    zero = host_numpy.philox(0, 0, 0, 0, np.zeros(2, dtype=np.uint32))
    full = host_numpy.philox(ones, ones, ones, ones, np.full(2, ones, dtype=np.uint32))
    pi = host_numpy.philox(
        0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, np.array([0xA4093822, 0x299F31D0], np.uint32)
    )
    assert [hex(word) for word in zero] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert [hex(word) for word in full] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]
    assert [hex(word) for word in pi] == ["0xd16cfe09", "0x94fdcceb", "0x5001e420", "0x24126ea1"]


@native
@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    max_tokens=st.integers(2, 90),
    documents=st.integers(2, 25),
    short_threshold=st.sampled_from([0, 1, round(0.1 * 2**32), 2**32]),
    pairs=st.booleans(),
    different=st.sampled_from([1, 2, 3, 1000]),
)
def test_plan_gives_the_same_bits(cpp, seed, max_tokens, documents, short_threshold, pairs, different):
    units = corpus(np.random.default_rng(seed), max_tokens // 2 if pairs else max_tokens, documents)
    generator = np.random.default_rng(seed + 1)
    texts = generator.integers(0, different, units[0].size).astype(np.uint64)
    documents_texts = generator.integers(0, different, documents).astype(np.uint64)
    documents_texts[0] = 99  # two documents differ
    arguments = (*units, texts, documents_texts, host_numpy.epoch_key(seed, 7), max_tokens, short_threshold, pairs)
    for column, expected in zip(cpp.plan(*arguments), host_numpy.plan(*arguments), strict=True):
        assert column.dtype == expected.dtype
        np.testing.assert_array_equal(column, expected)


@native
@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    examples=st.integers(0, 12),
    longest=st.integers(1, 70),
    first_index=st.integers(-(2**63), 2**63 - 13),
    select=st.sampled_from([1, round(0.15 * 2**32), 2**31, 2**32]),
    whole_words=st.booleans(),
    max_span=st.sampled_from([1, 2, 10]),
    marks=st.booleans(),
)
def test_build_batch_gives_the_same_bits(
    cpp, seed, examples, longest, first_index, select, whole_words, max_span, marks
):
    generator = np.random.default_rng(seed)
    spans = host_numpy.span_thresholds(max_span, 0.2)
    settings_ = masking(generator, select_threshold=select, whole_words=whole_words, span_thresholds=spans)
    a = generator.integers(1, longest + 1, examples).astype(np.int32)
    b = generator.integers(0, longest + 1, examples).astype(np.int32)
    tokens = generator.integers(0, settings_.kinds.size, a.sum() + b.sum()).astype(np.int32)
    if marks:
        tokens |= generator.integers(0, 2, tokens.size, dtype=np.int32) * host_numpy.CONTINUES
    indices = np.arange(first_index, first_index + examples, dtype=np.int64)
    arguments = (tokens, a, b, indices, host_numpy.epoch_key(seed, 0), settings_)
    *columns, max_seqlen = cpp.build_batch(*arguments)
    *expected_columns, expected_max_seqlen = host_numpy.build_batch(*arguments)
    assert max_seqlen == expected_max_seqlen
    for column, expected in zip(columns, expected_columns, strict=True):
        assert column.dtype == expected.dtype
        np.testing.assert_array_equal(column, expected)


@native
@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), spare=st.integers(0, 100))
def test_pack_gives_the_same_bits_and_fills_every_batch(cpp, lengths, spare):
    sizes = np.array(lengths, dtype=np.int32)
    budget = max(lengths, default=1) + spare
    starts = host_numpy.pack(sizes, budget)
    np.testing.assert_array_equal(cpp.pack(sizes, budget), starts)
    assert starts[0] == 0
    assert starts[-1] == len(lengths)
    assert (np.diff(starts) > 0).all()
    for first, last in pairwise(starts.tolist()):
        assert sizes[first:last].sum() <= budget
        if last < len(lengths):
            assert sizes[first : last + 1].sum() > budget, "another example fits the batch"


KEY = np.zeros(2, dtype=np.uint32)
ENDS, DOCUMENTS = np.array([3, 5, 9]), np.array([0, 2, 3])
TEXTS = np.arange(3, dtype=np.uint64)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ENDS.astype(np.int32), DOCUMENTS, KEY, 10, 0, True), "unit_ends has dtype int32; expected int64"),
        ((ENDS.reshape(1, 3), DOCUMENTS, KEY, 10, 0, True), "unit_ends has 2 dimensions"),
        ((np.arange(1, 10)[::3], DOCUMENTS, KEY, 10, 0, True), "unit_ends is not contiguous"),
        ((ENDS, DOCUMENTS, KEY[:1], 10, 0, True), "key has 1 elements; expected 2"),
        ((ENDS, DOCUMENTS, KEY, 1, 0, True), "max_tokens is 1; expected 2"),
        ((ENDS, DOCUMENTS, KEY, 10, 2**32 + 1, True), "short_threshold is 4294967297; expected 0 to 2"),
        ((ENDS, DOCUMENTS[[0, 2]], KEY, 10, 0, True), "has 1 documents; sentence pairs need at least 2"),
        ((ENDS, np.array([0, 2, 4]), KEY, 10, 0, True), "must start at 0 and end at the number of units, 3"),
        ((ENDS, np.array([0, 5, 3]), KEY, 10, 0, True), "document_units does not increase at element 2"),
        ((ENDS, DOCUMENTS, KEY, 6, 0, True), "unit_ends element 2 makes a unit of 4 tokens; expected 1 to 3"),
        ((np.array([3, 3, 9]), DOCUMENTS, KEY, 20, 0, True), "element 1 makes a unit of 0 tokens; expected 1 to 10"),
    ],
    ids=lambda value: value.replace(" ", "-")[:40] if isinstance(value, str) else "",
)
def test_plan_names_the_invalid_argument(impl, arguments, message):
    with pytest.raises(ValueError, match=message):
        host(impl).plan(*arguments[:2], TEXTS, TEXTS[: arguments[1].size - 1], *arguments[2:])


TOKENS, A, B, INDICES = (
    np.array([6, 7, 8, 9], dtype=np.int32),
    np.array([2, 1], dtype=np.int32),
    np.array([1, 0], dtype=np.int32),
    np.array([0, 1]),
)


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": TOKENS.astype(np.int64)}, "tokens has dtype int64; expected int32"),
        ({"tokens": TOKENS + 37}, "tokens element 0 is id 43; expected 0 to 39"),
        ({"tokens": -TOKENS}, "tokens element 0 is id -6; expected 0 to 39"),
        ({"tokens": TOKENS + 37 | host_numpy.CONTINUES}, "tokens element 0 is id 43; expected 0 to 39"),
        ({"tokens": TOKENS[:3].copy()}, "add up to 4; expected the 3 elements of tokens"),
        ({"a_lengths": np.array([3, 0], dtype=np.int32)}, r"example 1 has lengths \(0, 0\)"),
        ({"b_lengths": np.array([-1, 2], dtype=np.int32)}, r"example 0 has lengths \(2, -1\)"),
        ({"b_lengths": B[:1].copy()}, "b_lengths has 1 elements; expected 2"),
        ({"indices": INDICES[:1].copy()}, "indices has 1 elements; expected 2"),
        ({"key": KEY.astype(np.uint64)}, "key has dtype uint64; expected uint32"),
        ({"mask_id": 40}, "masking.mask_id is 40; expected 0 to 39"),
        ({"cls_id": -1}, "masking.cls_id is -1; expected 0 to 39"),
        ({"select_threshold": 0}, "masking.select_threshold is 0; expected 1 to"),
        ({"random_threshold": 5}, "masking.random_threshold is 5; expected 3435973837 to"),
        ({"replacements": np.array([40], dtype=np.int32)}, "masking.replacements has id 40; expected 0 to 39"),
        ({"replacements": np.array([], dtype=np.int32)}, "masking.replacements is empty"),
        ({"span_thresholds": np.array([9, 8])}, "masking.span_thresholds element 1 is 8; expected 0 to"),
        ({"span_thresholds": np.array([2**32 + 1])}, "masking.span_thresholds element 0 is 4294967297; expected"),
        ({"span_thresholds": np.array([1.5])}, "masking.span_thresholds has dtype float64; expected int64"),
        ({"kinds": np.zeros(40)}, "masking.kinds has dtype float64; expected uint8"),
    ],
    ids=lambda value: value.replace(" ", "-")[:40] if isinstance(value, str) else "",
)
def test_build_batch_names_the_invalid_argument(impl, changes, message):
    arguments = {"tokens": TOKENS, "a_lengths": A, "b_lengths": B, "indices": INDICES, "key": KEY}
    of_masking = {name: value for name, value in changes.items() if name not in arguments}
    arguments.update({name: value for name, value in changes.items() if name in arguments})
    with pytest.raises(ValueError, match=message):
        host(impl).build_batch(**arguments, masking=masking(np.random.default_rng(0), **of_masking))


@pytest.mark.parametrize("impl", BOTH)
@pytest.mark.parametrize("length", [0, 21], ids=["empty", "over-the-budget"])
def test_pack_refuses_an_example_that_does_not_fit(impl, length):
    with pytest.raises(ValueError, match=f"lengths element 1 is {length}; expected 1 to the token budget, 20"):
        host(impl).pack(np.array([20, length], dtype=np.int32), 20)


@native
def test_the_environment_and_the_argument_select_the_implementation(monkeypatch, cpp):
    assert host() is cpp
    monkeypatch.setenv("BERT_FAST_HOST", "numpy")
    assert host() is host_numpy
    assert host("cpp") is cpp
    monkeypatch.setenv("BERT_FAST_HOST", "fortran")
    with pytest.raises(ValueError, match="the host implementation is 'fortran'; expected one of auto, cpp, numpy"):
        host()


def test_without_the_extension_auto_is_numpy_and_cpp_is_refused_with_a_hint(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bert_fast._host", None)
    monkeypatch.delenv("BERT_FAST_HOST", raising=False)
    assert host() is host_numpy
    with pytest.raises(ImportError, match="not built: install with a C\\+\\+ compiler"):
        host("cpp")
