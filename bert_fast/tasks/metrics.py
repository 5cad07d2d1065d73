"""Metrics from scikit-learn and SciPy as JSON values: not rounded, None if undefined."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# For every other metric, higher is better.
LOWER_IS_BETTER = ("loss", "mse", "mae", "ece", "hamming_loss")


def classification_metrics(true: Sequence[int], scores: Array, labels: Sequence[str]) -> dict[str, Any]:
    """Metrics of classification.

    Args:
        true: the class of each of N rows.
        scores: (N, C) probabilities; the most likely class is the prediction.
        labels: the C names.

    Returns:
        accuracy, macro_f1, micro_f1, weighted_f1, mcc (Matthews' correlation), ece, per_class {label: precision,
        recall, f1, support}, confusion_matrix (C lists of C counts; rows are the true classes) and its `labels`.
        Macro averages exclude classes that are neither true nor predicted in any row.

    Raises:
        ValueError: there are no rows.
    """
    from sklearn import metrics

    truth, predicted = np.asarray(true, dtype=np.int64), scores.argmax(1) if len(scores) else np.zeros(0, np.int64)
    if not len(truth):
        raise ValueError("the table is empty; expected at least one row to compute metrics")
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
    """Metrics of multi-label classification.

    Args:
        true: (N, C), 1 if the class applies.
        scores: (N, C) probabilities.
        labels: the C names.
        threshold: the minimum probability of a predicted class.

    Returns:
        accuracy (of the whole set of labels), micro_f1, macro_f1 (over classes that are true or predicted in some row),
        hamming_loss, ece, per_class and `labels`.

    Raises:
        ValueError: there are no rows.
    """
    from sklearn import metrics

    if not len(true):
        raise ValueError("the table is empty; expected at least one row to compute metrics")
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
    """pearson, spearman, mse and mae; a correlation is None for fewer than two rows, or if one side is constant.

    Raises:
        ValueError: there are no rows.
    """
    from scipy import stats

    x, y = np.asarray(true, dtype=np.float64), np.asarray(predicted, dtype=np.float64)
    if not len(x):
        raise ValueError("the table is empty; expected at least one row to compute metrics")
    correlations: dict[str, Any] = {"pearson": None, "spearman": None}
    if len(x) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.ConstantInputWarning)
            pearson, spearman = stats.pearsonr(x, y)[0], stats.spearmanr(x, y)[0]
            correlations = {"pearson": _none_if_nan(pearson), "spearman": _none_if_nan(spearman)}
    return {**correlations, "mse": float(((x - y) ** 2).mean()), "mae": float(np.abs(x - y).mean())}


def ranking_metrics(queries: Sequence[tuple[Sequence[float], Sequence[float]]], most: int = 10) -> dict[str, Any]:
    """Metrics of texts in the order of their scores.

    Args:
        queries: the true relevances, 0 to 1, and the scores of the texts of each query.
        most: texts that count.

    Returns:
        ndcg_at_10 and mrr_at_10, means over the `queries` whose texts have different relevances, None without one; a
        relevance of 0.5 or more is relevant for mrr_at_10, and texts of equal scores count against it.
        average_precision of all pairs, None unless all relevances are 0 and 1 and both occur, and spearman of
        relevances and scores.

    Raises:
        ValueError: there are no queries.
    """
    from sklearn import metrics

    ndcg, reciprocal = [], []
    for relevances, scores in queries:
        truth, found = np.asarray(relevances, dtype=np.float64), np.asarray(scores, dtype=np.float64)
        if len(set(relevances)) < 2:
            continue
        ndcg.append(float(metrics.ndcg_score(truth[None], found[None], k=most)))
        relevant = truth >= 0.5
        if relevant.any():
            rank = 1 + int((found[~relevant] >= found[relevant].max()).sum())
            reciprocal.append(1 / rank if rank <= most else 0.0)
    true = [x for relevances, _ in queries for x in relevances]
    predicted = [x for _, scores in queries for x in scores]
    spearman = regression_metrics(true, predicted)["spearman"]
    binary = set(true) == {0.0, 1.0}
    return {
        f"ndcg_at_{most}": float(np.mean(ndcg)) if ndcg else None,
        f"mrr_at_{most}": float(np.mean(reciprocal)) if reciprocal else None,
        "queries": len(ndcg),
        "average_precision": float(metrics.average_precision_score(true, predicted)) if binary else None,
        "spearman": spearman,
    }


def calibration_error(confidence: Array, correct: Array, bins: int = 15) -> float:
    """Expected calibration error (Guo et al., 2017): |accuracy - confidence| over equal-width bins, weighted by rows.

    Args:
        confidence: (N,) the probability of each prediction.
        correct: (N,) bool, whether the prediction is correct.
        bins: of the confidence, between 0 and 1.
    """
    return float(
        sum(abs(one["accuracy"] - one["confidence"]) * one["rows"] for one in calibration(confidence, correct, bins))
        / max(len(confidence), 1)
    )


def calibration(confidence: Array, correct: Array, bins: int = 15) -> list[dict[str, Any]]:
    """The nonempty bins of a reliability diagram: mean confidence, accuracy, and rows."""
    indices = np.clip(np.ceil(np.asarray(confidence) * bins).astype(int) - 1, 0, bins - 1)
    nonempty = []
    for index in np.unique(indices):
        inside = indices == index
        nonempty.append(
            {
                "confidence": float(np.asarray(confidence)[inside].mean()),
                "accuracy": float(np.asarray(correct)[inside].mean()),
                "rows": int(inside.sum()),
            }
        )
    return nonempty


def _none_if_nan(value: Any) -> float | None:
    return None if math.isnan(value) else float(value)
