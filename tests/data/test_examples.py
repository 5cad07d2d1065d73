"""Training examples: contents, masking, packing, and that they are a function of (seed, epoch, index)."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch

from bert_fast.data import Example, PackedBatch, PretrainingData, PretrainingDataConfig, load_tokenizer
from bert_fast.data.vocab import token_kinds

SEQ_LEN, BUDGET = 48, 400


def open_data(folder: Path, **changes: object) -> PretrainingData:
    return PretrainingData(
        PretrainingDataConfig(**{"folder": str(folder), "seq_len": SEQ_LEN, "token_budget": BUDGET, **changes})
    )


@pytest.fixture(scope="module")
def data(prepared: Path) -> PretrainingData:
    return open_data(prepared)


@pytest.fixture(scope="module")
def examples(data: PretrainingData) -> list[Example]:
    """Three epochs."""
    return [data.example(epoch, i) for epoch in range(3) for i in range(data.num_examples(epoch))]


def fingerprint(batches: Iterable[PackedBatch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for value in vars(batch).values():
            digest.update(value.numpy().tobytes() if isinstance(value, torch.Tensor) else str(value).encode())
    return digest.hexdigest()


def original(data: PretrainingData, example: Example) -> np.ndarray:
    """The example's tokens before masking, from the shards; special tokens by name."""
    a, b = (
        data.store.gather(np.array([start]), np.array([length])).tolist()
        for start, length in ((example.a_start, example.a_length), (example.b_start, example.b_length))
    )
    cls, sep = 2, 3
    return np.array([cls, *a, sep, *([*b, sep] if b else [])])


def within_five_sigma(count: int, trials: int, probability: float) -> bool:
    # Five standard deviations of a binomial: exceeded with probability 6e-7, and the seed is fixed.
    return abs(count - trials * probability) <= 5 * math.sqrt(trials * probability * (1 - probability))


def test_examples_are_cls_a_sep_b_sep_with_segments_and_positions(data, examples):
    for example in examples:
        length = example.a_length + example.b_length + 3
        expected = original(data, example)
        unmasked = np.where(example.labels == -100, example.input_ids, example.labels)
        np.testing.assert_array_equal(unmasked, expected)
        np.testing.assert_array_equal(example.position_ids, np.arange(length))
        np.testing.assert_array_equal(example.token_type_ids, np.arange(length) >= example.a_length + 2)
        assert example.a_length >= 1
        assert example.b_length >= 1
        assert length <= SEQ_LEN


def test_special_tokens_are_never_masked(examples):
    for example in examples:
        special = [0, example.a_length + 1, example.input_ids.size - 1]
        assert (example.labels[special] == -100).all()
        assert not np.isin(example.labels, range(5)).any()


def budget_of(tokens: int) -> int:
    return max(1, math.ceil(0.15 * tokens - 0.5))  # 0.15 in units of 2^-32 is below 0.15, so halves round down


def words_of(tokens: np.ndarray, kinds: np.ndarray, a_length: int) -> list[list[int]]:
    words: list[list[int]] = []
    for i, token in enumerate(tokens):
        if kinds[token] == 2:
            continue
        if kinds[token] == 1 and words and words[-1][-1] == i - 1 and i != a_length + 2:
            words[-1].append(i)
        else:
            words.append([i])
    return words


def test_whole_words_are_masked_together_up_to_15_percent(prepared, data, examples):
    kinds = token_kinds(load_tokenizer(prepared))
    partly_filled = pieces = 0
    for example in examples:
        words = words_of(original(data, example), kinds, example.a_length)
        chosen = [[example.labels[i] != -100 for i in word] for word in words]
        assert all(all(word) or not any(word) for word in chosen)
        pieces += sum(len(word) > 1 and word[0] for word in chosen)
        masked = sum(map(sum, chosen))
        budget = budget_of(sum(map(len, words)))
        shortest = min(map(len, words))
        if masked > budget:
            assert budget < shortest == masked, "over the budget only if no word fits, and then by one shortest word"
        elif masked < budget:
            left = [len(word) for word, taken in zip(words, chosen, strict=True) if not taken[0]]
            assert not left or min(left) > budget - masked, "a word that fits is not masked"
            partly_filled += 1
    assert pieces > 100, "the corpus has too few words of several pieces"
    assert partly_filled < len(examples) / 4


def test_single_tokens_are_masked_to_exactly_15_percent(prepared):
    data = open_data(prepared, whole_words=False)
    for i in range(data.num_examples()):
        example = data.example(0, i)
        text = np.isin(original(data, example), range(5), invert=True).sum()
        assert (example.labels != -100).sum() == budget_of(int(text))


def test_80_10_10(examples):
    labels = np.concatenate([example.labels for example in examples])
    inputs = np.concatenate([example.input_ids for example in examples])
    inputs, labels = inputs[labels != -100], labels[labels != -100]
    vocab, special = 400, 5
    masked, kept = (inputs == 4).sum(), (inputs == labels).sum()
    changed = inputs[(inputs != 4) & (inputs != labels)]
    assert labels.size > 5000
    assert within_five_sigma(masked, labels.size, 0.8)
    # A random token equals the original with probability 1 / (V - 5).
    assert within_five_sigma(kept, labels.size, 0.1 + 0.1 / (vocab - special))
    assert changed.min() >= special
    # Uniform over the vocabulary: a quarter in each quarter of it.
    for quarter in range(4):
        low, high = special + quarter * 395 / 4, special + (quarter + 1) * 395 / 4
        assert within_five_sigma(((changed >= low) & (changed < high)).sum(), changed.size, 0.25 + 1 / 395)


def test_every_token_is_masked_about_as_often(data, prepared):
    """Over many epochs each position of a document is predicted."""
    data = open_data(prepared, split="heldout", mask_prob=0.3)
    predicted = np.zeros(data.tokens, dtype=np.int64)
    for epoch in range(40):
        for i in range(data.num_examples(epoch)):
            example = data.example(epoch, i)
            chosen = example.labels != -100
            predicted[example.a_start : example.a_start + example.a_length] += chosen[1 : 1 + example.a_length]
    # A token is in an A in about half of the epochs and predicted in 30 % of these: 6 times of 40, never in 0.2 %.
    assert (predicted == 0).mean() < 0.05


def test_next_sentences_are_half_and_half_and_random_ones_are_from_another_document(examples):
    random = [example for example in examples if example.next_sentence_label == 1]
    assert {example.next_sentence_label for example in examples} == {0, 1}
    assert within_five_sigma(len(random), len(examples), 0.5)
    for example in examples:
        if example.next_sentence_label == 1:
            assert example.b_document != example.document
        else:
            assert example.b_document == example.document
            assert example.b_start == example.a_start + example.a_length


def test_random_texts_come_from_everywhere(data, examples):
    sources = {example.b_document for example in examples if example.next_sentence_label == 1}
    assert len(sources) > 0.9 * data.documents


def test_ranges_are_in_one_document(data, examples):
    ends = data.store.sentence_ends[data.store.document_sentences[1:] - 1]
    starts = np.concatenate([[0], ends[:-1]])
    for example in examples:
        for document, start, length in (
            (example.document, example.a_start, example.a_length),
            (example.b_document, example.b_start, example.b_length),
        ):
            assert starts[document] <= start
            assert start + length <= ends[document]


@pytest.mark.parametrize("short_seq_prob", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("seq_len", [5, 9, 48, 512])
def test_every_token_of_every_document_is_used(prepared, seq_len, short_seq_prob):
    data = open_data(prepared, seq_len=seq_len, token_budget=1024, short_seq_prob=short_seq_prob)
    plan = data.plan(0)
    used = np.zeros(data.tokens, dtype=np.int64)
    for start, length, true_next, b_length in zip(
        plan.a_start, plan.a_length, plan.label == 0, plan.b_length, strict=True
    ):
        used[start : start + length + (b_length if true_next else 0)] += 1
    assert used.min() >= 1
    # Only a single remaining sentence is paired with the sentence before it, which is used again.
    assert used.mean() < 1.4
    assert plan.lengths.max() <= seq_len


def test_a_split_between_a_and_b_is_between_sentences_or_words(prepared, data, examples):
    kinds = token_kinds(load_tokenizer(prepared))
    ends = set(data.store.sentence_ends.tolist())
    counts = np.diff(data.store.document_sentences)
    at_sentence = 0
    for example in examples:
        split = example.a_start + example.a_length
        if split in ends:
            at_sentence += 1
        elif example.a_length > 0 and split < data.tokens:
            token = int(data.store.gather(np.array([split]), np.array([1]))[0])
            assert kinds[token] != 1, "a cut inside a word"
    # The others are cut in sentences of more than 22 tokens, half of a pair; about a seventh of them are.
    assert at_sentence > 0.5 * len(examples)
    assert (counts == 1).any(), "the corpus has no document of one sentence"


def test_short_seq_prob_shortens_the_examples(prepared):
    means = [
        open_data(prepared, short_seq_prob=probability, seq_len=96).plan(0).lengths.mean()
        for probability in (0, 0.5, 1)
    ]
    assert means[0] > means[1] > means[2]


def test_a_text_without_pairs_covers_every_token_once(prepared):
    data = open_data(prepared, next_sentence=False)
    plan = data.plan(0)
    used = np.zeros(data.tokens, dtype=np.int64)
    for start, length in zip(plan.a_start, plan.a_length, strict=True):
        used[start : start + length] += 1
    np.testing.assert_array_equal(used, 1)
    example, batch = data.example(0, 0), data.batch(0, 0)
    np.testing.assert_array_equal(
        np.where(example.labels == -100, example.input_ids, example.labels), original(data, example)
    )
    assert (batch.token_type_ids == 0).all()
    assert (batch.next_sentence_label == -100).all()
    assert plan.lengths.max() <= SEQ_LEN


def test_batches_are_the_examples_in_order_within_the_budget(data):
    for epoch in range(2):
        i = 0
        for batch in data.batches(epoch):
            assert batch.num_tokens <= BUDGET
            assert batch.cu_seqlens[0] == 0
            assert batch.cu_seqlens[-1] == batch.num_tokens
            assert batch.max_seqlen == batch.cu_seqlens.diff().max()
            for row, (first, last) in enumerate(zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True)):
                example = data.example(epoch, i)
                for name in ("input_ids", "token_type_ids", "position_ids", "labels"):
                    np.testing.assert_array_equal(getattr(batch, name)[first:last].numpy(), getattr(example, name))
                assert batch.next_sentence_label[row] == example.next_sentence_label
                i += 1
        assert i == data.num_examples(epoch)


def test_batch_dtypes_and_move(data):
    batch = data.batch(0, 0)
    for name in ("input_ids", "token_type_ids", "position_ids", "labels", "next_sentence_label"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.num_sequences == batch.cu_seqlens.numel() - 1
    moved = batch.to("meta")
    assert all(value.device.type == "meta" for value in vars(moved).values() if isinstance(value, torch.Tensor))
    assert moved.max_seqlen == batch.max_seqlen


def test_a_batch_does_not_depend_on_earlier_requests(prepared, data):
    expected = [fingerprint([data.batch(epoch, i)]) for epoch in range(3) for i in range(data.num_batches(epoch))]
    again = open_data(prepared)
    indices = [(epoch, i) for epoch in range(3) for i in range(again.num_batches(epoch))]
    fingerprints = {}
    for epoch, i in sorted(indices, key=lambda pair: hashlib.sha256(str(pair).encode()).digest()):
        fingerprints[epoch, i] = fingerprint([again.batch(epoch, i)])
    assert [fingerprints[pair] for pair in indices] == expected


def test_another_process_and_numpy_give_the_same_batches(prepared, data):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_examples import fingerprint, open_data
from pathlib import Path
data = open_data(Path({str(prepared)!r}), host="numpy")
print(fingerprint(list(data.batches(1)) + list(data.batches(0))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == fingerprint([*data.batches(1), *data.batches(0)])


def test_epochs_and_seeds_differ(prepared, data):
    prints = {
        fingerprint(data.batches(0)),
        fingerprint(data.batches(1)),
        fingerprint(open_data(prepared, seed=1).batches(0)),
    }
    assert len(prints) == 3
    orders = [tuple(data.plan(epoch).document.tolist()) for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert orders[0] != tuple(sorted(orders[0])), "examples are not shuffled"


def test_large_and_negative_seeds_are_accepted(prepared):
    prints = {fingerprint(open_data(prepared, seed=seed).batches(0)) for seed in (0, -1, 2**40, 2**63)}
    assert len(prints) == 4


def test_held_out_documents_are_not_trained_on(prepared):
    texts = {}
    for split in ("train", "heldout"):
        store = open_data(prepared, split=split).store
        ends = store.sentence_ends[store.document_sentences[1:] - 1]
        starts = np.concatenate([[0], ends[:-1]])
        texts[split] = {
            store.gather(np.array([i]), np.array([j - i])).tobytes() for i, j in zip(starts, ends, strict=True)
        }
    assert len(texts["heldout"]) == 7
    assert not texts["train"] & texts["heldout"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_len": 4}, "seq_len is 4; expected 5 or more"),
        ({"token_budget": 47}, "token_budget is 47; expected at least seq_len, 48: an example must fit"),
        ({"short_seq_prob": 1.5}, "short_seq_prob is 1.5; expected 0 to 1"),
        ({"mask_prob": 0.0}, "mask_prob is 0.0; expected more than 0 and at most 1"),
        ({"max_span": 0}, "max_span is 0 and span_p 0.2; expected 1 to 1000 words"),
        ({"span_p": 1.0}, "max_span is 1 and span_p 1.0; expected 1 to 1000 words, and more than 0 and less than 1"),
        ({"mask_token_prob": 0.8, "random_token_prob": 0.3}, r"mask_token_prob \+ random_token_prob is 1.1"),
        ({"split": "test"}, "has no split 'test'; it has train, heldout"),
        ({"host": "gpu"}, "the host implementation is 'gpu'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_an_invalid_configuration_is_refused(prepared, changes, message):
    with pytest.raises(ValueError, match=message):
        open_data(prepared, **changes)


def test_an_index_out_of_range_is_refused(data):
    with pytest.raises(IndexError, match=f"expected 0 to {data.num_batches(0) - 1}"):
        data.batch(0, data.num_batches(0))
    with pytest.raises(IndexError, match=f"expected 0 to {data.num_examples(0) - 1}"):
        data.example(0, -1)


def test_selected_examples_are_those_of_the_epoch_in_any_order_and_number(data):
    batch = data.select(1, np.array([7, 2, 9]))
    for place, index in enumerate((7, 2, 9)):
        rows = slice(int(batch.cu_seqlens[place]), int(batch.cu_seqlens[place + 1]))
        example = data.example(1, index)
        assert batch.input_ids[rows].tolist() == example.input_ids.tolist()
        assert batch.labels[rows].tolist() == example.labels.tolist()
        assert int(batch.next_sentence_label[place]) == example.next_sentence_label
    empty = data.select(1, np.array([], dtype=np.int64))
    assert (empty.num_tokens, empty.num_sequences, empty.cu_seqlens.tolist()) == (0, 0, [0])


def test_joined_batches_are_one_batch_of_their_examples(data):
    none = np.array([], dtype=np.int64)
    joined = PackedBatch.joined([data.select(0, np.array(rows, dtype=np.int64)) for rows in ([3, 4], none, [5, 6])])
    selected = data.select(0, np.arange(3, 7))
    assert joined.max_seqlen == selected.max_seqlen
    for name in ("input_ids", "token_type_ids", "position_ids", "cu_seqlens", "labels", "next_sentence_label"):
        value, expected = getattr(joined, name), getattr(selected, name)
        assert value.dtype == expected.dtype
        assert torch.equal(value, expected), name


def test_a_padded_batch_has_the_same_examples_in_a_fixed_shape(data):
    batch = data.batch(0, 1).with_label_rows()
    padded = batch.padded(BUDGET + 70, 40, 90, SEQ_LEN)
    n, examples, labels = batch.num_tokens, batch.num_sequences, len(batch.label_rows)
    assert (padded.num_tokens, padded.num_sequences, len(padded.label_rows)) == (BUDGET + 70, 40, 90)
    for name in ("input_ids", "token_type_ids", "position_ids", "labels"):
        assert torch.equal(getattr(padded, name)[:n], getattr(batch, name))
    assert torch.equal(padded.cu_seqlens[: examples + 1], batch.cu_seqlens)
    assert padded.cu_seqlens.dtype == torch.int32
    lengths = padded.cu_seqlens.diff()[examples:].tolist()
    assert sum(lengths) == BUDGET + 70 - n
    assert lengths[-1] == 0
    assert max(lengths) <= SEQ_LEN
    assert padded.position_ids.max() < SEQ_LEN
    assert set(padded.labels[n:].tolist()) == set(padded.next_sentence_label[examples:].tolist()) == {-100}
    assert padded.label_rows[labels:].tolist() == [0] * (90 - labels)
    twice = batch.padded(BUDGET, 3, 5, SEQ_LEN)
    assert (twice.num_sequences % 3, len(twice.label_rows) % 5) == (0, 0)
    with pytest.raises(ValueError, match=f"the batch has {n} tokens in sequences of up to"):
        batch.padded(n - 1, 40, 90, SEQ_LEN)
