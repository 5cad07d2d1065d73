"""The Triton kernels on the cases of `bert-fast verify`; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest

from bert_fast.kernels import available_impls
from bert_fast.verification import verify

AVAILABLE = [op for op, impls in available_impls().items() if "triton" in impls and impls["triton"].ok]


@pytest.mark.parametrize("op", AVAILABLE)
def test_every_case_of_verify_passes(op: str, poisoned_empty: None) -> None:
    results = list(verify([op], ["triton"]))
    assert {result.dtype for result in results} == {"float32", "bfloat16", "float16"}
    assert not [(result.dtype, result.case, result.worst, result.error) for result in results if not result.ok]
