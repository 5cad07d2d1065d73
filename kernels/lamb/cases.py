"""The one description of lamb for tools: see kernels/_common/cases.py."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bert_fast.kernels._common.benchmarks import Benchmark, Peer, Plan, normal
from bert_fast.kernels._common.cases import (
    DTYPES,
    E,
    F,
    Lengths,
    Malformed,
    OpCases,
    Sample,
    launchers,
    malformed_calls,
    meta,
    randn,
)
from bert_fast.kernels.lamb import clip_scale, lamb_step
from bert_fast.kernels.lamb.mistakes import MISTAKES


def _step(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, impl: str) -> tuple[Tensor, ...]:
    state = [x.clone() for x in (param, exp_avg, exp_avg_sq)]
    lamb_step(state[:1], [grad], state[1:2], state[2:], step=3, lr=0.01, impl=impl)
    return tuple(state)


def samples(lengths: Lengths = None) -> list[Sample]:
    """One step of one parameter."""
    rows = F if lengths is None else sum(lengths)
    inputs = {name: randn(rows, E) for name in ("param", "grad", "exp_avg")}
    inputs["exp_avg_sq"] = randn(rows, E).square()
    return [Sample("one step", _step, inputs, parameters=("exp_avg", "exp_avg_sq"), gradients=False)]


def malformed() -> list[Malformed]:
    """Lists that don't match, numbers out of range; and of clip_scale."""
    w, g, m, v = (torch.randn(3) for _ in range(4))
    valid = {"params": [w], "grads": [g], "exp_avgs": [m], "exp_avg_sqs": [v], "step": 1, "lr": 0.1}
    steps = malformed_calls(
        lamb_step,
        valid,
        {
            "no gradient": ({"grads": []}, ValueError, "grads has 0 tensors; expected 1"),
            "short gradient": ({"grads": [g[:2]]}, ValueError, r"grads\[0\] has shape \(2,\); expected \(3,\)"),
            "integer parameter": ({"params": [w.long()]}, TypeError, r"params\[0\] is torch\.int64"),
            "step of 0": ({"step": 0}, ValueError, "step is 0; expected 1 for the first step"),
            "beta of 1": ({"betas": (0.9, 1.0)}, ValueError, r"betas is \(0\.9, 1\.0\)"),
            "negative weight_decay": (
                {"weight_decay": -0.1},
                ValueError,
                r"weight_decay is -0\.1; expected neither below 0",
            ),
        },
    )
    clips = malformed_calls(
        clip_scale,
        {"grads": [g], "max_norm": 1.0},
        {
            "no gradients to clip": ({"grads": []}, ValueError, "grads is empty"),
            "max_norm of 0": ({"max_norm": 0.0}, ValueError, r"max_norm is 0\.0"),
        },
    )
    return steps + clips


def launches() -> None:
    """Every pair of dtypes, aligned and not, with host and device scalars; the kernels read sizes and counts."""
    triton = launchers("lamb")
    scale, step = meta(), meta()
    dtypes = ((torch.float32, torch.float32), (torch.float32, torch.bfloat16), *((d, d) for d in DTYPES[1:]))
    for param, grad in dtypes:
        for offset in (0, 1):  # the second is not a multiple of 16 bytes
            lists = [
                [meta(30522 + offset, dtype=dtype)[offset:] for _ in range(3)]
                for dtype in (param, grad, torch.float32, torch.float32)
            ]
            triton.clip_scale(lists[1], 1.0)
            triton.lamb_step(*lists, step, scale, (0.9, 0.999), 1e-6, 0.01, scale)  # in a CUDA graph
            triton.lamb_step(*lists, 7, 0.01, (0.9, 0.999), 1e-6, 0.01, scale)  # clipped
            triton.lamb_step(*lists, 7, 0.01, (0.9, 0.999), 1e-6, 0.01, 1.0)


def extra(impl: str, device: str) -> None:
    """The global norm over tensors of several chunks, at addresses that are not multiples of 16 bytes."""
    params = [torch.randn(size, device=device)[1:] for size in (70_001, 3, 34)]
    grads = [torch.randn_like(param) for param in params]
    moments = [[torch.zeros_like(param) for param in params] for _ in range(2)]
    scale = clip_scale(grads, 1.0, impl=impl).scale
    lamb_step(params, grads, *moments, step=1, lr=0.01, grad_scale=scale, impl=impl)


def _one_at_a_time(params: list[Tensor], grads: list[Tensor], ms: list[Tensor], vs: list[Tensor]) -> None:
    for w, g, m, v in zip(params, grads, ms, vs, strict=True):
        m.lerp_(g, 1 - 0.9)
        v.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
        u = (m / (1 - 0.9)).div_((v / (1 - 0.999)).sqrt_().add_(1e-6)).add_(w, alpha=0.01)
        weight_norm, update_norm = w.norm(), u.norm()
        ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        w.sub_(u.mul_(0.01 * ratio))


def _shapes(layers: int) -> list[tuple[int, ...]]:
    """The parameters of BERT-base with `layers` layers."""
    E, F, V = 768, 3072, 30522
    layer = [(3 * E, E), (3 * E,), (E, E), *[(E,)] * 3, (F, E), (F,), (E, F), *[(E,)] * 3]
    return [(V, E), (512, E), (2, E), (E,), (E,), *layer * layers, (E, E), *[(E,)] * 3, (V,)]


def _benchmark(device: torch.device, layers: int) -> Benchmark:
    params = [0.02 * normal(device, *shape) for shape in _shapes(layers)]
    grads = [1e-3 * torch.randn_like(param) for param in params]

    def variant(step: Callable[..., None]) -> Callable[[], Tensor]:
        """One more step on parameters and moments of its own; returns the word embeddings."""
        lists = [w.clone() for w in params], grads, *([torch.zeros_like(w) for w in params] for _ in range(2))

        def run() -> Tensor:
            step(*lists)
            return lists[0][0]

        return run

    def ours(impl: str) -> Callable[..., None]:
        return lambda *lists: lamb_step(*lists, step=1, lr=0.01, impl=impl)

    runs = functools.cache(lambda impl: variant(ours(impl)))
    exact = [[x.double()] for x in (params[0], grads[0], *torch.zeros(2, *params[0].shape, device=device))]
    ours("reference")(*exact)  # a tensor's step does not depend on the others
    peers = {"one tensor at a time": variant(_one_at_a_time), "bert_fast reference (foreach)": runs("reference")}
    return Benchmark(
        lambda *, impl: runs(impl)(),
        (),
        {name: Peer(run) for name, run in peers.items()},
        1e-5,  # torch's FP32 norm of 23 M elements is off by 3e-3 on a CPU: 1e-5 of the largest weight
        exact=lambda: exact[0][0],
        traffic=28 * sum(param.numel() for param in params),  # w, g, m and v are read; w, m and v are written
    )


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """One step of BERT-base (on a CPU 2 of its layers); AdamW computes something else, so it is not a peer."""
    layers = 12 if device.type == "cuda" else 2
    sizes = [math.prod(shape) for shape in _shapes(layers)]
    name = f"BERT-base, {layers} layers, {sum(sizes) / 1e6:.0f} M float32 parameters in {len(sizes)} tensors, one step"
    return [Plan(name, partial(_benchmark, device, layers))]


CASES = OpCases("lamb", samples, malformed, launches=launches, extra=extra, mistakes=MISTAKES, benchmarks=benchmarks)
