"""bias_gelu: every implementation against the reference, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import bias_gelu
from bert_fast.kernels.bias_gelu.reference import bias_gelu_reference
from bert_fast.testing import assert_three_way, targets, three_way

# Rows: none, one, fewer and more than a reduction part (16), not a multiple of it. Columns: below, at and between the
# widths of SSE, AVX2 and AVX-512 vectors (4, 8, 16), and two real F.
SHAPES = [(0, 8), (1, 1), (3, 7), (16, 16), (65, 33), (130, 512), (37, 3072)]
# A Triton tile is 4 x 512: inside one, over its edges both ways, several parts of the sum over rows (16 each).
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INTERPRETED_SHAPES = [(0, 8), (3, 7), (37, 530)]


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "rows", "cols"),
    targets("bias_gelu", SHAPES, interpreted=INTERPRETED_SHAPES, dtypes=DTYPES),
    ids=str,
)
def test_matches_reference(
    impl: str, device: str, dtype: torch.dtype, rows: int, cols: int, approximate: str, poisoned_empty: None
) -> None:
    inputs = {"x": 3 * torch.randn(rows, cols, device=device), "bias": torch.randn(cols, device=device)}

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(x, bias, approximate=approximate, impl=impl)

    def reference(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu_reference(x, bias, approximate == "tanh")

    assert_three_way(three_way(ours, reference, inputs, dtype, (torch.randn(rows, cols, device=device),)))


@pytest.mark.parametrize(("impl", "device"), targets("bias_gelu"))
def test_large_and_special_values(impl: str, device: str) -> None:
    """Tails, infinities, NaN, and the points where the approximations saturate."""
    x = torch.tensor(
        [[-float("inf"), -200.0, -12.0, -5.7, -4.0, -0.0, 0.0, 4.0, 5.7, 12.0, 200.0, float("inf"), float("nan")]],
        device=device,
    )
    bias = torch.zeros(x.shape[1], device=device)
    for approximate in ("none", "tanh"):
        out = bias_gelu(x, bias, approximate=approximate, impl=impl)
        expected = bias_gelu_reference(x.double(), bias.double(), approximate == "tanh")
        finite = expected.isfinite()
        # float32: 1 + erf near 0 is off by an eps (1.2e-7), times |x| / 2 of up to 6; elsewhere 8 eps.
        assert torch.allclose(out[finite].double(), expected[finite], atol=2e-6, rtol=1e-6)
        assert out[0, -1].isnan()
        assert out[0, -2] == float("inf")


LARGEST = torch.finfo(torch.float32).max


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(
    ("impl", "device", "dtype"), targets("bias_gelu", dtypes=[torch.float32, torch.bfloat16]), ids=str
)
def test_the_largest_and_the_smallest_values(impl: str, device: str, dtype: torch.dtype, approximate: str) -> None:
    """Values and gradients; u^2, u^3 or exp(u^2) overflows or underflows."""
    magnitudes = [LARGEST, 3e38, 1e38, 2e19, 1e13, 7e12, 1e6, 100.0, 10.1, 9.9, 6.0, 1e-4, 1e-20, 1e-38, 1e-40, 1e-45]
    row = torch.tensor([sign * value for value in magnitudes for sign in (1.0, -1.0)], device=device).to(dtype)
    x = torch.stack([row, row.flip(0)]).repeat(1, 2)[:, :61]  # full vectors and a partial one
    x = x.where(x.isfinite(), 0.0)  # the largest float32 is no bfloat16
    bias = torch.zeros(x.shape[1], device=device)
    ours, exact = x.clone().requires_grad_(), x.double().requires_grad_()
    out = bias_gelu(ours, bias, approximate=approximate, impl=impl)
    expected = bias_gelu_reference(exact, bias.double(), approximate == "tanh")
    (gradient,) = torch.autograd.grad(out.float().sum(), ours, torch.ones((), device=device))
    (exact_gradient,) = torch.autograd.grad(expected.sum(), exact)
    # As above for float32; bfloat16 rounds to an eps.
    eps = torch.finfo(dtype).eps
    for value, right in ((out, expected), (gradient, exact_gradient)):
        assert right.isfinite().all()
        assert torch.allclose(value.double(), right, rtol=max(eps, 1e-6), atol=3e-6)


GPU = [target for target in targets("bias_gelu") if target[0] in ("triton", "cuda")]


@pytest.mark.parametrize(("impl", "device"), GPU)
def test_the_exact_gelu_of_a_gpu_has_the_stated_error(impl: str, device: str) -> None:
    """kernels/_common/triton_gelu.py states it; the figures here are those over a dense grid, with a margin of 1.3."""
    x = torch.linspace(-16, 16, 2 * 512 * 8, dtype=torch.float64).to(torch.float32).reshape(16, 512).to(device)
    exact = x.double().requires_grad_()
    expected = torch.nn.functional.gelu(exact)
    # Not 0.5 u (1 + erf): it cancels for negative u.
    tail = 0.5 * x.double() * torch.special.erfc(-x.double() * 0.5**0.5)
    expected.sum().backward()
    leaf = x.clone().requires_grad_()
    out = bias_gelu(leaf, torch.zeros(512, device=device), impl=impl)
    out.sum().backward()
    error = (out.detach().double() - tail).abs()
    assert bool((error <= 3.2e-7 + 2**-24 * tail.abs()).all())  # the result's own rounding
    negative = (x < 0) & (x > -5)
    assert float((error / tail.abs())[negative].max()) < 2e-6
    assert leaf.grad is not None
    assert exact.grad is not None
    assert float((leaf.grad.double() - exact.grad).abs().max()) < 3.7e-7
