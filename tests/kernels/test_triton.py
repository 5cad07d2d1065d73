"""The Triton kernels on the cases of `bert-fast verify`, and attention's long regime, which those don't reach.

Without a GPU they run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import attention, available_impls
from bert_fast.kernels._common.dispatch import ROOMS
from bert_fast.kernels.attention.reference import attention_reference
from bert_fast.testing import assert_three_way, three_way
from bert_fast.verification import verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AVAILABLE = [room for room in ROOMS if available_impls()[room]["triton"].ok]


@pytest.mark.parametrize("room", AVAILABLE)
def test_every_case_of_verify_passes(room: str, poisoned_empty: None) -> None:
    results = list(verify([room], ["triton"]))
    assert {result.dtype for result in results} == {"float32", "bfloat16", "float16"}
    assert not [(result.dtype, result.case, result.worst, result.error) for result in results if not result.ok]


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["keep all", "dropout"])
@pytest.mark.parametrize("D", [32, 64])
def test_long_sequences(D: int, dropout_p: float, poisoned_empty: None) -> None:
    """Above 128 tokens the keys come in blocks: whole blocks and tails, an empty sequence, a short one."""
    cu_seqlens = torch.tensor([0, 150, 150, 193, 202], dtype=torch.int32, device=DEVICE)
    state = torch.tensor([11, 2**33 + 5], device=DEVICE) if dropout_p else None
    inputs = {"qkv": torch.randn(202, 3, 1, D, device=DEVICE), "bias": 0.3 * torch.randn(3, 1, D, device=DEVICE)}

    def ours(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention(qkv, cu_seqlens, 150, bias=bias, dropout_p=dropout_p, rng_state=state, impl="triton")

    def reference(qkv: Tensor, bias: Tensor) -> Tensor:
        return attention_reference(qkv, bias, cu_seqlens, 150, D**-0.5, dropout_p, state)

    dout = (torch.randn(202, 1, D, device=DEVICE),)
    rows = three_way(ours, reference, inputs, torch.bfloat16, dout, parameter_dtype=torch.float32, parameters=("bias",))
    assert_three_way(rows)
    first, second = (ours(inputs["qkv"].bfloat16(), inputs["bias"]) for _ in range(2))
    assert torch.equal(first, second)
