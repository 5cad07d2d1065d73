"""Parts of answers: finite numbers, JSON, vectors of length 1, probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import Response
from pydantic_core import to_json

from bert_fast.serve.errors import BackendError


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer; faster than FastAPI's, which looks into every number of a vector in Python."""
    return Response(to_json(value), status, headers, "application/json")


def finite(arrays: Sequence[np.ndarray[Any, Any]], what: str) -> list[np.ndarray[Any, Any]]:
    """The arrays; BackendError where a number in them is infinite or NaN, which JSON doesn't have."""
    for index, array in enumerate(arrays):
        if not np.isfinite(array).all():
            raise BackendError(f"the {what} of the text {index} is not finite; the model overflows in its precision")
    return list(arrays)


def normalized(vector: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """x / ||x||, and zeros as they are."""
    norm = np.linalg.norm(vector)
    return vector / norm if norm else vector


def softmax(row: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Probabilities, in float64."""
    exponentials = np.exp(row.astype(np.float64) - row.max())
    found: np.ndarray[Any, Any] = exponentials / exponentials.sum()
    return found
