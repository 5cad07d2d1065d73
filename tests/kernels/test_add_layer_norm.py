"""add_layer_norm: every implementation against the reference, forward and backward, with and without dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import add_layer_norm
from bert_fast.kernels._common.philox import dropout_multiplier
from bert_fast.kernels.add_layer_norm.reference import add_layer_norm_reference
from bert_fast.testing import assert_three_way, operators, targets, three_way

# Columns: every BERT size, then odd ones around the vector widths (4, 8, 16) and the 16 columns of one dropout draw.
# Rows: none, one, odd, more than one reduction part (16).
SHAPES = [(9, 128), (17, 256), (33, 384), (65, 512), (37, 768), (5, 1024), (0, 16), (1, 3), (3, 7), (19, 33), (7, 271)]
# A Triton program holds 1024 elements at a time, a part of the sums over rows has 8 rows and more. So: nothing; one
# tile with both tails; an odd E over two parts, the second one not full; one row a program in a tile that is not full.
INTERPRETED_SHAPES = [(0, 16), (3, 7), (19, 33), (10, 771)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OP = "add_layer_norm"


def rng_state(device: str) -> Tensor:
    return torch.tensor([-(2**62) + 12345, 2**40 + 7], device=device)


def random_inputs(rows: int, cols: int, device: str = "cpu", *, x_bias: bool = True) -> dict[str, Tensor]:
    inputs = {
        "x": 2 * torch.randn(rows, cols, device=device),
        "residual": torch.randn(rows, cols, device=device) + torch.randn(rows, 1, device=device),
        "weight": 1 + 0.5 * torch.randn(cols, device=device),
        "bias": torch.randn(cols, device=device),
    }
    return inputs | ({"x_bias": torch.randn(cols, device=device)} if x_bias else {})


def functions(impl: str, dropout_p: float, eps: float = 1e-12) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def state(inputs: dict[str, Tensor]) -> Tensor | None:
        return rng_state(str(inputs["x"].device)) if dropout_p else None

    def ours(x_bias: Tensor | None = None, **inputs: Tensor) -> Tensor:
        return add_layer_norm(**inputs, x_bias=x_bias, dropout_p=dropout_p, eps=eps, rng_state=state(inputs), impl=impl)

    def reference(x_bias: Tensor | None = None, **inputs: Tensor) -> Tensor:
        return add_layer_norm_reference(**inputs, x_bias=x_bias, dropout_p=dropout_p, eps=eps, rng_state=state(inputs))

    return ours, reference


@pytest.mark.parametrize("dropout_p", [0.0, 0.1], ids=["keep all", "dropout"])
@pytest.mark.parametrize("x_bias", [True, False], ids=["x_bias", "no x_bias"])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "rows", "cols"),
    targets(OP, SHAPES, interpreted=INTERPRETED_SHAPES, dtypes=DTYPES),
    ids=str,
)
def test_matches_reference(
    impl: str,
    device: str,
    dtype: torch.dtype,
    rows: int,
    cols: int,
    x_bias: bool,
    dropout_p: float,
    poisoned_empty: None,
) -> None:
    ours, reference = functions(impl, dropout_p)
    inputs = random_inputs(rows, cols, device, x_bias=x_bias)
    assert_three_way(three_way(ours, reference, inputs, dtype, (torch.randn(rows, cols, device=device),)))


@pytest.mark.parametrize(
    ("impl", "device", "cols"), targets(OP, [(8190,), (8192,), (4097,)], interpreted=[(8190,), (8192,)])
)
def test_the_widest_rows(impl: str, device: str, cols: int, poisoned_empty: None) -> None:
    """Up to 8192 columns. From 4097 on dx_bias has a separate kernel in Triton, and in CUDA a thread has twice the
    elements, with the sums over rows in shared memory. 18 rows are two parts of them, in Triton three.
    """
    ours, reference = functions(impl, 0.1)
    inputs, dout = random_inputs(18, cols, device), torch.randn(18, cols, device=device)
    assert_three_way(three_way(ours, reference, inputs, torch.bfloat16, (dout,)))


@pytest.mark.parametrize("cols", [768, 8192])
@pytest.mark.parametrize(("impl", "device"), [target for target in targets(OP) if target[0] != "reference"])
def test_the_gradient_of_x_bias_is_asked_for_by_passing_one(
    impl: str, device: str, cols: int, poisoned_empty: None
) -> None:
    """Without x_bias its gradient is empty, and no other result changes by a bit compared with one of zeros."""
    inputs = random_inputs(17, cols, device, x_bias=False)
    x, residual, weight, bias = inputs.values()
    dout, zeros = torch.randn(17, cols, device=device), torch.zeros(cols, device=device)
    results = []
    for x_bias in (None, zeros):
        _, mean, rstd = operators(impl).add_layer_norm_fwd(x, residual, weight, bias, x_bias, 0.0, 1e-12, None)
        results.append(operators(impl).add_layer_norm_bwd(dout, x, residual, weight, x_bias, mean, rstd, 0.0, None))
    (*without, empty), (*with_zeros, dx_bias) = results
    assert empty.numel() == 0
    for one, other in zip(without, with_zeros, strict=True):
        assert torch.equal(one, other)
    dx = with_zeros[0]
    rounding = 17 * 2**-24 * float(dx.abs().sum(0).max())  # of a sum of 17 rows in float32
    assert torch.allclose(dx_bias.double(), dx.double().sum(0), rtol=0, atol=rounding)


@pytest.mark.parametrize(
    ("impl", "device", "rows", "cols"),
    [("reference", "cpu", 41, 389), *targets(OP, [(41, 389)], interpreted=[(11, 389)])],
)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_drops_exactly_the_elements_of_the_definition(
    impl: str, device: str, rows: int, cols: int, dropout_p: float
) -> None:
    """dx is zero where x was dropped, dresidual is not, and their ratio is the multiplier."""
    inputs = {name: x.requires_grad_() for name, x in random_inputs(rows, cols, device).items()}
    state = rng_state(device)
    out = add_layer_norm(**inputs, dropout_p=dropout_p, rng_state=state, impl=impl)
    dout = torch.randn(rows, cols, device=device)
    dx, dresidual = torch.autograd.grad(out, (inputs["x"], inputs["residual"]), dout)
    multiplier = dropout_multiplier(state, dropout_p, 1, rows, cols)[0].float()
    assert (dresidual != 0).all()
    assert torch.equal(dx, dresidual * multiplier)
    x = torch.full((rows, cols), 1e8, device=device)
    one, zero = torch.ones(cols, device=device), torch.zeros(cols, device=device)
    dropped = add_layer_norm(x, torch.zeros_like(x), one, zero, dropout_p=dropout_p, rng_state=state, impl=impl)
    assert torch.equal(dropped < 0, multiplier == 0)


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_constant_rows_give_the_bias(impl: str, device: str) -> None:
    """The variance is 0, also for values whose square would lose it to rounding."""
    value = torch.tensor([0.0, 1.0, -3.7, 1e4, -123456.789, 1e-30], device=device).unsqueeze(1)
    x = value.expand(6, 771).clone().requires_grad_()
    weight, bias = torch.randn(2, 771, device=device)
    out = add_layer_norm(x, torch.zeros_like(x), weight, bias, impl=impl)
    assert torch.equal(out, bias.expand(6, 771))
    out.sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(("impl", "device"), targets(OP))
@pytest.mark.parametrize("offset", [1e4, -3e5])
def test_rows_far_from_zero(impl: str, device: str, offset: float) -> None:
    """E[x^2] - E[x]^2 would cancel completely. The inputs are exact in every dtype."""
    inputs = random_inputs(21, 768, device)
    inputs["residual"] = (inputs["residual"] * 64).round() / 64 + offset
    inputs["x"] = (inputs["x"] * 64).round() / 64
    inputs["x_bias"] = torch.zeros(768, device=device)
    ours, reference = functions(impl, 0.0)
    assert_three_way(three_way(ours, reference, inputs, torch.float32, (torch.randn(21, 768, device=device),)))
    out = ours(**inputs)
    truth = reference(**{name: x.double() for name, x in inputs.items()})
    assert (out - truth).abs().max() < 4 * torch.finfo(torch.float32).eps * abs(offset)


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_a_nan_stays_in_its_row(impl: str, device: str) -> None:
    inputs = random_inputs(4, 40, device, x_bias=False)
    inputs["x"][2, 39] = float("nan")
    out = add_layer_norm(**inputs, impl=impl)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_compiles_whole_with_a_state_drawn_inside(impl: str, device: str, compile_backend: str) -> None:
    inputs = random_inputs(5, 200, device)
    inputs["residual"].zero_()
    out = torch.compile(add_layer_norm, fullgraph=True, backend=compile_backend)(**inputs, dropout_p=0.1, impl=impl)
    assert out.isfinite().all()
    assert not torch.equal(out, add_layer_norm(**inputs, impl=impl))


@pytest.mark.parametrize("impl", [impl for impl, _ in targets(OP) if impl == "cpu"])
def test_operators_check_for_themselves(impl: str) -> None:
    """The kernels refuse what would make them read out of bounds, as the public function does."""
    x, residual, weight, bias, x_bias = random_inputs(5, 24).values()
    fwd = operators(impl).add_layer_norm_fwd
    with pytest.raises(RuntimeError, match="residual has size 4 in dimension 0; expected 5"):
        fwd(x, residual[:-1], weight, bias, x_bias, 0.0, 1e-12, None)
    with pytest.raises(RuntimeError, match="bias has size 23 in dimension 0; expected 24"):
        fwd(x, residual, weight, bias[:-1], x_bias, 0.0, 1e-12, None)
    with pytest.raises(RuntimeError, match="dropout_p > 0 needs rng_state"):
        fwd(x, residual, weight, bias, x_bias, 0.1, 1e-12, None)
    with pytest.raises(RuntimeError, match="rng_state: expected int64"):
        fwd(x, residual, weight, bias, x_bias, 0.1, 1e-12, rng_state("cpu").float())
