"""Every op captured in a CUDA graph, forward and backward: no host synchronisation, static shapes, dropout replayed.

A replay on new values has to give the bits of an ordinary call on them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bert_fast.kernels import available_impls
from bert_fast.kernels._common import cases

# lamb has no gradient, and a test of its own; unpad returns T to the host.
CALLS = [
    (op, index, impl)
    for op, impls in available_impls().items()
    if op not in ("lamb", "padding")
    for index in range(len(cases.load(op).samples()))
    for impl in ("triton", "cuda")
    if impl in impls
]


def run(op: str, index: int, impl: str, inputs: dict[str, Tensor], dout: Tensor) -> list[Tensor]:
    out = cases.load(op).samples()[index].call(impl=impl, **inputs)
    leaves = [x for x in inputs.values() if x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def fresh(op: str, index: int, dtype: torch.dtype, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    inputs = cases.load(op).samples()[index].cast(dtype, "cuda")
    return {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "index", "impl"), CALLS)
def test_a_replayed_graph_equals_an_ordinary_call(op: str, index: int, impl: str) -> None:
    state = available_impls()[op][impl]
    if not state.ok:
        pytest.skip(state.reason)
    static, new = (fresh(op, index, torch.bfloat16, seed) for seed in (0, 1))
    dout = torch.randn_like(cases.load(op).samples()[index].call(impl=impl, **static).detach())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(op, index, impl, static, dout)
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(op, index, impl, static, dout)
    with torch.no_grad():
        for name, x in static.items():
            x.copy_(new[name])
    graph.replay()
    expected = run(op, index, impl, new, dout)
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
