"""Run a sample of an op with tensors of any layout: what the checks and the contract tests share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.cases import Sample
from bert_fast.testing.three_way import as_tuple

Tensors = dict[str, Tensor]


def run(sample: Sample, impl: str, inputs: Tensors, call: Callable[..., Any] | None = None) -> Tensors:
    """The outputs and, for a differentiable op, the gradients of all inputs; the gradient of each output is noise."""
    if sample.gradients:
        inputs = {name: x.detach().requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    outs = as_tuple((call or functools.partial(sample.call, impl=impl))(**inputs))
    results = {f"out{index}": out.detach() for index, out in enumerate(outs)}
    leaves = {name: x for name, x in inputs.items() if x.requires_grad}
    if leaves:
        generator = torch.Generator().manual_seed(1)
        douts = [torch.randn(out.shape, generator=generator).to(out) for out in outs]
        gradients = torch.autograd.grad(outs, list(leaves.values()), douts)
        results |= {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return results


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def strided(x: Tensor) -> Tensor:
    return torch.stack([x, x], -1)[..., 0]


def wide_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x], -1)[..., : x.shape[-1]]


def offset(x: Tensor) -> Tensor:
    """`x` one element into its memory: aligned for one element only."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(layout, view, contiguous tensor of the same values)."""
    if x.dim() and x.numel():
        for layout in (strided, offset) if x.dim() < 2 else (strided, offset, transposed, wide_rows):
            yield layout.__name__, layout(x), x
        if x.is_floating_point():
            for name, part in (("expanded rows", x[:1]), ("expanded columns", x[..., :1])):
                yield name, part.expand(x.shape), part.expand(x.shape).contiguous()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """`count` threads of torch within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """NaN in every uninitialised tensor of the block, so that an output which a kernel forgot to write can't pass."""
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
