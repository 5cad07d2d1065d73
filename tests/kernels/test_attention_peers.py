"""What attention is compared with: packages by stand-ins with their signatures, and what is missing is refused."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from bert_fast.kernels import attention
from bert_fast.kernels.attention import peers as peers_module
from bert_fast.kernels.attention.peers import Batch, peers

LENGTHS = [5, 9, 1]
PACKAGES = ["flash-attn 4", "flash-attn 3", "flash-attn 2", "xformers"]


@pytest.fixture
def batch() -> Batch:
    return Batch(torch.randn(15, 3, 2, 8), torch.randn(15, 2, 8), LENGTHS)


def exact(batch: Batch) -> tuple[Tensor, Tensor]:
    """The output (T, N, D) and the gradient of qkv (T, 3, N, D)."""
    qkv = batch.qkv.double().requires_grad_()
    out = attention(qkv, batch.cu_seqlens, batch.seqlen, impl="reference")
    return out.detach(), torch.autograd.grad(out, qkv, batch.dout.double())[0]


def run(batch: Batch, name: str, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    peer = peers(batch, dropout_p, False, True)[name]
    assert peer.inputs is not None
    inputs = [x.clone().requires_grad_() for x in peer.inputs]
    out = peer.call(*inputs)
    return peer.result(out.detach()), peer.result(torch.autograd.grad(out, inputs, peer.dout))


def assert_right(batch: Batch, name: str) -> None:
    for ours, expected in zip(run(batch, name), exact(batch), strict=True):
        # float32 sums of up to 9 products of values up to 4.
        torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-5)


def packed(qkv: tuple[Tensor, ...], ends: Tensor) -> Tensor:
    return attention(torch.stack(qkv, dim=1), ends, int(ends.diff().max()), impl="reference")


class StandIns:
    """Packages with the signatures of the real ones, which record whether determinism was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.deterministic: list[bool] = []
        self._patch = monkeypatch
        self._install("flash_attn.cute", flash_attn_varlen_func=self._flash_attn_4)
        self._install("flash_attn_interface", flash_attn_varlen_func=self._flash_attn_3)
        self._install("flash_attn", flash_attn_varlen_func=self._flash_attn_2)
        mask = SimpleNamespace(from_seqlens=lambda lengths, device: torch.tensor([0, *lengths]).cumsum(0).int())
        self._install("xformers.ops.fmha.attn_bias", BlockDiagonalMask=mask)
        self._install("xformers.ops", memory_efficient_attention=self._xformers)

    def _install(self, name: str, **functions: Any) -> None:
        for end in [index for index, letter in enumerate(name) if letter == "."]:
            if name[:end] not in sys.modules:
                self._patch.setitem(sys.modules, name[:end], ModuleType(name[:end]))
        module = sys.modules.get(name) or ModuleType(name)
        vars(module).update(functions)
        self._patch.setitem(sys.modules, name, module)

    def _flash_attn_4(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        deterministic: bool = False,
    ) -> tuple[Tensor, None]:
        assert (max_seqlen_q, max_seqlen_k) == (9, 9)
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        self.deterministic.append(deterministic)
        return packed((q, k, v), cu_seqlens_q), None

    def _flash_attn_3(self, q: Tensor, k: Tensor, v: Tensor, *sizes: Any, deterministic: bool = False) -> Tensor:
        ends, ends_k, *longest = sizes
        return self._flash_attn_4(q, k, v, ends, ends_k, *longest, deterministic=deterministic)[0]

    def _flash_attn_2(self, *inputs: Any, dropout_p: float = 0.0, deterministic: bool = False) -> Tensor:
        return self._flash_attn_3(*inputs, deterministic=deterministic) + dropout_p

    def _xformers(self, q: Tensor, k: Tensor, v: Tensor, attn_bias: Tensor, p: float) -> Tensor:
        return packed((q[0], k[0], v[0]), attn_bias).unsqueeze(0) + p


@pytest.mark.parametrize("name", PACKAGES)
def test_an_installed_package_is_called_right(name: str, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins = StandIns(monkeypatch)
    assert_right(batch, name)
    if name.startswith("flash"):
        assert_right(batch, f"{name}, deterministic")
        assert stand_ins.deterministic == [False, True]


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_is_not_there_is_refused_by_name(
    name: str, batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("flash_attn", "flash_attn.cute", "flash_attn_interface", "xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"flash_attn|xformers"):
        run(batch, name)


def test_dropout_is_passed_on_or_refused(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    StandIns(monkeypatch)
    for name in ("flash-attn 4", "flash-attn 3", "varlen_attn"):
        with pytest.raises(NotImplementedError, match="has no dropout"):
            run(batch, name, 0.1)
    for name in ("flash-attn 2", "xformers"):
        torch.testing.assert_close(run(batch, name, 0.1)[0].double(), exact(batch)[0] + 0.1, rtol=0, atol=1e-5)


def test_ragged_batches_reach_the_backend_without_padding(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    backends: list[SDPBackend] = []
    sdpa = peers_module._sdpa

    def on_a_cpu(backend: SDPBackend, mask: None, dropout_p: float, query: Tensor, *others: Tensor) -> Tensor:
        backends.append(backend)
        assert query.is_nested
        return sdpa(SDPBackend.MATH, mask, dropout_p, query, *others)

    monkeypatch.setattr(peers_module, "_sdpa", on_a_cpu)
    assert_right(batch, "cuDNN ragged")
    assert backends == [SDPBackend.CUDNN_ATTENTION]


class Recording(torch.autograd.Function):
    seen: list[bool] = []  # noqa: RUF012

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Tensor:
        Recording.seen.append(torch.are_deterministic_algorithms_enabled())
        return dout


def test_the_operator_of_torch_is_deterministic_in_its_backward_pass_alone(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash(ends: Tensor, seqlen: int, dropout_p: float, *qkv: Tensor) -> Tensor:
        assert not torch.are_deterministic_algorithms_enabled()
        return Recording.apply(packed(qkv, ends))  # type: ignore[no-any-return]

    monkeypatch.setattr(peers_module, "_flash_varlen", flash)
    Recording.seen.clear()
    assert_right(batch, "flash varlen op")
    assert_right(batch, "flash varlen op, deterministic")
    assert Recording.seen == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()


def test_the_forward_pass_alone_has_no_deterministic_variants(batch: Batch) -> None:
    names = {backward: set(peers(batch, 0.0, False, backward)) for backward in (False, True)}
    assert names[True] - names[False] == {
        f"{name}, deterministic" for name in ("flash varlen op", "flash-attn 4", "flash-attn 3", "flash-attn 2")
    }
    assert names[False] < names[True]
