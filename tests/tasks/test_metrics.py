"""Metrics against cases computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bert_fast.tasks.metrics import (
    calibration,
    calibration_error,
    classification_metrics,
    multi_label_metrics,
    regression_metrics,
)


def one_hot(classes: list[int], count: int) -> np.ndarray:
    return np.eye(count)[classes]


def test_classification_by_hand() -> None:
    # a: 2 of 3 found; b: 1 of 1 found, with one a too; c and d are neither true nor predicted.
    found = classification_metrics([0, 0, 0, 1], one_hot([0, 0, 1, 1], 4), ["a", "b", "c", "d"])
    assert found["accuracy"] == 0.75
    first = {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "support": 3}
    assert found["per_class"]["a"] == first
    assert found["per_class"]["b"]["f1"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["micro_f1"] == pytest.approx(0.75)
    assert found["weighted_f1"] == pytest.approx((3 * 0.8 + 2 / 3) / 4)
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) with TP = 1, TN = 2, FP = 1, FN = 0 for b
    assert found["mcc"] == pytest.approx((1 * 2 - 0) / math.sqrt(2 * 1 * 3 * 2))
    assert found["confusion_matrix"] == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert found["ece"] == pytest.approx(0.25)


def test_classification_of_one_class_has_no_correlation() -> None:
    found = classification_metrics([1, 1], one_hot([1, 1], 2), ["a", "b"])
    assert found["mcc"] is None
    assert found["accuracy"] == found["macro_f1"] == 1.0


def test_calibration_by_hand() -> None:
    confidence, right = np.array([0.95, 0.95, 0.95, 0.55]), np.array([True, True, False, True])
    parts = calibration(confidence, right, bins=10)
    assert [part["rows"] for part in parts] == [1, 3]
    assert [part["accuracy"] for part in parts] == [1.0, pytest.approx(2 / 3)]
    assert calibration_error(confidence, right, bins=10) == pytest.approx((0.45 + 3 * (0.95 - 2 / 3)) / 4)


def test_multi_label_by_hand() -> None:
    true = np.array([[1, 1, 0], [0, 1, 0]])
    scores = np.array([[0.9, 0.4, 0.0], [0.6, 0.8, 0.0]])
    found = multi_label_metrics(true, scores, ["a", "b", "c"], 0.5)
    # a: TP 1, FP 1; b: TP 1, FN 1; c: never true or predicted
    assert found["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["macro_f1"] == pytest.approx(2 / 3)
    assert found["accuracy"] == 0.0
    assert found["hamming_loss"] == pytest.approx(2 / 6)
    assert multi_label_metrics(true, scores, ["a", "b", "c"], 0.35)["per_class"]["b"]["recall"] == 1.0


def test_regression_by_hand() -> None:
    found = regression_metrics([1, 2, 3], [1, 4, 9])
    assert found["spearman"] == pytest.approx(1.0)
    # covariance 8, variances 2 and 98/3 (both times n)
    assert found["pearson"] == pytest.approx(8 / math.sqrt(2 * 98 / 3))
    assert found["mse"] == pytest.approx((0 + 4 + 36) / 3)
    assert found["mae"] == pytest.approx((0 + 2 + 6) / 3)
    assert regression_metrics([1, 2], [3, 3])["pearson"] is None
    assert regression_metrics([1], [3]) == {"pearson": None, "spearman": None, "mse": 4.0, "mae": 2.0}
