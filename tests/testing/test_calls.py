"""Kernels that are right once: the check "calls" finds what they keep between calls, and the seed's upper half."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bert_fast.kernels.add_layer_norm import add_layer_norm
from bert_fast.testing import find_mismatches


def _gelu(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    return F.gelu(x + bias.to(x.dtype), approximate=approximate)


def _forward(x: Tensor, bias: Tensor, approximate: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    return _gelu(x, bias, approximate), (x.clone(),)


def _gradients(dout: Tensor, x: Tensor, bias: Tensor, approximate: str) -> dict[str, Tensor]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_(), bias.detach().requires_grad_()]
        out = _gelu(*leaves, approximate)
    return dict(zip(("x", "bias"), torch.autograd.grad(out, leaves, dout), strict=True))


def _right(dout: Tensor, saved: tuple[Tensor, ...], **arguments: Any) -> dict[str, Tensor]:
    return _gradients(dout, **arguments)


def _writes_dout(dout: Tensor, saved: tuple[Tensor, ...], **arguments: Any) -> dict[str, Tensor]:
    gradients = _gradients(dout, **arguments)
    if dout.is_contiguous():
        dout.zero_()
    return gradients


def _writes_saved(dout: Tensor, saved: tuple[Tensor, ...], **arguments: Any) -> dict[str, Tensor]:
    gradients = _gradients(dout, **{**arguments, "x": saved[0]})
    saved[0].data.zero_()  # as a kernel writes: autograd sees nothing of it
    return gradients


def _ignores_strides(dout: Tensor, saved: tuple[Tensor, ...], **arguments: Any) -> dict[str, Tensor]:
    """As a kernel does that gets a pointer: the memory's order, and what follows it."""
    memory = dout.as_strided((dout.untyped_storage().nbytes() // dout.element_size(),), (1,), 0)
    memory = F.pad(memory, (0, max(0, dout.numel() - len(memory))))[: dout.numel()]
    return _gradients(memory.view(dout.shape), **arguments)


def _static() -> Callable[..., Tensor]:
    memory: dict[Any, Tensor] = {}

    def kernel(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        out = _gelu(x, bias, approximate)
        return out if out.requires_grad else memory.setdefault((x.shape, x.dtype), torch.empty_like(x)).copy_(out)

    return kernel


def _caching() -> Callable[..., Tensor]:
    kept: dict[int, tuple[Tensor, Tensor]] = {}

    def kernel(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
        if bias.requires_grad:
            return _gelu(x, bias, approximate)
        return _gelu(x, kept.setdefault(id(bias), (bias, bias.clone()))[1], approximate)

    return kernel


def _sets_threads(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    torch.set_num_threads(torch.get_num_threads() + 1)
    return _gelu(x, bias, approximate)


def _seeds(x: Tensor, bias: Tensor, approximate: str) -> Tensor:
    torch.manual_seed(3)
    return _gelu(x, bias, approximate)


FAULTS: list[tuple[str, Any, Any]] = [
    ("a later call overwrites the output of an earlier one", _static, None),
    ("inputs changed in place give the result of their old values", _caching, None),
    ("changes the number of threads", lambda: _sets_threads, None),
    ("seeds or advances PyTorch's random generator", lambda: _seeds, None),
    ("writes to the gradient of the output", lambda: _forward, _writes_dout),
    ("the contiguous gradient of the output, given again,", lambda: _forward, _writes_saved),
    ("the expanded gradient of the output", lambda: _forward, _ignores_strides),
]


@pytest.mark.parametrize(("message", "make", "backward"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_what_a_call_leaves_behind_is_named(message: str, make: Callable[[], Any], backward: Any) -> None:
    findings = find_mismatches(make(), "bias_gelu", backward=backward, dtypes=[torch.float32], checks=["calls"])
    assert any(message in finding.text for finding in findings), findings


def test_a_right_backward_pass_has_no_findings() -> None:
    assert not find_mismatches(_forward, "bias_gelu", backward=_right, dtypes=[torch.float32], checks=["calls"])


def test_a_seed_of_32_bits_is_named() -> None:
    def kernel(*, rng_state: Tensor | None, dropout_p: float, **arguments: Any) -> Tensor:
        state = None if rng_state is None else rng_state & torch.tensor([2**32 - 1, -1])
        p = dropout_p if state is not None else 0.0
        return add_layer_norm(**arguments, dropout_p=p, rng_state=state, impl="reference")

    (finding,) = find_mismatches(kernel, "add_layer_norm", dtypes=[torch.float32], checks=["dropout"])
    assert finding.mistake == "the upper 32 bits of the seed are not used"


def test_a_gradient_that_is_left_out_is_an_error() -> None:
    """It was no gradient: the parameter was not trained."""
    (finding,) = find_mismatches(
        _forward,
        "bias_gelu",
        backward=lambda dout, saved, **arguments: {"x": _gradients(dout, **arguments)["x"]},
        dtypes=[torch.float32],
        checks=["accuracy"],
    )
    assert "backward returned no gradient of bias; expected those of x, bias" in finding.text
