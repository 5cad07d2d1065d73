"""lamb beside the same step taken one tensor at a time, on the parameters of BERT-base (on a CPU, of 2 of its layers).

AdamW computes something else, so it can't be held to the same truth and is not among the peers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.runner.runner import Case, Plan, Setting, main
from bert_fast.kernels import lamb_step
from bert_fast.kernels.lamb.reference import lamb_step_reference

E, F, V = 768, 3072, 30522
LAYER = [(3 * E, E), (3 * E,), (E, E), *[(E,)] * 3, (F, E), (F,), (E, F), *[(E,)] * 3]
SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "grad_scale": 1.0}


def one_at_a_time(params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor]) -> None:
    (beta1, beta2), eps, decay = SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"]
    for w, g, m, v in zip(params, grads, ms, vs, strict=True):
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        u = (m / (1 - beta1)).div_((v / (1 - beta2)).sqrt_().add_(eps)).add_(w, alpha=decay)
        size, length = w.norm(), u.norm()
        w.sub_(u.mul_(0.01 * torch.where((size > 0) & (length > 0), size / length, 1.0)))


def ours(impl: str) -> Callable[..., None]:
    return lambda *lists: lamb_step(*lists, step=1, lr=0.01, **SETTINGS, impl=impl)


def variant(step: Callable[..., None], params: list[Tensor], grads: list[Tensor]) -> Callable[[], Tensor]:
    """One more step on weights and moments of its own; gives the word embedding."""
    lists = [w.clone() for w in params], grads, *([torch.zeros_like(w) for w in params] for _ in range(2))

    def run() -> Tensor:
        step(*lists)
        return lists[0][0]

    return run


def shapes(layers: int) -> list[tuple[int, ...]]:
    """Of the parameters of BERT-base with so many layers."""
    return [(V, E), (512, E), (2, E), (E,), (E,), *LAYER * layers, (E, E), *[(E,)] * 3, (V,)]


def case(setting: Setting, layers: int) -> Case:
    steps = {"one tensor at a time": one_at_a_time, "bert_fast reference (foreach)": ours("reference")}
    steps |= {f"bert_fast {impl}": ours(impl) for impl in setting.ours("lamb", torch.float32)}
    params = [0.02 * setting.randn(*shape) for shape in shapes(layers)]
    grads = [1e-3 * torch.randn_like(w) for w in params]
    truth = [[x.double()] for x in (params[0], grads[0], *torch.zeros(2, V, E, device=setting.device))]
    lamb_step_reference(*truth, 1, 0.01, **SETTINGS)  # a tensor's step does not depend on the others
    # torch's float32 norm of 23 M elements is off by 3e-3 on a CPU, which makes 1e-5 of the largest weight; the floor's
    # bytes are those of reading w, g, m, v and writing w, m, v.
    return Case(
        {name: variant(step, params, grads) for name, step in steps.items()},
        truth[0][0],
        1e-5,
        traffic=28 * sum(w.numel() for w in params),
    )


def plans(setting: Setting) -> list[Plan]:
    layers = 12 if setting.on_gpu else 2
    sizes = [math.prod(shape) for shape in shapes(layers)]
    name = f"BERT-base, {layers} layers, {sum(sizes) / 1e6:.0f} M float32 parameters in {len(sizes)} tensors, one step"
    return [Plan(name, partial(case, setting, layers))]


if __name__ == "__main__":
    with torch.no_grad():
        main("lamb", plans)
