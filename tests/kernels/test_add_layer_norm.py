"""add_layer_norm: every implementation against the reference, forward and backward, with and without dropout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import ImplUnavailableError, add_layer_norm
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


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_the_widest_rows(impl: str, device: str, poisoned_empty: None) -> None:
    """8192 columns and just below; in Triton dx_bias has a kernel of its own here, and 9 rows are two parts of sums."""
    ours, reference = functions(impl, 0.1)
    inputs, dout = random_inputs(9, 8190, device), torch.randn(9, 8190, device=device)
    assert_three_way(three_way(ours, reference, inputs, torch.bfloat16, (dout,)))


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_float32_parameters_with_bfloat16_activations(impl: str, device: str) -> None:
    ours, reference = functions(impl, 0.1)
    comparisons = three_way(
        ours,
        reference,
        random_inputs(35, 200, device),
        torch.bfloat16,
        (torch.randn(35, 200, device=device),),
        parameter_dtype=torch.float32,
        parameters=("weight", "bias", "x_bias"),
    )
    assert_three_way(comparisons)


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
def test_draws_its_own_rng_state_from_torchs_generator(impl: str, device: str) -> None:
    inputs = random_inputs(8, 64, device)
    torch.manual_seed(1)
    first, second = (add_layer_norm(**inputs, dropout_p=0.3, impl=impl) for _ in range(2))
    torch.manual_seed(1)
    again = add_layer_norm(**inputs, dropout_p=0.3, impl=impl)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_constant_rows_give_the_bias(impl: str, device: str) -> None:
    """Variance 0: nothing but eps under the root, at values whose square would swamp it."""
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
    """E[x^2] - E[x]^2 would lose every digit here. The values are exact, so the input's rounding plays no part."""
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


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "rows", "cols"),
    targets(OP, [(1301, 259)], interpreted=[(11, 259)], dtypes=DTYPES[:2]),
    ids=str,
)
def test_same_bits_again_and_with_other_thread_counts(
    impl: str, device: str, dtype: torch.dtype, rows: int, cols: int
) -> None:
    inputs = {name: x.to(dtype) for name, x in random_inputs(rows, cols, device).items()}
    dout, state = torch.randn(rows, cols, device=device).to(dtype), rng_state(device)

    def run() -> list[Tensor]:
        leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
        out = add_layer_norm(**leaves, dropout_p=0.1, rng_state=state, impl=impl)
        return [out, *torch.autograd.grad(out, list(leaves.values()), dout)]

    threads = torch.get_num_threads()
    runs = [run(), run()]
    for count in (1, 3):
        torch.set_num_threads(count)
        runs.append(run())
    torch.set_num_threads(threads)
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_strided_inputs_and_gradient(impl: str, device: str) -> None:
    wide, weight, bias = (torch.randn(*shape, device=device) for shape in ((9, 80), (40,), (20,)))
    weight = weight[::2]
    x, residual = (part.requires_grad_() for part in (wide[:, :40:2].detach(), wide[:, 40::2].detach()))
    dout = torch.randn(20, 9, device=device).t()
    out = add_layer_norm(x, residual, weight, bias, impl=impl)
    dense = add_layer_norm(x.contiguous(), residual.contiguous(), weight.contiguous(), bias, impl=impl)
    assert torch.equal(out, dense)
    grads = torch.autograd.grad(out, (x, residual), dout)
    expected = torch.autograd.grad(dense, (x, residual), dout.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize(("impl", "device"), [("reference", "cpu"), *targets(OP)])
def test_autocast(impl: str, device: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in random_inputs(5, 24, device).items()}
    with torch.autocast(device, torch.bfloat16):
        out = add_layer_norm(**inputs, dropout_p=0.1, impl=impl)
    out.sum().backward()
    assert out.dtype == torch.bfloat16
    assert {x.grad.dtype for x in inputs.values() if x.grad is not None} == {torch.float32}
    assert all(x.grad is not None for x in inputs.values())


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_opcheck(impl: str, device: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in random_inputs(5, 24, device).items()}
    x, residual, weight, bias, x_bias = inputs.values()
    for shift, dropout_p, state in ((x_bias, 0.25, rng_state(device)), (None, 0.0, None)):
        torch.library.opcheck(
            operators(impl).add_layer_norm_fwd.default, (x, residual, weight, bias, shift, dropout_p, 1e-12, state)
        )
        mean, rstd = torch.randn(5, device=device), torch.rand(5, device=device)
        detached = [
            x.detach(),
            x.detach(),
            residual.detach(),
            weight.detach(),
            None if shift is None else shift.detach(),
        ]
        torch.library.opcheck(operators(impl).add_layer_norm_bwd.default, (*detached, mean, rstd, dropout_p, state))


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_compiles_whole(impl: str, device: str, compile_backend: str) -> None:
    inputs = {name: x.requires_grad_() for name, x in random_inputs(5, 24, device).items()}
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend=compile_backend)
    options = {"dropout_p": 0.1, "rng_state": rng_state(device), "impl": impl}
    out, expected = compiled(**inputs, **options), add_layer_norm(**inputs, **options)
    assert torch.equal(out, expected)
    dout = torch.randn(5, 24, device=device)
    grads, wanted = (torch.autograd.grad(y, list(inputs.values()), dout) for y in (out, expected))
    assert all(torch.allclose(a, b) for a, b in zip(grads, wanted, strict=True))


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_compiles_whole_with_a_state_drawn_inside(impl: str, device: str, compile_backend: str) -> None:
    inputs = random_inputs(5, 200, device)
    inputs["residual"].zero_()
    out = torch.compile(add_layer_norm, fullgraph=True, backend=compile_backend)(**inputs, dropout_p=0.1, impl=impl)
    assert out.isfinite().all()
    assert not torch.equal(out, add_layer_norm(**inputs, impl=impl))


def test_runs_in_float64() -> None:
    inputs = {name: x.double() for name, x in random_inputs(3, 12).items()}
    assert torch.equal(add_layer_norm(**inputs), functions("reference", 0.0)[1](**inputs))


def test_bad_input_is_named() -> None:
    inputs = random_inputs(5, 24)

    def call(**changed: object) -> Tensor:
        return add_layer_norm(**(inputs | changed))  # type: ignore[arg-type]

    with pytest.raises(ValueError, match=r"x has shape \(24,\); expected \(T, E\)"):
        call(x=inputs["x"][0])
    with pytest.raises(ValueError, match=r"residual has shape \(4, 24\); expected \(5, 24\)"):
        call(residual=inputs["residual"][:-1])
    with pytest.raises(ValueError, match=r"x_bias has shape \(23,\); expected \(24,\)"):
        call(x_bias=inputs["x_bias"][:-1])
    with pytest.raises(TypeError, match=r"x is torch\.int64; expected a floating-point tensor"):
        call(x=inputs["x"].long())
    with pytest.raises(
        TypeError, match=r"residual is torch\.bfloat16; expected torch\.float32, the dtype of the first"
    ):
        call(residual=inputs["residual"].bfloat16())
    with pytest.raises(ValueError, match=r"weight is on meta; expected cpu"):
        call(weight=inputs["weight"].to("meta"))
    with pytest.raises(ValueError, match=r"dropout_p is 1\.0; expected 0 or a probability from 1/512 to 511/512"):
        call(dropout_p=1.0)
    with pytest.raises(ValueError, match=r"eps is 0\.0; expected a positive number"):
        call(eps=0.0)
    with pytest.raises(ValueError, match=r"rng_state has shape \(3,\); expected \(2,\)"):
        call(dropout_p=0.1, rng_state=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"rng_state is torch\.int32; expected torch\.int64"):
        call(dropout_p=0.1, rng_state=torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("impl", [impl for impl, _ in targets(OP) if impl == "cpu"])
def test_operators_check_for_themselves(impl: str) -> None:
    """What the door would refuse can't make a kernel read out of bounds either."""
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


@pytest.mark.parametrize(("impl", "device"), targets(OP))
def test_explicit_request_never_falls_back(impl: str, device: str) -> None:
    x, residual, weight, bias, _ = (parameter.double() for parameter in random_inputs(5, 24, device).values())
    if impl != "reference":
        with pytest.raises(ImplUnavailableError, match=r"takes float32, bfloat16.*; the input is torch\.float64"):
            add_layer_norm(x, residual, weight, bias, impl=impl)
    if impl == "triton":
        with pytest.raises(ValueError, match=r"dropout_p is 0\.1 and rng_state is None; expected an int64 \(2,\)"):
            operators(impl).add_layer_norm_fwd(x.float(), residual.float(), weight, bias, None, 0.1, 1e-12, None)
