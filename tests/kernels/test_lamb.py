"""lamb: the step compared with scalar Python code, and the cases in which a norm is zero."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import ImplUnavailableError, clip_scale, lamb_step
from bert_fast.kernels.lamb.reference import lamb_step_reference
from bert_fast.testing import assert_three_way, compare, max_error, targets

SHAPES = [(1,), (7,), (5, 3), (2, 3, 4)]
# The reference is tested too: all are compared with numbers computed one at a time.
TARGETS = [("reference", "cpu"), *targets("lamb")]
TRITON = [target for target in targets("lamb") if target[0] == "triton"]
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-5}


def scalar_lamb(
    w: list[float],
    gradients: list[list[float]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> tuple[list[float], list[float], list[float]]:
    """LAMB of one tensor, a number at a time: the weights and both moments after all `gradients`."""
    m, v = [0.0] * len(w), [0.0] * len(w)
    for step, gradient in enumerate(gradients, start=1):
        update = []
        for i, raw in enumerate(gradient):
            g = raw * grad_scale
            m[i] = betas[0] * m[i] + (1 - betas[0]) * g
            v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
            mean, square = m[i] / (1 - betas[0] ** step), v[i] / (1 - betas[1] ** step)
            update.append(mean / (math.sqrt(square) + eps) + weight_decay * w[i])
        size, length = math.hypot(*w), math.hypot(*update)
        ratio = size / length if size > 0 and length > 0 else 1.0
        w = [x - lr * ratio * u for x, u in zip(w, update, strict=True)]
    return w, m, v


def assert_close(a: Tensor, b: Tensor, impl: str, tolerance: float) -> None:
    """Equal bits for the reference; compilers of the kernels may round elsewhere."""
    if impl != "reference":
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance * b.abs().max().item())
    else:
        assert torch.equal(a, b)


def run(
    impl: str, weights: list[Tensor], gradients: list[list[Tensor]], dtype: torch.dtype, **settings: object
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params = [w.to(dtype, copy=True) for w in weights]
    moments = [[torch.zeros_like(w, dtype=torch.promote_types(dtype, torch.float32)) for w in params] for _ in range(2)]
    for step, grads in enumerate(gradients, start=1):
        lamb_step(params, [g.to(dtype) for g in grads], *moments, step=step, impl=impl, **settings)  # type: ignore[arg-type]
    return params, *moments


@pytest.mark.parametrize(
    ("impl", "device", "dtype", "steps"),
    [
        *(("reference", "cpu", dtype, 12) for dtype in TOLERANCE),
        *targets("lamb", [(12,)], interpreted=[(4,)], dtypes=list(TOLERANCE)),
    ],
    ids=str,
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_the_scalar_twin(impl: str, device: str, dtype: torch.dtype, steps: int, weight_decay: float) -> None:
    """The tolerance is relative: rounding of the dtype times the steps."""
    weights = [torch.randn(shape, dtype=torch.float64, device=device) for shape in SHAPES]
    gradients = [[torch.randn_like(w) for w in weights] for _ in range(steps)]
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    results = run(impl, weights, gradients, dtype, **settings)
    for index, weight in enumerate(weights):
        slow = scalar_lamb(weight.flatten().tolist(), [g[index].flatten().tolist() for g in gradients], **settings)  # type: ignore[arg-type]
        for ours, expected in zip((part[index] for part in results), slow, strict=True):
            truth = torch.tensor(expected, dtype=torch.float64, device=device).view(weight.shape)
            assert max_error(ours, truth) <= TOLERANCE[dtype] * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_first_step_by_hand(impl: str, device: str) -> None:
    """After one step the corrected moments are g and g^2, so the update is the sign of g, and w moves by lr |w|."""
    w, g = torch.tensor([[3.0, 4.0], [0.5, -2.0]], device=device)
    moments = torch.zeros(2, 2, device=device)
    lamb_step([w], [g], [moments[0]], [moments[1]], step=1, lr=0.1, eps=0.0, weight_decay=0.0, impl=impl)
    step = 0.1 * 5.0 / math.sqrt(2.0)
    # float32: some operations on each number, half an eps (6e-8) each.
    assert torch.allclose(w, w.new_tensor([3.0 - step, 4.0 + step]), rtol=1e-6)
    assert torch.allclose(moments[0], 0.1 * g, rtol=1e-6)
    # A 1 - beta2 that is computed in float32 would be off by 1.3e-5.
    assert torch.allclose(moments[1], 0.001 * g * g, rtol=1e-5)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_trust_ratio_is_per_tensor(impl: str, device: str) -> None:
    """Each tensor moves by lr |w| whatever the size of its gradient or of the other tensors."""
    weights = [torch.randn(6, device=device) * size for size in (1e-3, 1.0, 1e3)]
    gradients = [torch.randn(6, device=device) * size for size in (1e4, 1.0, 1e-2)]
    before = [w.clone() for w in weights]
    moments = [[torch.zeros(6, device=device) for _ in weights] for _ in range(2)]
    lamb_step(weights, gradients, *moments, step=1, lr=0.25, weight_decay=0.3, impl=impl)
    for new, old in zip(weights, before, strict=True):
        # The step is a quarter of w: half an eps of w (6e-8) is 2.4e-7 of the step.
        assert (new - old).norm().item() == pytest.approx(0.25 * old.norm().item(), rel=1e-5)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
@pytest.mark.parametrize("case", ["zero weight", "zero update", "both zero", "empty tensor"])
def test_zero_norms_give_a_ratio_of_one(impl: str, device: str, case: str) -> None:
    size = 0 if case == "empty tensor" else 3
    w = torch.full((size,), 0.0 if case in ("zero weight", "both zero") else 1.0, device=device)
    g = torch.full((size,), 1.0 if case == "zero weight" else 0.0, device=device)
    expected = w - 0.5 * g / (1.0 + 1e-6)  # Adam's first step: the ratio is 1
    moments = torch.zeros(2, size, device=device)
    lamb_step([w], [g], [moments[0]], [moments[1]], step=1, lr=0.5, weight_decay=0.0, impl=impl)
    # About ten float32 operations on each number, half an eps (6e-8) each.
    assert torch.allclose(w, expected, rtol=1e-6)
    assert w.isfinite().all()


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_bfloat16_weights_with_float32_moments(impl: str, device: str) -> None:
    """The step is computed in float32 and only its result is rounded to the weight's dtype."""
    weight, gradient = torch.randn(2, 64, device=device).bfloat16()
    low = run(impl, [weight], [[gradient]], torch.bfloat16, lr=0.1)
    full = run(impl, [weight.float()], [[gradient.float()]], torch.float32, lr=0.1)
    assert low[1][0].dtype == torch.float32
    assert torch.equal(low[1][0], full[1][0])
    # In Triton one unit in the last place: the two may add up their norms in another order on a GPU, and the
    # interpreter truncates where a GPU rounds.
    assert_close(low[0][0], full[0][0].bfloat16(), impl, 2.0**-7)


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_step_and_lr_may_be_tensors(impl: str, device: str) -> None:
    weights, gradients = [torch.randn(9, device=device)], [torch.randn(9, device=device)]
    updated = []
    tensors = [torch.tensor(x, device=device) for x in (5, 5.0, 0.03)]
    for step, lr in ((5, 0.03), (tensors[0], tensors[2]), (tensors[1], 0.03), (5, torch.tensor(0.03))):
        params, moments = [weights[0].clone()], torch.ones(2, 9, device=device)
        lamb_step(params, gradients, [moments[0]], [moments[1]], step=step, lr=lr, impl=impl)
        updated.append(params[0])
    # An lr in a tensor is rounded to float32, by half an eps (6e-8) at most, and so is the new w.
    assert all(torch.allclose(updated[0], other, rtol=1e-6) for other in updated[1:])
    assert not torch.equal(updated[0], weights[0])


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_clipping_is_a_factor_and_leaves_the_gradients(impl: str, device: str) -> None:
    weights = [torch.randn(4, device=device), torch.randn(3, 2, device=device)]
    gradients = [10 * torch.randn_like(w) for w in weights]
    originals = [g.clone() for g in gradients]
    norm, scale = clip_scale(gradients, 0.5, impl=impl)
    # float32: the norm of 10 values, and one division; 8 eps (1.2e-7).
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-6)
    assert scale.item() == pytest.approx(0.5 / norm.item(), rel=1e-6)
    clipped = run(impl, weights, [gradients], torch.float32, lr=0.1, grad_scale=scale)
    by_hand = run(impl, weights, [[g * scale for g in gradients]], torch.float32, lr=0.1)
    for ours, expected in zip(clipped, by_hand, strict=True):
        for a, b in zip(ours, expected, strict=True):
            assert_close(a, b, impl, 1e-6)  # on a GPU the factor may go into a fused multiply-add
    assert all(torch.equal(a, b) for a, b in zip(gradients, originals, strict=True))


@pytest.mark.parametrize(
    ("gradient", "norm", "scale"),
    [([3.0, 4.0], 5.0, 0.4), ([0.3, 0.4], 0.5, 1.0), ([0.0, 0.0], 0.0, 1.0), ([math.nan, 1.0], math.nan, math.nan)],
    ids=["larger", "smaller", "zero", "nan"],
)
@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_clip_scale(impl: str, device: str, gradient: list[float], norm: float, scale: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        results = clip_scale([torch.tensor(gradient, dtype=dtype, device=device)], 2.0, impl=impl)
        expected = torch.tensor([norm, scale], device=device)
        # In bfloat16 0.3 and 0.4 are off by at most half an eps, 3.9e-3; the float32 norm of two values by a few 6e-8.
        assert torch.allclose(
            torch.stack(results), expected, rtol=5e-3 if dtype == torch.bfloat16 else 1e-6, equal_nan=True
        )
        assert results.norm.dtype == torch.float32


@pytest.mark.parametrize(("impl", "device"), [target for target in TARGETS if target[0] == "cpu"])
@pytest.mark.parametrize("dtypes", list(product([torch.float32, torch.bfloat16], repeat=4)), ids=str)
def test_any_combination_of_dtypes(impl: str, device: str, dtypes: tuple[torch.dtype, ...]) -> None:
    """Several chunks of 2,048 elements, a vector's tail, a tensor without elements, and strides that differ."""
    shapes = [(40_003,), (0,), (1,), (31, 7)]
    params = [torch.randn(shape, device=device).to(dtypes[0]) for shape in shapes]
    grads = [
        torch.randn(shape[::-1], device=device).to(dtypes[1]).permute(*range(len(shape))[::-1]) for shape in shapes
    ]
    moments = [(0.1 * torch.randn(shape, device=device)).to(dtypes[2]) for shape in shapes]
    squares = [(0.1 + torch.rand(shape, device=device)).to(dtypes[3]) for shape in shapes]
    wide = [[x.double() for x in tensors] for tensors in (params, grads, moments, squares)]
    settings = {"step": 7, "lr": 0.1, "grad_scale": 0.5}
    lamb_step(params, grads, moments, squares, impl=impl, **settings)  # type: ignore[arg-type]
    lamb_step(*wide, impl="reference", **settings)  # type: ignore[arg-type]
    # A moment in bfloat16 is rounded, by half of 7.8e-3, before the update is computed from it.
    low = torch.bfloat16 in dtypes
    for ours, expected in zip((params, moments, squares), (wide[0], *wide[2:]), strict=True):
        for a, b in zip(ours, expected, strict=True):
            assert torch.allclose(a.double(), b, rtol=8e-3 if low else 1e-6, atol=4e-3 if low else 1e-6)


@pytest.mark.parametrize(("impl", "device"), [target for target in TARGETS if target[0] == "cpu"])
def test_same_bits_on_any_number_of_threads_and_a_norm_of_many(impl: str, device: str) -> None:
    """A float32 sum of so many squares would be off by 1e-4."""
    gradient = 1e-3 * torch.randn(3_000_001, device=device)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        params, moments = [torch.ones_like(gradient)], torch.zeros(2, gradient.numel(), device=device)
        norm, scale = clip_scale([gradient, gradient[:5]], 0.5, impl=impl)
        lamb_step(params, [gradient], [moments[0]], [moments[1]], step=1, lr=0.1, grad_scale=scale, impl=impl)
        results.append((params[0], moments, norm))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    exact = torch.cat([gradient, gradient[:5]]).double().norm().item()
    assert norm.item() == pytest.approx(exact, rel=2e-7)


def state(
    sizes: list[tuple[int, ...]], device: str, dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> list[list[Tensor]]:
    """params, grads, exp_avgs and exp_avg_sqs in the middle of training; the dtypes in turn, moments in float32."""
    params = [torch.randn(size, device=device).to(dtypes[i % len(dtypes)]) for i, size in enumerate(sizes)]
    grads = [torch.randn_like(w) for w in params]
    return [params, grads, [g.float() / 2 for g in grads], [g.float().square() + 0.1 for g in grads]]


def stepped(lists: list[list[Tensor]], impl: str, **settings: object) -> list[list[Tensor]]:
    """The lists after one step, on copies that have the strides of the originals."""
    lists = [[x.clone() for x in tensors] for tensors in lists]
    lamb_step(*lists, **{"step": 3, "lr": 0.1, **settings}, impl=impl)  # type: ignore[arg-type]
    return lists


def check_three_way(lists: list[list[Tensor]], outcome: list[list[Tensor]]) -> None:
    """`outcome`, which is one step after `lists`, with the reference in the same dtypes and in float64."""
    eager, truth = ([[x.clone() for x in tensors] for tensors in lists] for _ in range(2))
    truth = [[x.double() for x in tensors] for tensors in truth]
    for twin in (eager, truth):
        lamb_step_reference(*twin, 3, 0.1, (0.9, 0.999), 1e-6, 0.01, 1.0)
    for name, *results in zip(("param", "grad", "exp_avg", "exp_avg_sq"), outcome, eager, truth, strict=True):
        assert_three_way([compare(f"{name}[{i}]", *three) for i, three in enumerate(zip(*results, strict=True))])


# Blocks are of 1,024 elements and chunks of 8,192: one short of a block and of a chunk, exact, one more, and a tensor
# of three chunks with a tail; an empty one among them.
SIZES = [(1023,), (0,), (8, 1024), (8193,), (2, 8500)]


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_tensors_of_many_sizes_in_one_call(impl: str, device: str, poisoned_empty: None) -> None:
    lists = state(SIZES, device)
    check_three_way(lists, stepped(lists, impl))
    grads = [1e3 * g for g in lists[1]]
    norm, scale = clip_scale(grads, 0.5, impl=impl)
    truth = torch.cat([g.double().flatten() for g in grads]).norm().item()
    # float32 sums of 34,000 squares, in blocks: the error is 1e-8.
    assert norm.item() == pytest.approx(truth, rel=1e-6)
    assert scale.item() == pytest.approx(0.5 / truth, rel=1e-6)


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_mixed_dtypes_in_one_call(impl: str, device: str) -> None:
    """Tensors of each dtype are launched together; no dtype's tensors may see those of another."""
    lists = state([(5,), (33,), (7, 3), (130,), (2,)], device, (torch.float32, torch.bfloat16, torch.float16))
    lists[1][0] = lists[1][0].bfloat16()  # a float32 parameter with a bfloat16 gradient
    results = stepped(lists, impl)
    check_three_way(lists, results)
    for index in range(5):
        alone = stepped([tensors[index : index + 1] for tensors in lists], impl)
        assert all(torch.equal(a[0], b[index]) for a, b in zip(alone, results, strict=True))
    truth = torch.cat([g.double().flatten() for g in lists[1]]).norm().item()
    # float32 sums of 191 squares: 8 eps (1.2e-7).
    assert clip_scale(lists[1], 1.0, impl=impl).norm.item() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_any_layout_in_memory(impl: str, device: str) -> None:
    """Dense in another order, strided, of two orders in one parameter, starting at no multiple of 16 bytes."""
    lists = state([(6, 10), (4, 9), (3, 8), (5, 7)], device)
    views = [list(tensors) for tensors in lists]
    for tensors in views:
        tensors[0] = tensors[0].t().contiguous().t()
        tensors[1] = torch.zeros(4, 18, device=device)[:, ::2].copy_(tensors[1])
        tensors[3] = torch.zeros(36, device=device)[1:].view(5, 7).copy_(tensors[3])
    views[1][2] = views[1][2].t().contiguous().t()
    dense = stepped(lists, impl)
    lamb_step(*views, step=3, lr=0.1, impl=impl)
    for results, expected in zip(views, dense, strict=True):  # the gradients, unchanged, among them
        # Another layout sums the norms in another order: a few float32 eps (1.2e-7) of the trust ratio.
        assert all(torch.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in zip(results, expected, strict=True))
    strided = [torch.ones(4, 18, device=device)[:, ::2]]
    assert clip_scale(strided, 1.0, impl=impl).norm.item() == pytest.approx(6.0)


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_moments_may_be_of_low_precision(impl: str, device: str) -> None:
    """Computed in float32 and rounded when stored; the weights follow from the rounded moments."""
    lists = state([(300,)], device)
    lists[2:] = [[x.bfloat16() for x in tensors] for tensors in lists[2:]]
    results = stepped(lists, impl)
    check_three_way(lists, results)
    assert results[2][0].dtype == torch.bfloat16


@pytest.mark.parametrize(("impl", "device"), TARGETS)
def test_nan_stays_in_its_tensor_and_clipping_spreads_it(impl: str, device: str) -> None:
    lists = state([(40,), (30,)], device)
    lists[1][0][7] = float("nan")
    results = stepped(lists, impl)
    assert results[0][0].isnan().nonzero().tolist() == [[7]]
    assert results[0][1].isfinite().all()
    clipped = stepped(lists, impl, grad_scale=clip_scale(lists[1], 1.0, impl=impl).scale)
    assert clipped[0][1].isnan().all()


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_tables_follow_the_tensors(impl: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pointer tables are cached by address for tensors that don't move; the oldest are evicted."""
    from bert_fast.kernels.lamb.triton import tables as triton_tables

    monkeypatch.setattr(triton_tables, "_MAX_TABLES", 3)
    tables = triton_tables._pointers.recent
    tables.clear()
    lists = state([(5,), (6,)], device)
    for _ in range(2):
        lamb_step(*lists, step=3, lr=0.1, impl=impl)
        assert len(tables) == 1
    for _ in range(5):  # new gradients each step, elsewhere in memory
        old = lists[1]
        lists[1] = [torch.randn_like(g) for g in old]
        expected = stepped(lists, "reference")
        lamb_step(*lists, step=3, lr=0.1, impl=impl)
        for a, b in zip(lists[0], expected[0], strict=True):
            # One step of two implementations in float32: the error is 2e-7, two eps.
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    assert len(tables) == 3


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_float64_goes_to_the_reference(impl: str, device: str) -> None:
    lists = [[x.double() for x in tensors] for tensors in state([(3,)], device)]
    with pytest.raises(ImplUnavailableError, match=r"takes float32, bfloat16, float16; the input is torch\.float64"):
        stepped(lists, impl)
    with pytest.raises(ImplUnavailableError, match=r"the input is torch\.float64"):
        clip_scale([lists[1][0].float(), lists[1][0]], 1.0, impl=impl)
    assert all(
        torch.equal(a[0], b[0]) for a, b in zip(stepped(lists, "auto"), stepped(lists, "reference"), strict=True)
    )


@pytest.mark.parametrize(("impl", "device"), TRITON)
def test_inside_torch_compile(impl: str, device: str) -> None:
    """The step reads addresses, so it is a graph break; the code around it is compiled."""
    lists = state([(5,)], device)
    expected = stepped(lists, impl)[0][0] * 2

    def function(w: Tensor, g: Tensor, m: Tensor, v: Tensor) -> Tensor:
        lamb_step([w], [g], [m], [v], step=3, lr=0.1, impl=impl)
        return w * 2

    arguments = [tensors[0].clone() for tensors in lists]
    assert torch.allclose(torch.compile(function, backend="eager")(*arguments), expected)
