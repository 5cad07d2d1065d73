"""Next-sentence prediction where documents, passages and sentences repeat."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from bert_fast.data import PrepareConfig, PretrainingData, PretrainingDataConfig, prepare
from bert_fast.data.examples import host
from bert_fast.data.host_numpy import epoch_key


def repeated_corpus(folder, documents: list[list[str]]) -> str:
    (folder / "a.txt").write_text("\n\n".join("\n".join(lines) for lines in documents), encoding="utf-8")
    settings = {"vocab_size": 60, "heldout_fraction": 0.0, "min_characters": 1, "progress": False}
    prepare(PrepareConfig(str(folder / "data"), [str(folder / "a.txt")], **settings))
    return str(folder / "data")


REPEATED = {
    # One document in most places, and a few others.
    "copies": [*[["a b c.", "d e f.", "g h a.", "b d f."]] * 20, ["h g f.", "e d c."], ["a a a."]],
    # Different documents that share passages, and single sentences that others have as their second one.
    "passages": [[f"{x} {y}.", "c d e.", "f g h."] for x in "abcdefgh" for y in "abc"] + [["c d e."], ["f g h."]] * 12,
    # A sentence longer than half of an example is cut in one document alone.
    "cut": [["a b.", "c d e f g h a b c d."], ["c d e f g h a b c d."], ["h h.", "g g g."]] * 8,
}


@pytest.mark.parametrize("impl", ["numpy", "auto"])
@pytest.mark.parametrize("documents", REPEATED.values(), ids=REPEATED)
def test_a_random_next_text_is_never_the_true_one_where_documents_repeat(tmp_path, documents, impl):
    folder = repeated_corpus(tmp_path, documents)
    data = PretrainingData(PretrainingDataConfig(folder, seq_len=24, token_budget=64, host=impl))
    store = data.store

    def text(start: int, length: int) -> list[int]:
        return store.gather(np.array([start]), np.array([length])).tolist()

    bounds = np.concatenate([[0], store.sentence_ends])[store.document_sentences]
    whole = [tuple(text(first, last - first)) for first, last in pairwise(bounds.tolist())]
    random = 0
    for epoch in range(4):
        plan = data.plan(epoch)
        for i in np.flatnonzero(plan.label == 1).tolist():
            document, other = int(plan.document[i]), int(plan.b_document[i])
            assert whole[document] != whole[other], "B is from a copy of the document of A"
            after = int(plan.a_start[i] + plan.a_length[i])
            length = min(int(bounds[document + 1]) - after, int(plan.b_length[i]))
            if length:
                assert text(after, length) != text(int(plan.b_start[i]), length), "B is the true next text"
            random += 1
    assert random > 40


def test_where_every_other_text_is_the_true_next_one_b_is_the_true_next_one(tmp_path):
    folder = repeated_corpus(tmp_path, [["a b c.", "d e f."], *[["d e f.", "d e f."]] * 9])
    data = PretrainingData(PretrainingDataConfig(folder, seq_len=24, token_budget=64))
    labels = np.concatenate([(plan := data.plan(epoch)).label[plan.document == 0] for epoch in range(40)])
    assert (labels == 0).all()


def test_documents_of_one_text_are_refused_for_pairs(tmp_path):
    folder = repeated_corpus(tmp_path, [["a b c.", "d e f."]] * 9)
    with pytest.raises(ValueError, match=r"train: its 9 documents have equal texts; expected 2 different ones"):
        PretrainingData(PretrainingDataConfig(folder, seq_len=24, token_budget=64))
    PretrainingData(PretrainingDataConfig(folder, seq_len=24, token_budget=64, next_sentence=False))


@pytest.mark.parametrize("impl", ["numpy", "cpp"])
def test_a_plan_needs_two_texts(impl):
    units = (np.array([3, 5, 9]), np.array([0, 2, 3]), np.arange(3, dtype=np.uint64), np.full(2, 7, dtype=np.uint64))
    with pytest.raises(ValueError, match="the 2 documents have equal texts; sentence pairs need 2 different ones"):
        host(impl).plan(*units, epoch_key(0, 0), 10, 0, True)
