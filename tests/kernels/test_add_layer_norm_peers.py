"""The LayerNorms of other packages in the benchmark of add_layer_norm: stand-ins with the packages' signatures."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from bert_fast.kernels.add_layer_norm import add_layer_norm
from bert_fast.kernels.add_layer_norm.peers import EPS, NORMS, peers
from bert_fast.kernels.masked_lm_loss import cases as masked_lm_loss_cases


class LigerLayerNormFunction:
    @staticmethod
    def apply(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return functional.layer_norm(x, weight.shape, weight, bias, eps)


class LigerFusedLinearCrossEntropyFunction:
    @staticmethod
    def apply(x: Tensor, weight: Tensor, target: Tensor, bias: Tensor) -> tuple[Tensor, None]:
        return functional.cross_entropy(functional.linear(x, weight, bias), target), None


def fused_layer_norm_affine(x: Tensor, weight: Tensor, bias: Tensor, shape: Any, eps: float) -> Tensor:
    return functional.layer_norm(x, tuple(shape), weight, bias, eps)


class LayerNorm(nn.LayerNorm):
    def __init__(self, width: int, eps: float, device: torch.device) -> None:
        super().__init__(width, eps=eps, device=device)


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, members in {
        "liger_kernel.ops.layer_norm": {"LigerLayerNormFunction": LigerLayerNormFunction},
        "liger_kernel.ops.fused_linear_cross_entropy": {
            "LigerFusedLinearCrossEntropyFunction": LigerFusedLinearCrossEntropyFunction
        },
        "apex.normalization.fused_layer_norm": {"fused_layer_norm_affine": fused_layer_norm_affine},
        "transformer_engine.pytorch": {"LayerNorm": LayerNorm},
    }.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        for member, value in members.items():
            setattr(sys.modules[name], member, value)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.layer_norm", _module(LigerLayerNormFunction))


def _module(member: Any) -> types.ModuleType:
    module = types.ModuleType(member.__name__)
    setattr(module, member.__name__, member)
    return module


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(*shape) for shape in ((5, 8), (5, 8), (8,), (8,), (8,)))


@pytest.mark.parametrize("name", NORMS)
def test_a_packages_layer_norm_computes_ours_and_its_gradients(name: str, packages: None) -> None:
    leaves = [x.requires_grad_() for x in inputs()]
    x, residual, weight, bias, x_bias = leaves
    peer = peers(0.0, tuple(leaves))[name]
    out = peer.call(*leaves)
    expected = add_layer_norm(x, residual, weight, bias, x_bias=x_bias, eps=EPS, impl="reference")
    torch.testing.assert_close(out, expected)
    dout = torch.randn_like(out)
    for mine, theirs in zip(
        torch.autograd.grad(expected, leaves, dout), torch.autograd.grad(out, leaves, dout), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", NORMS)
def test_a_package_that_is_not_installed_is_an_import_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("liger_kernel", "apex", "transformer_engine"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError):
        peers(0.0, inputs())[name].call(*inputs())
    assert not peers(0.1, inputs())[name].comparable


def test_ligers_loss_is_that_of_the_masked_tokens(packages: None) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(*shape) for shape in ((6, 4), (4, 4), (4,), (4,), (4,), (9, 4), (9,))]
    labels = torch.tensor([-100, 3, -100, 0, 8, -100])
    rows = (labels >= 0).nonzero().squeeze(1)
    ours = masked_lm_loss_cases._given_rows(*parts, labels, rows)
    torch.testing.assert_close(masked_lm_loss_cases._liger(*parts, labels, rows), ours)
