"""Lamb as a torch optimizer: parameter groups, global clipping, exact resume, capturable steps."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from bert_fast.kernels import lamb_step
from bert_fast.optim.lamb import Lamb


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)).to(dtype)


def groups(model: nn.Module) -> list[dict[str, object]]:
    """The usual groups of a training script: no decay for vectors (biases and LayerNorm)."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0, "lr": 0.005}]


def train(model: nn.Module, optimizer: Lamb, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        loss = (model(x).float() - x[:, :3].float()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def test_groups_step_like_separate_calls() -> None:
    """Two groups with different settings, clipped by the norm over both."""
    model, twin = network(), network()
    optimizer = Lamb(groups(model), lr=0.02, betas=(0.8, 0.9), max_grad_norm=0.05)
    loss = model(torch.ones(4, 6)).square().sum()
    loss.backward()
    optimizer.step()

    gradients = {name: p.grad for name, p in model.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values() if g is not None]).norm()
    assert optimizer.last_grad_norm is not None
    # float32 sums of 99 squares: 8 eps (1.2e-7).
    assert optimizer.last_grad_norm.item() == pytest.approx(norm.item(), rel=1e-6)
    assert norm > 0.05
    for name, p in twin.named_parameters():
        gradient = gradients[name]
        assert gradient is not None
        settings = {"lr": 0.02, "weight_decay": 0.1} if p.dim() > 1 else {"lr": 0.005, "weight_decay": 0.0}
        moments = [torch.zeros_like(p)], [torch.zeros_like(p)]
        lamb_step([p.data], [gradient * (0.05 / norm)], *moments, step=1, betas=(0.8, 0.9), **settings)
        # float32: the factor of the gradients may be rounded once more; half an eps is 6e-8.
        assert torch.allclose(p, model.get_parameter(name), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_resume_is_exact(dtype: torch.dtype) -> None:
    """Saved after five steps and loaded into a new optimizer: the next five steps have the same bits."""
    model = network(dtype)
    optimizer = Lamb(groups(model), lr=0.02, max_grad_norm=1.0)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    straight = train(model, optimizer, range(5, 10))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(dtype)
    resumed.load_state_dict(saved["model"])
    other = Lamb(groups(resumed), lr=0.7, max_grad_norm=1.0)
    other.load_state_dict(saved["optimizer"])
    assert other.param_groups[0]["lr"] == 0.02
    again = train(resumed, other, range(5, 10))
    assert torch.equal(torch.stack(straight), torch.stack(again))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert other.state[b]["exp_avg"].dtype == torch.float32
        assert torch.equal(optimizer.state[a]["exp_avg_sq"], other.state[b]["exp_avg_sq"])


def test_loaded_state_is_a_copy() -> None:
    model = network()
    optimizer = Lamb(model.parameters(), lr=0.02)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()
    expected = copy.deepcopy(state)
    other_model = network()
    other = Lamb(other_model.parameters())
    other.load_state_dict(state)
    train(other_model, other, range(2, 4))
    for index, values in expected["state"].items():
        assert torch.equal(values["exp_avg"], state["state"][index]["exp_avg"])


def test_training_converges_with_and_without_clipping() -> None:
    """The length of LAMB's step does not depend on the gradient's, so both converge."""
    for max_grad_norm in (None, 0.1):
        model = network()
        losses = train(model, Lamb(model.parameters(), lr=0.05, max_grad_norm=max_grad_norm), range(80))
        assert losses[-1] < 0.3 * losses[0]


def test_parameters_without_gradient_are_not_updated_and_count_their_own_steps() -> None:
    model = network()
    first, last = model[0].weight, model[2].weight
    optimizer = Lamb([first, last], lr=0.02)
    before = last.detach().clone()
    for step in range(3):
        first.grad = torch.ones_like(first)
        last.grad = torch.ones_like(last) if step == 2 else None
        optimizer.step()
        if step < 2:
            assert torch.equal(last, before)
    assert (optimizer.state[first]["step"], optimizer.state[last]["step"]) == (3, 1)
    assert not torch.equal(last, before)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_capturable_takes_the_same_steps(clip: float | None) -> None:
    """The same bits: the bias corrections are float64, from a float or a tensor, and rounded to float32 once."""
    trained = []
    for capturable in (False, True):
        model = network()
        optimizer = Lamb(groups(model), lr=0.02, max_grad_norm=clip, capturable=capturable)
        train(model, optimizer, range(12))
        trained.append([*model.parameters(), *(optimizer.state[p]["exp_avg_sq"] for p in model.parameters())])
        steps = [optimizer.state[p]["step"] for p in model.parameters()]
        assert all(isinstance(step, Tensor) == capturable and int(step) == 12 for step in steps)
    assert all(torch.equal(a, b) for a, b in zip(*trained, strict=True))


def test_capturable_reads_a_learning_rate_that_changes_in_place() -> None:
    rates = (0.02, 0.01, 0.005)
    model, twin = network(), network()
    lr = torch.tensor(rates[0])
    optimizer = Lamb(model.parameters(), lr=lr, capturable=True)
    other = Lamb(twin.parameters())
    for step, rate in enumerate(rates):
        lr.fill_(rate)
        other.param_groups[0]["lr"] = rate
        train(model, optimizer, range(step, step + 1))
        train(twin, other, range(step, step + 1))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)  # lr is rounded to float32 in one of them


def test_capturable_counts_the_steps_of_parameters_with_a_gradient() -> None:
    """As if not capturable: `last` has no gradient in steps 2 and 4, and from then on a count tensor of its own."""
    parameters = []
    for capturable in (False, True):
        model = network()
        first, last = model[0].weight, model[2].weight
        optimizer = Lamb([first, last], lr=0.02, capturable=capturable)
        for step in range(5):
            first.grad = torch.full_like(first, step + 1.0)
            last.grad = torch.full_like(last, 2.0 - step) if step % 2 == 0 else None
            optimizer.step()
        assert (int(optimizer.state[first]["step"]), int(optimizer.state[last]["step"])) == (5, 3)
        parameters.append((first, last))
    assert all(torch.equal(a, b) for a, b in zip(*parameters, strict=True))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_state_loads_into_capturable_and_not(before: bool, after: bool) -> None:
    """The resumed steps have the same bits, and parameters with the same count share its tensor again."""
    model = network()
    optimizer = Lamb(groups(model), lr=0.02, max_grad_norm=1.0, capturable=before)
    train(model, optimizer, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(3, 6))

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(saved["model"])
    other = Lamb(groups(resumed), max_grad_norm=1.0, capturable=after)
    other.load_state_dict(saved["optimizer"])
    assert len({id(other.state[p]["step"]) for p in other.param_groups[0]["params"]}) == 1
    train(resumed, other, range(3, 6))
    for a, b in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert isinstance(other.state[b]["step"], Tensor) == after
        assert int(other.state[b]["step"]) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_a_captured_step_equals_an_eager_one(impl: str) -> None:
    """Five steps with new gradients and learning rates, replayed in one optimizer and eager in the other."""
    model, twin = network().cuda(), network().cuda()
    lr = torch.tensor(0.02, device="cuda")
    optimizers = [Lamb(m.parameters(), lr=lr, max_grad_norm=0.5, capturable=True, impl=impl) for m in (model, twin)]
    gradients = [[torch.randn_like(p) for p in model.parameters()] for _ in range(6)]

    def fill(m: nn.Module, step: int) -> None:
        for p, gradient in zip(m.parameters(), gradients[step], strict=True):
            p.grad = gradient.clone() if p.grad is None else p.grad.copy_(gradient)

    for m, optimizer in zip((model, twin), optimizers, strict=True):
        fill(m, 0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for step in range(1, 6):
        lr.fill_(0.02 / step)
        fill(model, step)
        graph.replay()
        fill(twin, step)
        optimizers[1].step()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    assert int(optimizers[0].state[next(model.parameters())]["step"]) == 6


def test_closure_is_called_with_gradients_enabled() -> None:
    model = network()
    optimizer = Lamb(model.parameters(), lr=0.02)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    first, second = optimizer.step(closure), optimizer.step(closure)
    assert second < first


def test_works_with_an_lr_scheduler() -> None:
    model = network()
    optimizer = Lamb(groups(model), lr=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    train(model, optimizer, range(1))
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.0025]


def test_invalid_arguments_raise() -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"lr is -0\.1; expected a finite number, 0 or more"):
        Lamb([parameter], lr=-0.1)
    with pytest.raises(ValueError, match="max_grad_norm is 0; expected a number above 0, or None"):
        Lamb([parameter], max_grad_norm=0)
    with pytest.raises(ValueError, match="betas is"):
        Lamb([parameter], betas=(0.9, 1.5))
    for name in ("lr", "eps", "weight_decay"):
        for value in (float("nan"), float("inf"), -1.0):
            with pytest.raises(ValueError, match=f"{name} is {value}; expected a finite number"):
                Lamb([{"params": [parameter], name: value}])
