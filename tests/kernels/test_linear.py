"""linear: every implementation and every CPU backend against the reference, forward and backward."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import available_impls, linear
from bert_fast.kernels._common import extensions
from bert_fast.kernels._common.row_buckets import bucket, pad_rows
from bert_fast.kernels.linear import cpu_backends
from bert_fast.kernels.linear.cpu_backends import Backends
from bert_fast.kernels.linear.reference import linear_reference
from bert_fast.testing import assert_three_way, targets, three_way

# Rows: none, one, fewer and more than a vector, not a multiple of one, of tiles. K and N odd, below and above oneDNN's
# blocks and our own.
SHAPES = [(0, 8, 16), (1, 1, 40), (3, 7, 33), (65, 96, 50), (130, 128, 512), (13, 1601, 131)]
INTERPRETED_SHAPES = [(0, 8, 16), (3, 7, 33)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The backends that run on this CPU, whatever the table chooses; oneDNN's bfloat16 needs BF16 instructions, for which
# it is the choice in training.
BACKENDS = [
    (torch.float32, Backends("tiles", "blas")),
    (torch.float32, Backends("blas", "blas")),
    (torch.float32, Backends("onednn", "onednn")),
    (torch.bfloat16, Backends("tiles", "float32")),
]
if cpu_backends.BACKENDS[torch.bfloat16].training == "onednn":
    BACKENDS.append((torch.bfloat16, Backends("onednn", "onednn")))


def backend_id(backend: tuple[torch.dtype, Backends]) -> str:
    return "-".join((str(backend[0]).removeprefix("torch."), *backend[1]))


@pytest.fixture(params=BACKENDS, ids=backend_id)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.dtype, Backends]:
    """A dtype and the backends that it runs on, whatever the table chooses on this CPU."""
    monkeypatch.setitem(cpu_backends.BACKENDS, *request.param)
    dtype, backends = request.param
    return dtype, backends


def random_inputs(rows: int, width: int, columns: int, device: str = "cpu") -> dict[str, Tensor]:
    return {
        "x": torch.randn(rows, width, device=device),
        "weight": torch.randn(columns, width, device=device) * width**-0.5,
        "bias": torch.randn(columns, device=device),
    }


def check(impl: str, dtype: torch.dtype, inputs: dict[str, Tensor], activation: str | None) -> None:
    """The three-way test, forward and every gradient, and forward once more without gradients."""
    dout = torch.randn(inputs["x"].shape[0], inputs["weight"].shape[0], device=inputs["x"].device)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(x, weight, bias, activation=activation, impl=impl)

    def in_inference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.no_grad():
            out = ours(x, weight, bias)
        return out + 0 * ours(x, weight, bias)

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_reference(x, (weight,), bias, activation)

    # With GeLU there are two ops in sequence, as in a model, hence its factor (DESIGN §4).
    factor = 2.0 if activation is None else 3.0
    # In float32 the whole error is the order of additions, in eager PyTorch too, and which order is better is luck. A
    # sum of K products of random sign grows as sqrt(k), and its k-th addition rounds by eps * sqrt(k / 12) on average
    # (uniform within half a unit): in all eps * sqrt(K^2 / 24), that is sqrt(K / 24) units of a typical sum. Over
    # thousands of sums the worst error and the largest value are both about four times the typical one.
    terms = max(inputs["weight"].shape + inputs["x"].shape)
    floor = max(1.0, (terms / 24) ** 0.5) if dtype == torch.float32 else 1.0
    for function, rows in ((ours, 4), (in_inference, 1)):
        comparisons = three_way(function, reference, inputs, dtype, (dout,), factor=factor, floor_ulps=floor)
        assert_three_way(comparisons[:rows])


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize(
    ("impl", "device", "dtype", "rows", "width", "columns"),
    targets("linear", SHAPES, interpreted=INTERPRETED_SHAPES, dtypes=DTYPES),
    ids=str,
)
def test_matches_reference(
    impl: str,
    device: str,
    dtype: torch.dtype,
    rows: int,
    width: int,
    columns: int,
    activation: str | None,
    poisoned_empty: None,
) -> None:
    check(impl, dtype, random_inputs(rows, width, columns, device), activation)


@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_backend_matches_reference(
    backend: tuple[torch.dtype, Backends], shape: tuple[int, int, int], activation: str | None, poisoned_empty: None
) -> None:
    check("cpu", backend[0], random_inputs(*shape), activation)


def test_several_weights_are_one(backend: tuple[torch.dtype, Backends]) -> None:
    inputs = {name: x.to(backend[0]) for name, x in random_inputs(37, 24, 30).items()}
    x, weight, bias = inputs.values()
    parts = [weight[:7].clone(), weight[7:10].clone(), weight[10:].clone()]
    expected = linear(x, weight, bias, activation="gelu", impl="cpu")
    for training in (False, True):
        leaves = [part.clone().requires_grad_(training) for part in parts]
        out = linear(x, leaves, bias, activation="gelu", impl="cpu")
        # Product, bias and GeLU are rounded once each, and in training elsewhere than in inference.
        assert torch.allclose(out, expected, rtol=0, atol=3 * torch.finfo(backend[0]).eps * float(expected.abs().max()))
        assert out.requires_grad == training


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference with the compiled matrix product in both dtypes."""
    monkeypatch.setitem(cpu_backends.BACKENDS, torch.float32, Backends("tiles", "blas"))
    monkeypatch.setitem(cpu_backends.BACKENDS, torch.bfloat16, Backends("tiles", "float32"))


def has_bf16_dot() -> bool:
    """Whether the tiles multiply pairs of bfloat16, so that a float32 weight is rounded."""
    return extensions.cpu_isa() == "avx512bf16"


def test_bfloat16_by_tiles_rounds_once(tiles: None) -> None:
    """The sums are float32's and the result is the exact one, rounded; a float32 weight is rounded to pairs only."""
    inputs = {name: x.bfloat16() for name, x in random_inputs(33, 700, 40).items()}
    precise = inputs["weight"].float() + (0 if has_bf16_dot() else 1e-3)
    for weight in (inputs["weight"], precise):
        out = linear(inputs["x"], weight, inputs["bias"], activation="gelu", impl="cpu")
        exact = linear_reference(inputs["x"].double(), (weight.double(),), inputs["bias"], "gelu")
        unit = 2.0 ** (exact.abs().clamp(min=2**-20).log2().floor() - 7)
        # Half a unit of bfloat16, and the sum's own error: sqrt(700) roundings of float32 at a size of about 1.
        assert ((out.double() - exact).abs() <= 0.5 * unit + 700**0.5 * torch.finfo(torch.float32).eps).all()


# What the table chooses for inference on some CPU. MKL's order of additions depends on the number of rows, so BLAS
# backends are not among them; oneDNN's depends on it for float32 in torch 2.11, and no CPU takes it for that.
INFERENCE = {(rule.dtype, rule.backends.inference) for rule in cpu_backends.TABLE if rule.backends.inference != "blas"}


@pytest.mark.parametrize(("width", "columns"), [(801, 70), (3072, 96)])
@pytest.mark.parametrize(
    "backend",
    [backend for backend in BACKENDS if (backend[0], backend[1].inference) in INFERENCE],
    ids=backend_id,
    indirect=True,
)
def test_same_bits_whatever_the_other_rows(
    backend: tuple[torch.dtype, Backends], width: int, columns: int, poisoned_empty: None
) -> None:
    """A row's bits depend on the row alone: single, at the end of a tile, in another block, in a padded bucket."""
    x, weight, bias = (part.to(backend[0]) for part in random_inputs(700, width, columns).values())
    with torch.no_grad():
        out = linear(x, weight, bias, activation="gelu", impl="cpu")
        few = [(5, 5 + rows) for rows in range(1, 18)]
        for first, last in ((0, 1), (699, 700), (250, 256), (17, 690), (100, 229), (0, 257), *few):
            rows = linear(x[first:last], weight, bias, activation="gelu", impl="cpu")
            assert rows.shape == (last - first, columns)
            assert torch.equal(rows, out[first:last]), (first, last)


# Terms, rows and columns: none, one, a pass of 256 or of 512 and a rest, odd ones (the last pair of bfloat16 has one
# number); a group of 24 or 48 rows and a block of 252, a panel and a block of 256 columns, with tails.
GRADIENT_SHAPES = [(0, 3, 5), (1, 1, 1), (5, 7, 9), (33, 50, 70), (257, 300, 200), (601, 97, 293), (1030, 64, 384)]


@pytest.mark.skipif(not available_impls()["linear"]["cpu"].ok, reason="the compiled kernels are absent")
@pytest.mark.parametrize("dtypes", list(product(DTYPES[:2], repeat=2))[0:1] + list(product(DTYPES[1:2], DTYPES[:2])))
@pytest.mark.parametrize("shape", GRADIENT_SHAPES, ids=str)
def test_products_of_the_gradients(shape: tuple[int, int, int], dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """dx = dout W and dW = dout^T x, or added to dW: at most twice the error of torch's, and the rounding of a result.

    Strided inputs, an output that was NaN, the same bits with another number of threads."""
    terms, rows, columns = shape
    dtype, weight_dtype = dtypes
    dout = torch.randn(rows, terms).to(dtype).t()
    x = torch.randn(terms, 2 * columns).to(dtype)[:, ::2]
    weight = torch.randn(rows, columns).to(dtype).to(weight_dtype)
    ops = torch.ops.bert_fast

    def run() -> list[Tensor]:
        dweight, total = torch.full((rows, columns), torch.nan, dtype=weight_dtype), torch.ones_like(weight)
        ops.linear_dweight(dout, x, dweight, False)
        ops.linear_dweight(dout, x, total, True)
        return [ops.linear_dx(dout, weight), dweight, total]

    wide_dout, wide_x, wide_weight = dout.double(), x.double(), weight.double()
    exact = [wide_dout @ wide_weight, wide_dout.t() @ wide_x, 1 + wide_dout.t() @ wide_x]
    theirs = [dout @ weight.to(dtype), (dout.t() @ x).to(weight_dtype), 1 + (dout.t() @ x).to(weight_dtype)]
    threads = torch.get_num_threads()
    results = run()
    torch.set_num_threads(1 if threads > 1 else 2)
    again = run()
    torch.set_num_threads(threads)
    for ours, other, expected, repeated in zip(results, theirs, exact, again, strict=True):
        assert torch.equal(ours, repeated)
        bound = 2 * (other - expected).abs().amax() if expected.numel() else 0.0
        floor = torch.finfo(ours.dtype).eps * expected.abs().amax() if expected.numel() else 0.0
        assert ((ours - expected).abs() <= bound + floor).all()


def test_row_buckets() -> None:
    sizes = [bucket(rows) for rows in range(1, 8193)]
    assert len(set(sizes)) == 32 + 6 * 16
    for rows, size in enumerate(sizes, 1):
        assert 0 <= size - rows < max(4, rows / 16)
    x = torch.randn(131, 7)
    padded = pad_rows(x)
    assert torch.equal(padded, torch.cat([x, torch.zeros(5, 7)]))
    assert pad_rows(padded) is padded


@pytest.mark.parametrize("width", [1, 9, 32, 33, 47, 64, 801])
def test_packed_panels_hold_the_weight(width: int) -> None:
    weight, pack = torch.randn(70, width), torch.ops.bert_fast.linear_pack
    packed = pack(weight, False)
    panels, depth, panel = packed.shape
    assert (depth, panels) == (width, -(-70 // panel))
    rows = packed.transpose(1, 2).reshape(-1, width)
    assert torch.equal(rows[:70], weight)
    assert not rows[70:].any()
    assert torch.equal(pack(weight.T.contiguous().T.bfloat16(), False), packed.bfloat16().float())
    for_bf16 = pack(weight, True)
    assert torch.equal(pack(weight.bfloat16(), True), for_bf16.bfloat16().to(for_bf16.dtype))
    if not has_bf16_dot():
        assert torch.equal(for_bf16, packed)
        return
    assert for_bf16.shape == (panels, -(-width // 2), panel, 2)
    rows = for_bf16.transpose(1, 2).reshape(panels * panel, -1)
    assert torch.equal(rows[:70, :width], weight.bfloat16())
    assert not rows[70:].any()
    assert not rows[:, width:].any()


@pytest.mark.parametrize("rows", [1, 5, 12, 37, 600])
@pytest.mark.parametrize("width", [1, 33, 64, 1601])
def test_every_layout_of_bfloat16_rows(tiles: None, rows: int, width: int, poisoned_empty: None) -> None:
    """Rows at odd addresses and with odd strides, and weights packed ahead and in the call: the same bits."""
    weight = torch.randn(70, width).bfloat16()
    x = torch.randn(rows, width).bfloat16()
    expected = (x.double() @ weight.double().T).float()
    packed = torch.ops.bert_fast.linear_pack(weight, True)
    views = [x]
    for start, stride in ((1, width + 3), (2, width + 4), (3, width + 6)):
        views.append(torch.zeros(rows * stride + start, dtype=x.dtype).as_strided((rows, width), (stride, 1), start))
        views[-1].copy_(x)
    views.append(x.T.contiguous().T)
    outs = [torch.ops.bert_fast.linear_unpacked(view, [weight], None, 0) for view in views]
    outs += [torch.ops.bert_fast.linear_tiles(view, packed, 70, None, 0) for view in views]
    outs += [torch.ops.bert_fast.linear_unpacked(x, [weight[:33].clone(), weight[33:].float().bfloat16()], None, 0)]
    if has_bf16_dot():
        outs.append(torch.ops.bert_fast.linear_unpacked(x, [weight.float()], None, 0))
    assert all(torch.equal(out, outs[0]) for out in outs[1:])
    # Rounded once to bfloat16, after a float32 sum of `width` terms.
    scale = float(expected.abs().max())
    assert torch.allclose(outs[0].float(), expected, rtol=2**-8, atol=scale * width**0.5 * 2**-23)


def test_same_bits_again_and_with_other_thread_counts(backend: tuple[torch.dtype, Backends]) -> None:
    inputs = [x.to(backend[0]) for x in random_inputs(301, 96, 77).values()]
    threads = torch.get_num_threads()

    def run() -> list[Tensor]:
        with torch.no_grad():
            inference = linear(*inputs, activation="gelu", impl="cpu")
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = linear(*leaves, activation="gelu", impl="cpu")
        return [inference, out.detach(), *torch.autograd.grad(out.sum(), leaves)]

    first, again = run(), run()
    torch.set_num_threads(1)
    alone = run()
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, again, alone, strict=True))


def test_opcheck(backend: tuple[torch.dtype, Backends]) -> None:
    x, weight, bias = (x.to(backend[0]) for x in random_inputs(5, 24, 16).values())
    x, weight = x.requires_grad_(), weight.requires_grad_()
    ops = torch.ops.bert_fast
    torch.library.opcheck(ops.linear_fwd.default, (x, weight, False))
    torch.library.opcheck(ops.linear_fwd.default, (x.detach(), weight.detach(), True))
    dout = torch.randn(5, 16).to(backend[0])
    for needs in ([True, True], [True, False], [False, True]):
        torch.library.opcheck(ops.linear_bwd.default, (dout, x.detach(), weight.detach(), needs))
    torch.library.opcheck(ops.linear_dx.default, (dout, weight.detach()))
    torch.library.opcheck(ops.linear_dweight.default, (dout, x.detach(), weight.detach().clone(), True))
    of_bf16 = backend[0] == torch.bfloat16
    torch.library.opcheck(ops.linear_pack.default, (weight.detach(), of_bf16))
    packed = ops.linear_pack(weight.detach(), of_bf16)
    for activation, shift in ((0, None), (1, bias.detach()), (2, bias.detach().float())):
        torch.library.opcheck(ops.linear_tiles.default, (x.detach(), packed, 16, shift, activation))


def test_the_table_has_a_rule_for_every_cpu() -> None:
    assert {row.dtype for row in cpu_backends.TABLE if not row.isa and not row.needs} == {
        torch.float32,
        torch.bfloat16,
    }
    assert all(any(character.isdigit() for character in row.measured) for row in cpu_backends.TABLE)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(3, 0, 5), (3, 8, 0), (0, 0, 0)], ids=str)
def test_empty_dimensions(backend: tuple[torch.dtype, Backends], shape: tuple[int, int, int], training: bool) -> None:
    """A sum of no terms is 0; the bias remains."""
    inputs = {name: x.to(backend[0]) for name, x in zip(("x", "weight", "bias"), _empty(*shape), strict=True)}
    leaves = {name: x.requires_grad_(training) for name, x in inputs.items()}
    out = linear(*leaves.values(), impl="cpu")
    assert torch.equal(out, inputs["bias"].expand(shape[0], -1))
    if training:
        gradients = torch.autograd.grad(out.sum(), list(leaves.values()))
        assert [x.shape for x in gradients] == [x.shape for x in inputs.values()]
        assert not gradients[0].any()
        assert not gradients[1].any()
        assert torch.equal(gradients[2], torch.full_like(inputs["bias"], shape[0]))


def _empty(rows: int, width: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rows, width), torch.randn(columns, width), torch.randn(columns)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_parameters_of_any_dtype(impl: str, training: bool, autocast: bool) -> None:
    """With and without autocast, whose rules for float64 are others."""
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.float16]
    for dtype, weight_dtype, bias_dtype in product(dtypes[:2], dtypes, dtypes):
        x, weight, bias = random_inputs(3, 8, 5).values()
        x, weight, bias = x.to(dtype), weight.to(weight_dtype), bias.to(bias_dtype)
        expected = linear_reference(x.double(), (weight.double(),), bias.double(), "gelu")
        leaves = [part.requires_grad_(training) for part in (weight, bias)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = linear(x, *leaves, activation="gelu", impl=impl)
        assert out.dtype == (torch.bfloat16 if autocast else dtype)
        # Operands, product, bias and GeLU are rounded once each, at values of up to 4.
        eps = torch.finfo(
            torch.bfloat16 if torch.bfloat16 in (out.dtype, weight_dtype, bias_dtype) else torch.float16
        ).eps
        assert torch.allclose(out.double(), expected, rtol=0, atol=12 * eps), (dtype, weight_dtype, bias_dtype)
        if training:
            gradients = torch.autograd.grad(out.sum(), leaves)
            assert [x.dtype for x in gradients] == [weight_dtype, bias_dtype]
