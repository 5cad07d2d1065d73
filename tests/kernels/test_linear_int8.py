"""linear_int8: the CPU's products against exact integers, its quantization against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import Int8Weight, feed_forward_int8, linear_int8, quantize_weight
from bert_fast.kernels.linear_int8 import cpu_backends
from bert_fast.kernels.linear_int8.reference import quantize_rows_reference
from bert_fast.testing import targets

# Rows: none, one, not a multiple of anything. K and N below, between and above what vectors and oneDNN's blocks hold.
SHAPES = [(0, 8, 8), (1, 1, 1), (5, 7, 9), (3, 16, 33), (33, 768, 50), (65, 200, 384)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["tiles", "onednn"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that computes the products, whichever is faster on this CPU."""
    monkeypatch.setattr(cpu_backends, "BACKEND", request.param)
    return str(request.param)


def on_the_grid(rows: int, width: int) -> Tensor:
    """Rows that INT8 represents exactly: 0 to 255 sixteenths, with both bounds in each row of two values or more."""
    x = torch.randint(0, 256, (rows, width)) / 16
    if width > 1:
        x[:, 0], x[:, 1] = 0.0, 255 / 16
    return x


def random_weight(columns: int, width: int) -> Int8Weight:
    limit = cpu_backends.weight_limit()
    values = torch.randint(-limit, limit + 1, (columns, width), dtype=torch.int8)
    return Int8Weight(values, torch.rand(columns) / 100, values.sum(1).float())


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "rows", "width", "columns"), targets("linear_int8", SHAPES, dtypes=DTYPES), ids=str
)
def test_matches_reference(
    impl: str,
    device: str,
    dtype: torch.dtype,
    rows: int,
    width: int,
    columns: int,
    activation: str | None,
    backend: str,
    poisoned_empty: None,
) -> None:
    """Inputs that INT8 represents exactly: only the float32 epilogue rounds."""
    x, weight, bias = on_the_grid(rows, width).to(dtype), random_weight(columns, width), torch.randn(columns)
    results = linear_int8(x, weight, bias, activation=activation, impl=impl)
    exact = linear_int8(x.double(), weight, bias.double(), activation=activation, impl="reference")
    assert results.dtype == dtype
    scale = float(exact.abs().max()) if rows else 0.0
    tolerance = (2 if dtype == torch.bfloat16 else 8) * torch.finfo(dtype).eps * scale
    if activation and rows:
        # u (1 + erf) / 2: near erf = -1 the result is arbitrarily small, the rounding error of 1 + erf is not.
        u = linear_int8(x.double(), weight, bias.double(), impl="reference")
        tolerance += torch.finfo(torch.float32).eps * float(u.abs().max())
    assert torch.allclose(results.double(), exact, rtol=0.0, atol=tolerance)


def product_of(u: Tensor, values: Tensor, backend: str) -> Tensor:
    """u (T, K) uint8 times values (N, K) int8 as float32 (T, N)."""
    ops, (rows, columns) = torch.ops.bert_fast, (u.shape[0], values.shape[0])
    if backend == "onednn":
        return ops.linear_int8_product(u, values)
    one, zero = torch.ones(columns), torch.zeros(columns)
    packed = ops.linear_int8_pack(values)
    return ops.linear_int8_tiles(u, packed, columns, torch.ones(rows), torch.zeros(rows), one, zero, None, 0, False)


@pytest.mark.parametrize(("rows", "width", "columns"), [(1, 1, 1), (3, 5, 17), (6, 768, 64), (259, 770, 131)])
def test_tiles_have_the_bits_of_onednn(rows: int, width: int, columns: int) -> None:
    """Integer sums are exact and the epilogue is the same, so compiled and eager calls agree to the bit."""
    x, bias, weight = torch.randn(rows, width), torch.randn(columns), random_weight(columns, width)
    results = []
    for backend in ("tiles", "onednn"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_backends, "BACKEND", backend)
            results.append([linear_int8(x, weight, bias, activation=name, impl="cpu") for name in (None, "gelu")])
    assert all(torch.equal(tiles, onednn) for tiles, onednn in zip(*results, strict=True))


@pytest.mark.parametrize("out_dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=["fp32", "bf16", "fp64"])
def test_another_dtype_of_the_result(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(7, 40).to(dtype), random_weight(24, 40), torch.randn(24)
    out = linear_int8(x, weight, bias, activation="gelu", out_dtype=out_dtype)
    precise = linear_int8(x if dtype == torch.float64 else x.float(), weight, bias, activation="gelu")
    assert torch.equal(out, precise.to(out_dtype))
    with pytest.raises(
        TypeError, match=r"out_dtype is torch\.float16; expected torch\.float32, torch\.bfloat16 or None"
    ):
        linear_int8(x, weight, bias, out_dtype=torch.float16)


@pytest.mark.parametrize("corner", ["all largest", "all lowest", "alternating"])
def test_extreme_values_are_exact(corner: str, backend: str) -> None:
    """The largest possible sums of each pair of neighbours, which saturate 16 bits without VNNI: 127 with it."""
    width, columns, limit = 3072, 64, cpu_backends.weight_limit()
    u = torch.full((17, width), 255, dtype=torch.uint8)
    values = torch.full((columns, width), -limit if corner == "all lowest" else limit, dtype=torch.int8)
    if corner == "alternating":
        u[:, ::4] = 0
        values[:, 1::2] = -limit
    results = product_of(u, values, backend)
    exact = u.double() @ values.double().T
    assert torch.equal(results.double(), exact.float().double())


@pytest.mark.parametrize("with_range", [False, True], ids=["by token", "calibrated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
@pytest.mark.parametrize("width", [1, 3, 8, 17, 65, 768])
def test_quantization_is_the_definition(width: int, dtype: torch.dtype, with_range: bool) -> None:
    x = (3 * torch.randn(23, width) + torch.randn(23, 1)).to(dtype)
    bounds = torch.tensor([-2.0, 3.0]) if with_range else None
    u, scale, low = torch.ops.bert_fast.linear_int8_quantize(x, bounds)
    expected, expected_scale, expected_low = quantize_rows_reference(x, bounds)
    # (high - low) / 255 in float32: two or three roundings of half an eps (6e-8).
    assert torch.allclose(scale, expected_scale[:, 0], rtol=1e-6)
    assert torch.equal(low, expected_low[:, 0])
    off = (u.int() - expected.int()).abs()
    assert int(off.max()) <= 1  # a tie that falls on the other side
    assert float(off.float().mean()) < 0.01
    if not with_range:
        error = (scale[:, None] * u + low[:, None] - x.float()).abs()
        # Half a step; u before rounding is off by up to 255 eps (3e-5 steps), a sum with low of up to 15 by 9e-7.
        assert (error <= 0.501 * scale[:, None] + 1e-6).all()


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16"])
def test_feed_forward_is_two_layers(dtype: torch.dtype, activation: str, backend: str) -> None:
    x, bias = torch.randn(37, 64).to(dtype), torch.randn(200)
    up, down = quantize_weight(torch.randn(200, 64) / 8), quantize_weight(torch.randn(64, 200) / 14)
    ranges = {"up_range": torch.tensor([-3.0, 3.0]), "down_range": torch.tensor([-0.2, 5.0])}
    for bounds in ({}, ranges):
        results = feed_forward_int8(x, up, bias, down, activation=activation, impl="cpu", **bounds)
        exact = feed_forward_int8(x.float(), up, bias, down, activation=activation, impl="reference", **bounds)
        # An INT8 value that rounds the other way moves an output by a 255th of one term of its sum.
        assert torch.allclose(results.float(), exact, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 2e-3)


# Steps of 6.4 / 255 deviations of x and 3.4 / limit of a weight: errors of step / 12**0.5 add to 0.0168 and 0.0105.
@pytest.mark.parametrize(("limit", "bound"), [(64, 0.018), (127, 0.012)])
def test_error_is_that_of_eight_bits(limit: int, bound: float) -> None:
    x, weight = torch.randn(64, 768), torch.randn(512, 768) / 28
    exact = x.double() @ weight.double().T
    impl = "cpu" if limit <= cpu_backends.weight_limit() else "reference"
    error = linear_int8(x, quantize_weight(weight, limit=limit), impl=impl) - exact
    assert float(error.norm() / exact.norm()) < bound


def test_weights_that_would_saturate_are_refused(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Such weights come from a model that was quantized on a CPU with VNNI."""
    x, weight = torch.rand(3, 16), quantize_weight(torch.randn(8, 16), limit=127)
    monkeypatch.setattr(cpu_backends, "weight_limit", lambda: 64)
    with pytest.raises(ValueError, match=r"up to 127 in magnitude.*multiplies up to 64 exactly"):
        linear_int8(x, weight, impl="cpu")


def test_rows_that_are_not_finite_are_nan_and_no_others(backend: str) -> None:
    x, weight = torch.randn(6, 40), random_weight(24, 40)
    x[1, 5], x[2, 39], x[3, 0] = float("nan"), float("inf"), -float("inf")
    for bounds in (None, torch.tensor([-3.0, 3.0])):
        for impl in ("cpu", "reference"):
            results = linear_int8(x, weight, input_range=bounds, impl=impl)
            assert results[1:4].isnan().all()
            assert results[[0, 4, 5]].isfinite().all()


def test_constant_rows_are_exact() -> None:
    x, weight = torch.tensor([0.0, 2.5, -1.0]).repeat(10, 1).T.contiguous(), random_weight(24, 10)
    exact = x.double() @ (weight.values.double() * weight.scale.double()[:, None]).T
    # float32: low times the sum of the weights; an eps of values of up to 7 is 8e-7.
    assert torch.allclose(linear_int8(x, weight, impl="cpu").double(), exact, atol=1e-5)


def test_opcheck_of_both_backends() -> None:
    ops, x, (values, scale, sums) = torch.ops.bert_fast, torch.randn(5, 24), random_weight(16, 24)
    bounds = torch.tensor([-1.0, 1.0])
    torch.library.opcheck(ops.linear_int8_quantize.default, (x.bfloat16(), bounds))
    u, row_scale, low = ops.linear_int8_quantize(x, None)
    torch.library.opcheck(ops.linear_int8_product.default, (u, values))
    rows = (ops.linear_int8_product(u, values), row_scale, low, scale, sums, torch.randn(16))
    torch.library.opcheck(ops.linear_int8_epilogue.default, (*rows, 1, True))
    torch.library.opcheck(ops.linear_int8_pack.default, (values,))
    tiled = (u, ops.linear_int8_pack(values), 16, *rows[1:])
    torch.library.opcheck(ops.linear_int8_tiles.default, (*tiled, 1, True))
    torch.library.opcheck(ops.linear_int8_epilogue_quantize.default, (*rows, 2, bounds))
