"""The Triton kernels on the cases of `bert-fast verify`; without a GPU they run in Triton's interpreter."""

from __future__ import annotations

import pytest

from bert_fast.kernels import available_impls
from bert_fast.kernels._common.dispatch import ROOMS
from bert_fast.verification import verify

AVAILABLE = [room for room in ROOMS if available_impls()[room]["triton"].ok]


@pytest.mark.parametrize("room", AVAILABLE)
def test_every_case_of_verify_passes(room: str, poisoned_empty: None) -> None:
    results = list(verify([room], ["triton"]))
    assert {result.dtype for result in results} == {"float32", "bfloat16", "float16"}
    assert not [(result.dtype, result.case, result.worst, result.error) for result in results if not result.ok]
