"""The benchmark of the input pipeline, on a small text."""

from __future__ import annotations

import pytest

from benchmarks.models import data_speed
from bert_fast.data import PretrainingData, PretrainingDataConfig
from bert_fast.data.host_numpy import CONTINUES


@pytest.mark.parametrize("kind", ["english", "chinese"])
def test_the_text_of_the_benchmark_has_words_of_several_tokens(tmp_path, kind):
    data_speed.make_folder(tmp_path, kind, 20_000)
    data = PretrainingData(PretrainingDataConfig(str(tmp_path), seq_len=128))
    assert data.tokens >= 20_000
    pieces = sum(int((batch.input_ids >= data_speed.VOCABULARY - data_speed.PIECES).sum()) for batch in data.batches(0))
    marks = sum(int((part & CONTINUES != 0).sum()) for part in data.store._parts)
    assert (pieces > 2000, marks > 2000) == (kind == "english", kind == "chinese")


def test_a_case_is_measured_by_cpu_time(tmp_path):
    data_speed.make_folder(tmp_path, "english", 20_000)
    row = data_speed.measure("case", tmp_path, {"seq_len": 128}, "numpy", 0.05)
    assert row.plan > 0
    assert 0 < row.wall <= 1.2 * row.batch, "the clock is not faster than one core"
