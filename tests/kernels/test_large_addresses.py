"""Rows that lie further apart than 2^31 elements in all: offsets have to be computed in 64 bits.

The rows are views into one allocation of 6 GB of which only their own pages are ever touched, so it takes no memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import add_layer_norm, attention, bias_gelu, masked_lm_loss
from bert_fast.testing import targets

ROWS, STRIDE, COLS = 4, 2**30, 96  # each stride fits into 32 bits, the offset of row 2 and 3 does not


@pytest.fixture
def apart() -> Iterator[Callable[[Tensor], Tensor]]:
    """Copies rows (4, 96) to where they are far apart."""

    def spread(x: Tensor) -> Tensor:
        storage = torch.empty((ROWS - 1) * STRIDE + COLS, dtype=x.dtype, device=x.device)
        view = storage.as_strided((ROWS, COLS), (STRIDE, 1))
        return view.copy_(x)

    yield spread
    torch.cuda.empty_cache()


def call_bias_gelu(x: Tensor, impl: str) -> Tensor:
    return bias_gelu(x, torch.linspace(-1, 1, COLS, device=x.device), impl=impl)


def call_add_layer_norm(x: Tensor, impl: str) -> Tensor:
    weight = torch.linspace(0.5, 1.5, COLS, device=x.device)
    return add_layer_norm(x, x, weight, weight, impl=impl)


def call_attention(x: Tensor, impl: str) -> Tensor:
    cu_seqlens = torch.tensor([0, 1, ROWS], dtype=torch.int32, device=x.device)
    return attention(x.view(ROWS, 3, 1, COLS // 3), cu_seqlens, ROWS - 1, impl=impl)


def call_masked_lm_loss(x: Tensor, impl: str) -> Tensor:
    dense, decoder = torch.linspace(-1, 1, 2 * COLS * COLS, device=x.device).sin().view(2, COLS, COLS)
    weight = torch.linspace(0.5, 1.5, COLS, device=x.device)
    labels = torch.tensor([7, -100, 0, 95], device=x.device)
    return masked_lm_loss(x, labels, dense, weight, weight, weight, decoder, weight, impl=impl).loss


CALLS = {
    "bias_gelu": call_bias_gelu,
    "add_layer_norm": call_add_layer_norm,
    "attention": call_attention,
    "masked_lm_loss": call_masked_lm_loss,
}


@pytest.mark.parametrize(("op", "impl", "device"), [(op, *target) for op in CALLS for target in targets(op)])
def test_rows_far_apart_give_what_rows_together_give(
    op: str, impl: str, device: str, apart: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(ROWS, COLS, device=device).to(torch.bfloat16)
    near, far = x.clone().requires_grad_(), apart(x).requires_grad_()
    outs = [CALLS[op](leaf, impl) for leaf in (near, far)]
    dout = torch.randn_like(outs[0])
    assert torch.equal(*outs)
    assert torch.equal(*(torch.autograd.grad(out, leaf, dout)[0] for out, leaf in zip(outs, (near, far), strict=True)))
