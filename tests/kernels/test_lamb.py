"""lamb: the step against a slow scalar twin in plain Python, and the cases in which a norm is zero."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import ImplUnavailableError, available_impls, clip_scale, lamb_step
from bert_fast.testing import max_error

SHAPES = [(1,), (7,), (5, 3), (2, 3, 4)]


def impls() -> list[str]:
    return [impl for impl, found in available_impls()["lamb"].items() if found.ok]


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


def run(
    impl: str, weights: list[Tensor], gradients: list[list[Tensor]], dtype: torch.dtype, **settings: object
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    params = [w.to(dtype, copy=True) for w in weights]
    moments = [[torch.zeros_like(w, dtype=torch.promote_types(dtype, torch.float32)) for w in params] for _ in range(2)]
    for step, grads in enumerate(gradients, start=1):
        lamb_step(params, [g.to(dtype) for g in grads], *moments, step=step, impl=impl, **settings)  # type: ignore[arg-type]
    return params, *moments


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)], ids=str)
def test_equals_the_scalar_twin(impl: str, weight_decay: float, dtype: torch.dtype, tolerance: float) -> None:
    """Twelve steps; the tolerance is relative: rounding of the dtype times the steps."""
    weights = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    gradients = [[torch.randn(shape, dtype=torch.float64) for shape in SHAPES] for _ in range(12)]
    settings = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    found = run(impl, weights, gradients, dtype, **settings)
    for index, weight in enumerate(weights):
        slow = scalar_lamb(weight.flatten().tolist(), [g[index].flatten().tolist() for g in gradients], **settings)  # type: ignore[arg-type]
        for ours, expected in zip((part[index] for part in found), slow, strict=True):
            truth = torch.tensor(expected, dtype=torch.float64).view(weight.shape)
            assert max_error(ours, truth) <= tolerance * max(1.0, truth.abs().max().item())


@pytest.mark.parametrize("impl", impls())
def test_first_step_by_hand(impl: str) -> None:
    """After one step the corrected moments are g and g^2, so the update is the sign of g, and w moves by lr |w|."""
    w, g = torch.tensor([3.0, 4.0]), torch.tensor([0.5, -2.0])
    moments = torch.zeros(2), torch.zeros(2)
    lamb_step([w], [g], [moments[0]], [moments[1]], step=1, lr=0.1, eps=0.0, weight_decay=0.0, impl=impl)
    step = 0.1 * 5.0 / math.sqrt(2.0)
    assert torch.allclose(w, torch.tensor([3.0 - step, 4.0 + step]), rtol=1e-6)
    assert torch.allclose(moments[0], 0.1 * g, rtol=1e-6)
    assert torch.allclose(moments[1], 0.001 * g * g, rtol=1e-5)


@pytest.mark.parametrize("impl", impls())
def test_trust_ratio_is_per_tensor(impl: str) -> None:
    """Each tensor moves by lr |w| whatever the size of its gradient or of the other tensors."""
    weights = [torch.randn(6) * size for size in (1e-3, 1.0, 1e3)]
    gradients = [torch.randn(6) * size for size in (1e4, 1.0, 1e-2)]
    before = [w.clone() for w in weights]
    moments = [[torch.zeros(6) for _ in weights] for _ in range(2)]
    lamb_step(weights, gradients, *moments, step=1, lr=0.25, weight_decay=0.3, impl=impl)
    for new, old in zip(weights, before, strict=True):
        assert (new - old).norm().item() == pytest.approx(0.25 * old.norm().item(), rel=1e-5)


@pytest.mark.parametrize("impl", impls())
@pytest.mark.parametrize("case", ["zero weight", "zero update", "both zero", "empty tensor"])
def test_zero_norms_give_a_ratio_of_one(impl: str, case: str) -> None:
    size = 0 if case == "empty tensor" else 3
    w = torch.zeros(size) if case in ("zero weight", "both zero") else torch.ones(size)
    g = torch.ones(size) if case == "zero weight" else torch.zeros(size)
    expected = w - 0.5 * g / (1.0 + 1e-6)  # Adam's first step: the ratio is 1
    lamb_step([w], [g], [torch.zeros(size)], [torch.zeros(size)], step=1, lr=0.5, weight_decay=0.0, impl=impl)
    assert torch.allclose(w, expected, rtol=1e-6)
    assert w.isfinite().all()


@pytest.mark.parametrize("impl", impls())
def test_bfloat16_weights_with_float32_moments(impl: str) -> None:
    """The step is computed in float32 and only its result is rounded to the weight's dtype."""
    weight, gradient = torch.randn(64).bfloat16(), torch.randn(64).bfloat16()
    low = run(impl, [weight], [[gradient]], torch.bfloat16, lr=0.1)
    full = run(impl, [weight.float()], [[gradient.float()]], torch.float32, lr=0.1)
    assert low[1][0].dtype == torch.float32
    assert torch.equal(low[1][0], full[1][0])
    assert torch.equal(low[0][0], full[0][0].bfloat16())


@pytest.mark.parametrize("impl", impls())
def test_step_and_lr_may_be_tensors(impl: str) -> None:
    weights, gradients = [torch.randn(9)], [torch.randn(9)]
    found = []
    for step, lr in ((5, 0.03), (torch.tensor(5), torch.tensor(0.03)), (torch.tensor(5.0), 0.03)):
        params, moments = [weights[0].clone()], (torch.ones(9), torch.ones(9))
        lamb_step(params, gradients, [moments[0]], [moments[1]], step=step, lr=lr, impl=impl)
        found.append(params[0])
    assert all(torch.allclose(found[0], other, rtol=1e-6) for other in found[1:])
    assert not torch.equal(found[0], weights[0])


@pytest.mark.parametrize("impl", impls())
def test_clipping_is_a_factor_and_leaves_the_gradients(impl: str) -> None:
    weights = [torch.randn(4), torch.randn(3, 2)]
    gradients = [10 * torch.randn(4), 10 * torch.randn(3, 2)]
    kept = [g.clone() for g in gradients]
    norm, scale = clip_scale(gradients, 0.5)
    assert norm.item() == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-6)
    assert scale.item() == pytest.approx(0.5 / norm.item(), rel=1e-6)
    clipped = run(impl, weights, [gradients], torch.float32, lr=0.1, grad_scale=scale)
    by_hand = run(impl, weights, [[g * scale for g in gradients]], torch.float32, lr=0.1)
    for ours, expected in zip(clipped, by_hand, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(gradients, kept, strict=True))


@pytest.mark.parametrize(
    ("gradient", "norm", "scale"),
    [([3.0, 4.0], 5.0, 0.4), ([0.3, 0.4], 0.5, 1.0), ([0.0, 0.0], 0.0, 1.0), ([math.nan, 1.0], math.nan, math.nan)],
    ids=["larger", "smaller", "zero", "nan"],
)
def test_clip_scale(gradient: list[float], norm: float, scale: float) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = clip_scale([torch.tensor(gradient, dtype=dtype)], 2.0)
        expected = torch.tensor([norm, scale])
        assert torch.allclose(
            torch.stack(found), expected, rtol=5e-3 if dtype == torch.bfloat16 else 1e-6, equal_nan=True
        )
        assert found.norm.dtype == torch.float32


def test_bad_input_is_named() -> None:
    w, g, m, v = (torch.randn(3) for _ in range(4))

    def call(params: object = (w,), grads: object = (g,), step: int = 1, **settings: object) -> None:
        lamb_step(params, grads, (m,), (v,), step=step, lr=0.1, **settings)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="grads has 0 tensors; expected 1"):
        call(grads=())
    with pytest.raises(ValueError, match=r"grads\[0\] has shape \(2,\); expected \(3,\)"):
        call(grads=(g[:2],))
    with pytest.raises(TypeError, match=r"params\[0\] is torch\.int64"):
        call(params=(w.long(),))
    with pytest.raises(ValueError, match="step is 0; expected 1 for the first step"):
        call(step=0)
    with pytest.raises(ValueError, match=r"betas is \(0\.9, 1\.0\)"):
        call(betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"weight_decay is -0\.1; expected neither below 0"):
        call(weight_decay=-0.1)
    with pytest.raises(ImplUnavailableError, match=r"lamb: impl='cpu' not built yet"):
        call(impl="cpu")
    with pytest.raises(ValueError, match="grads is empty"):
        clip_scale([], 1.0)
    with pytest.raises(ValueError, match="max_norm is 0"):
        clip_scale([g], 0.0)
    lamb_step([], [], [], [], step=1, lr=0.1)
