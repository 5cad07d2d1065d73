"""Sums that aggregate exactly, and the unigram baseline."""

from __future__ import annotations

import json
import math
from collections import namedtuple

import pytest
import torch

from bert_fast.pretrain.metrics import Totals, token_counts, unigram_loss

Batch = namedtuple("Batch", "labels")


def test_totals_weight_batches_by_their_counts() -> None:
    totals = Totals("cpu")
    right, wrong = torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]])
    totals.add(torch.tensor(2.0), torch.tensor(1), torch.tensor(10), right, torch.tensor([0]))
    labels = torch.tensor([0, 0, -100])
    totals.add(torch.tensor(5.0), torch.tensor(20), torch.tensor(30), torch.cat([wrong, right, right]), labels)
    summary = totals.summary()
    assert summary["mlm_loss"] == (2.0 * 10 + 5.0 * 30) / 40
    assert summary["mlm_accuracy"] == 21 / 40
    assert summary["nsp_accuracy"] == 2 / 3
    assert summary["nsp_loss"] == pytest.approx((18 + 2 * math.log1p(math.exp(-18))) / 3, rel=1e-5)
    assert summary["loss"] == summary["mlm_loss"] + summary["nsp_loss"]
    assert Totals("cpu", json.loads(json.dumps(totals.tolist()))).summary() == summary


def test_an_empty_total_is_nan_and_does_not_spread() -> None:
    totals = Totals("cpu")
    assert math.isnan(totals.summary()["loss"])
    totals.add(torch.tensor(float("nan")), torch.tensor(0), torch.tensor(0), torch.zeros(1, 2), torch.tensor([-100]))
    totals.add(torch.tensor(3.0), torch.tensor(0), torch.tensor(4), torch.zeros(1, 2), torch.tensor([-100]))
    summary = totals.summary()
    assert summary["mlm_loss"] == summary["loss"] == 3.0
    assert math.isnan(summary["nsp_accuracy"])


def test_unigram_loss_by_hand() -> None:
    counts = token_counts([Batch(torch.tensor([0, -100, 0, 1])), Batch(torch.tensor([0, -100]))], vocab_size=4)
    assert counts.tolist() == [3, 1, 0, 0]
    # (count + 1) / (4 + 4): 1/2, 1/4, 1/8, 1/8
    assert unigram_loss(counts, torch.tensor([0, 1, 3])) == pytest.approx((math.log(2) + math.log(4) + math.log(8)) / 3)
    uniform = torch.zeros(16, dtype=torch.int64)
    assert unigram_loss(uniform, torch.arange(16)) == pytest.approx(math.log(16))
