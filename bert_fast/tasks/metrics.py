"""Metrics from scikit-learn and SciPy as JSON data: rounded nowhere, None where a metric is not defined."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# The metrics of which less is better; of every other one more is.
LOWER_IS_BETTER = ("loss", "mse", "mae", "ece", "hamming_loss")


def classification_metrics(true: Sequence[int], scores: Array, labels: Sequence[str]) -> dict[str, Any]:
    """Metrics of one class a row.

    Args:
        true: the class of each of N rows.
        scores: (N, C) probabilities; the likeliest class counts as predicted.
        labels: the C names.

    Returns:
        accuracy, macro_f1, micro_f1, weighted_f1, mcc (Matthews' correlation), ece, per_class {label: precision,
        recall, f1, support}, confusion_matrix (C lists of C counts; rows are the true classes) and its `labels`.
        Classes that are neither true nor predicted in any row do not count in the macro average.
    """
    from sklearn import metrics

    truth, predicted = np.asarray(true, dtype=np.int64), scores.argmax(1) if len(scores) else np.zeros(0, np.int64)
    if not len(truth):
        raise ValueError("no row came; expected at least one to compute metrics of")
    numbers = range(len(labels))
    present = sorted({*truth.tolist(), *predicted.tolist()})
    average = {
        name: metrics.f1_score(truth, predicted, labels=present, average=name, zero_division=0.0)
        for name in ("macro", "micro", "weighted")
    }
    per_class = metrics.precision_recall_fscore_support(truth, predicted, labels=list(numbers), zero_division=0.0)
    return {
        "accuracy": float(metrics.accuracy_score(truth, predicted)),
        **{f"{name}_f1": float(value) for name, value in average.items()},
        "mcc": float(metrics.matthews_corrcoef(truth, predicted)) if len(present) > 1 else None,
        "ece": calibration_error(scores.max(1), predicted == truth),
        "per_class": _by_class(labels, per_class),
        "labels": list(labels),
        "confusion_matrix": metrics.confusion_matrix(truth, predicted, labels=list(numbers)).tolist(),
    }


def multi_label_metrics(true: Array, scores: Array, labels: Sequence[str], threshold: float) -> dict[str, Any]:
    """Metrics of any number of classes a row.

    Args:
        true: (N, C), 1 where the class applies.
        scores: (N, C) probabilities; from `threshold` on a class counts as predicted.

    Returns:
        micro_f1, macro_f1 (over classes that are true or predicted somewhere), subset accuracy as `accuracy`,
        hamming_loss, ece and per_class.
    """
    from sklearn import metrics

    if not len(true):
        raise ValueError("no row came; expected at least one to compute metrics of")
    truth, predicted = np.asarray(true) >= 0.5, scores >= threshold
    present = [number for number in range(len(labels)) if truth[:, number].any() or predicted[:, number].any()]
    per_class = metrics.precision_recall_fscore_support(truth, predicted, average=None, zero_division=0.0)
    micro = metrics.f1_score(truth, predicted, average="micro", zero_division=0.0)
    return {
        "accuracy": float((truth == predicted).all(1).mean()),
        "micro_f1": float(micro),
        "macro_f1": float(np.mean([per_class[2][number] for number in present])) if present else 0.0,
        "hamming_loss": float((truth != predicted).mean()),
        "ece": calibration_error(np.where(predicted, scores, 1 - scores).ravel(), (truth == predicted).ravel()),
        "per_class": _by_class(labels, per_class),
        "labels": list(labels),
    }


def _by_class(labels: Sequence[str], parts: Any) -> dict[str, dict[str, float]]:
    names = ("precision", "recall", "f1")
    return {
        label: {**{name: float(part[i]) for name, part in zip(names, parts, strict=False)}, "support": int(parts[3][i])}
        for i, label in enumerate(labels)
    }


def regression_metrics(true: Sequence[float], predicted: Sequence[float]) -> dict[str, Any]:
    """pearson, spearman, mse, mae; a correlation is None for fewer than two rows, or where one side is constant."""
    from scipy import stats

    x, y = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if not len(x):
        raise ValueError("no row came; expected at least one to compute metrics of")
    found: dict[str, Any] = {"pearson": None, "spearman": None}
    if len(x) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            found = {"pearson": _number(stats.pearsonr(x, y)[0]), "spearman": _number(stats.spearmanr(x, y)[0])}
    return {**found, "mse": float(((x - y) ** 2).mean()), "mae": float(np.abs(x - y).mean())}


def calibration_error(confidence: Array, right: Array, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): |accuracy - confidence| over equal bins, weighed by their rows.

    Args:
        confidence: (N,) the probability of what was predicted.
        right: (N,) bool, whether the prediction was right.
    """
    return float(
        sum(abs(part["accuracy"] - part["confidence"]) * part["rows"] for part in calibration(confidence, right, bins))
        / max(len(confidence), 1)
    )


def calibration(confidence: Array, right: Array, bins: int = 15) -> list[dict[str, Any]]:
    """The bins of a reliability diagram that have rows: confidence and accuracy (means), rows."""
    places = np.clip(np.ceil(np.asarray(confidence) * bins).astype(int) - 1, 0, bins - 1)
    found = []
    for number in np.unique(places):
        inside = places == number
        found.append(
            {
                "confidence": float(np.asarray(confidence)[inside].mean()),
                "accuracy": float(np.asarray(right)[inside].mean()),
                "rows": int(inside.sum()),
            }
        )
    return found


def _number(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
