"""Metrics compared with values computed by hand."""

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
    # a: recall 2/3, precision 1; b: recall 1, precision 1/2; c and d are neither true nor predicted.
    metrics = classification_metrics([0, 0, 0, 1], one_hot([0, 0, 1, 1], 4), ["a", "b", "c", "d"])
    assert metrics["accuracy"] == 0.75
    first = {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(0.8), "support": 3}
    assert metrics["per_class"]["a"] == first
    assert metrics["per_class"]["b"]["f1"] == pytest.approx(2 / 3)
    assert metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert metrics["micro_f1"] == pytest.approx(0.75)
    assert metrics["weighted_f1"] == pytest.approx((3 * 0.8 + 2 / 3) / 4)
    # (TP TN - FP FN) / sqrt((TP+FP)(TP+FN)(TN+FP)(TN+FN)) with TP = 1, TN = 2, FP = 1, FN = 0 for b
    assert metrics["mcc"] == pytest.approx((1 * 2 - 0) / math.sqrt(2 * 1 * 3 * 2))
    assert metrics["confusion_matrix"] == [[2, 1, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert metrics["ece"] == pytest.approx(0.25)


def test_classification_of_one_class_has_no_correlation() -> None:
    metrics = classification_metrics([1, 1], one_hot([1, 1], 2), ["a", "b"])
    assert metrics["mcc"] is None
    assert metrics["accuracy"] == metrics["macro_f1"] == 1.0


def test_calibration_by_hand() -> None:
    confidence, correct = np.array([0.95, 0.95, 0.95, 0.55]), np.array([True, True, False, True])
    parts = calibration(confidence, correct, bins=10)
    assert [part["rows"] for part in parts] == [1, 3]
    assert [part["accuracy"] for part in parts] == [1.0, pytest.approx(2 / 3)]
    assert calibration_error(confidence, correct, bins=10) == pytest.approx((0.45 + 3 * (0.95 - 2 / 3)) / 4)


def test_multi_label_by_hand() -> None:
    true = np.array([[1, 1, 0], [0, 1, 0]])
    scores = np.array([[0.9, 0.4, 0.0], [0.6, 0.8, 0.0]])
    metrics = multi_label_metrics(true, scores, ["a", "b", "c"], 0.5)
    # a: TP 1, FP 1; b: TP 1, FN 1; c: never true or predicted
    assert metrics["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert metrics["macro_f1"] == pytest.approx(2 / 3)
    assert metrics["accuracy"] == 0.0
    assert metrics["hamming_loss"] == pytest.approx(2 / 6)
    assert multi_label_metrics(true, scores, ["a", "b", "c"], 0.35)["per_class"]["b"]["recall"] == 1.0


def test_regression_by_hand() -> None:
    metrics = regression_metrics([1, 2, 3], [1, 4, 9])
    assert metrics["spearman"] == pytest.approx(1.0)
    # covariance 8, variances 2 and 98/3 (both times n)
    assert metrics["pearson"] == pytest.approx(8 / math.sqrt(2 * 98 / 3))
    assert metrics["mse"] == pytest.approx((0 + 4 + 36) / 3)
    assert metrics["mae"] == pytest.approx((0 + 2 + 6) / 3)
    assert regression_metrics([1, 2], [3, 3])["pearson"] is None
    assert regression_metrics([1], [3]) == {"pearson": None, "spearman": None, "mse": 4.0, "mae": 2.0}
