"""bias_gelu: every implementation against the reference, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import ImplUnavailableError, available_impls, bias_gelu
from bert_fast.kernels.bias_gelu.reference import bias_gelu_reference
from bert_fast.testing import assert_three_way, three_way

# Rows: none, one, fewer and more than a reduction part (16), not a multiple of it. Columns: below, at and between the
# widths of SSE, AVX2 and AVX-512 vectors (4, 8, 16), and two real F.
SHAPES = [(0, 8), (1, 1), (3, 7), (16, 16), (65, 33), (130, 512), (37, 3072)]
DTYPES = [torch.float32, torch.bfloat16]


def native_impls() -> list[str]:
    return [impl for impl, found in available_impls()["bias_gelu"].items() if found.ok and impl != "reference"]


@pytest.mark.parametrize("impl", native_impls())
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_matches_reference(
    impl: str, approximate: str, dtype: torch.dtype, rows: int, cols: int, poisoned_empty: None
) -> None:
    inputs = {"x": 3 * torch.randn(rows, cols), "bias": torch.randn(cols)}

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu(x, bias, approximate=approximate, impl=impl)

    def reference(x: Tensor, bias: Tensor) -> Tensor:
        return bias_gelu_reference(x, bias, approximate == "tanh")

    assert_three_way(three_way(ours, reference, inputs, dtype, (torch.randn(rows, cols),)))


@pytest.mark.parametrize("impl", native_impls())
def test_large_and_special_values(impl: str) -> None:
    """Far tails, both infinities and NaN, and the saturation points of the approximations."""
    x = torch.tensor(
        [[-float("inf"), -200.0, -12.0, -5.7, -4.0, -0.0, 0.0, 4.0, 5.7, 12.0, 200.0, float("inf"), float("nan")]]
    )
    for approximate in ("none", "tanh"):
        out = bias_gelu(x, torch.zeros(x.shape[1]), approximate=approximate, impl=impl)
        expected = bias_gelu_reference(x.double(), torch.zeros(x.shape[1]).double(), approximate == "tanh")
        finite = expected.isfinite()
        assert torch.allclose(out[finite].double(), expected[finite], atol=2e-6, rtol=1e-6)
        assert out[0, -1].isnan()
        assert out[0, -2] == float("inf")


@pytest.mark.parametrize("impl", native_impls())
def test_same_bits_again_and_with_other_thread_counts(impl: str) -> None:
    x, bias, dout = torch.randn(301, 771), torch.randn(771), torch.randn(301, 771)

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


def test_strided_input() -> None:
    wide = torch.randn(9, 40)
    bias = torch.randn(20)
    assert torch.equal(bias_gelu(wide[:, ::2], bias), bias_gelu(wide[:, ::2].contiguous(), bias))


def test_mixed_parameter_dtype_under_autocast() -> None:
    x, bias = torch.randn(5, 24), torch.randn(24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = bias_gelu(x, bias)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32


@pytest.mark.parametrize("impl", native_impls())
def test_opcheck(impl: str) -> None:
    x, bias = torch.randn(5, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    torch.library.opcheck(torch.ops.bert_fast.bias_gelu_fwd.default, (x, bias, False))
    torch.library.opcheck(torch.ops.bert_fast.bias_gelu_bwd.default, (x.detach(), x.detach(), bias.detach(), True))


def test_compiles_whole(compile_backend: str) -> None:
    x, bias = torch.randn(5, 24, requires_grad=True), torch.randn(24, requires_grad=True)
    compiled = torch.compile(bias_gelu, fullgraph=True, backend=compile_backend)
    out, expected = compiled(x, bias), bias_gelu(x, bias)
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
    with pytest.raises(ImplUnavailableError, match=r"impl='cuda' not built yet.*Available here: reference"):
        bias_gelu(x, bias, impl="cuda")


@pytest.mark.parametrize("impl", native_impls())
def test_explicit_request_never_falls_back(impl: str) -> None:
    with pytest.raises(ImplUnavailableError, match=r"takes float32, bfloat16; the input is torch.float64"):
        bias_gelu(torch.randn(2, 4).double(), torch.randn(4).double(), impl=impl)
