"""bias_gelu: every implementation against the reference, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import ImplUnavailableError, bias_gelu
from bert_fast.kernels.bias_gelu.reference import bias_gelu_reference
from bert_fast.testing import assert_three_way, operators, targets, three_way

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
    """Far tails, both infinities and NaN, and the saturation points of the approximations."""
    x = torch.tensor(
        [[-float("inf"), -200.0, -12.0, -5.7, -4.0, -0.0, 0.0, 4.0, 5.7, 12.0, 200.0, float("inf"), float("nan")]],
        device=device,
    )
    bias = torch.zeros(x.shape[1], device=device)
    for approximate in ("none", "tanh"):
        out = bias_gelu(x, bias, approximate=approximate, impl=impl)
        expected = bias_gelu_reference(x.double(), bias.double(), approximate == "tanh")
        finite = expected.isfinite()
        assert torch.allclose(out[finite].double(), expected[finite], atol=2e-6, rtol=1e-6)
        assert out[0, -1].isnan()
        assert out[0, -2] == float("inf")


@pytest.mark.parametrize(
    ("impl", "device", "rows", "cols"), targets("bias_gelu", [(301, 771)], interpreted=[(37, 530)])
)
def test_same_bits_again_and_with_other_thread_counts(impl: str, device: str, rows: int, cols: int) -> None:
    x, dout = torch.randn(2, rows, cols, device=device)
    bias = torch.randn(cols, device=device)

    def run() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        out = bias_gelu(*leaves, impl=impl)
        return [out, *torch.autograd.grad(out, leaves, dout)]

    threads = torch.get_num_threads()
    first = run()
    torch.set_num_threads(1)
    second = run()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize(("impl", "device"), targets("bias_gelu"))
def test_strided_input(impl: str, device: str) -> None:
    wide, bias = torch.randn(9, 40, device=device), torch.randn(40, device=device)
    for x, b in ((wide[:, ::2], bias[::2]), (wide[:, 3:20], bias[3:20]), (wide.T, bias[:9])):
        assert torch.equal(bias_gelu(x, b, impl=impl), bias_gelu(x.contiguous(), b.contiguous(), impl=impl))


@pytest.mark.parametrize(("impl", "device"), targets("bias_gelu"))
def test_mixed_parameter_dtype_under_autocast(impl: str, device: str) -> None:
    x, bias = torch.randn(5, 24, device=device), torch.randn(24, device=device, requires_grad=True)
    with torch.autocast(device, torch.bfloat16):
        out = bias_gelu(x, bias, impl=impl)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize(("impl", "device"), targets("bias_gelu"))
def test_opcheck(impl: str, device: str) -> None:
    ops = operators(impl)
    x = torch.randn(5, 24, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)
    torch.library.opcheck(ops.bias_gelu_fwd.default, (x, bias, False))
    torch.library.opcheck(ops.bias_gelu_bwd.default, (x.detach(), x.detach(), bias.detach(), True))


@pytest.mark.parametrize(("impl", "device"), targets("bias_gelu"))
def test_compiles_whole(impl: str, device: str, compile_backend: str) -> None:
    x = torch.randn(5, 24, device=device, requires_grad=True)
    bias = torch.randn(24, device=device, requires_grad=True)
    compiled = torch.compile(bias_gelu, fullgraph=True, backend=compile_backend)
    out, expected = compiled(x, bias, impl=impl), bias_gelu(x, bias, impl=impl)
    assert torch.equal(out, expected)
    assert all(
        torch.allclose(a, b)
        for a, b in zip(
            torch.autograd.grad(out.sum(), (x, bias)), torch.autograd.grad(expected.sum(), (x, bias)), strict=True
        )
    )


def test_bad_input_is_named() -> None:
    x, bias = torch.randn(5, 24), torch.randn(24)
    with pytest.raises(ValueError, match=r"bias has shape \(23,\); expected \(24,\)"):
        bias_gelu(x, bias[:-1])
    with pytest.raises(ValueError, match=r"x has shape \(24,\); expected \(T, F\)"):
        bias_gelu(x[0], bias)
    with pytest.raises(TypeError, match=r"x is torch\.int64; expected a floating-point tensor"):
        bias_gelu(x.long(), bias)
    with pytest.raises(ValueError, match="approximate is 'erf'; expected 'none' or 'tanh'"):
        bias_gelu(x, bias, approximate="erf")
    with pytest.raises(ValueError, match="impl is 'fastest'"):
        bias_gelu(x, bias, impl="fastest")


@pytest.mark.parametrize(("impl", "device"), targets("bias_gelu"))
def test_explicit_request_never_falls_back(impl: str, device: str) -> None:
    if impl != "reference":
        with pytest.raises(ImplUnavailableError, match=r"takes float32, bfloat16.*; the input is torch.float64"):
            bias_gelu(torch.randn(2, 4, device=device).double(), torch.randn(4, device=device).double(), impl=impl)
