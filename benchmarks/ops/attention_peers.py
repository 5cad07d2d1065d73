"""What attention is compared with on a GPU: torch's own kernels, each in the layout that suits it best.

The padded peers get Q, K and V as separate projections give them, (B, S, N, D) seen as (B, N, S, D), with no split of a
packed tensor and no stack of its gradients to pay, and a key mask where lengths differ. The peers of variable length
get them packed, (T, N, D). A backend that takes no mask, or no dropout, refuses the case and is listed so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.runner.runner import Variant

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math (eager)": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Batch:
    """Random sequences: qkv (T, 3, N, D), dout (T, N, D), one after the other."""

    qkv: Tensor
    dout: Tensor
    lengths: list[int]

    @property
    def seqlen(self) -> int:
        return max(self.lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        """int32 (B+1,)."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.qkv.device)

    @property
    def keep(self) -> Tensor:
        """bool (B, S), True at real tokens."""
        lengths = torch.tensor(self.lengths, device=self.qkv.device)
        return torch.arange(self.seqlen, device=self.qkv.device) < lengths[:, None]

    def padded(self, x: Tensor) -> Tensor:
        """(T, ...) -> (B, S, ...), zeros at padding."""
        found = x.new_zeros(len(self.lengths), self.seqlen, *x.shape[1:])
        found[self.keep] = x
        return found


def gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], dout: Tensor) -> Callable[[], Any]:
    """Forward + backward, giving the gradients of `inputs`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(function(*leaves), leaves, dout)


def without_gradients(function: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    return forward


def _sdpa(backend: SDPBackend | None, mask: Tensor | None, dropout_p: float, *qkv: Tensor) -> Tensor:
    if backend is None:
        return F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=dropout_p)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=dropout_p)


def padded_peer(batch: Batch, function: Callable[..., Tensor], backward: bool, comparable: bool) -> Variant:
    """`function(q, k, v)` on (B, N, S, D)."""
    keep = batch.keep
    inputs = tuple(x.contiguous().transpose(1, 2) for x in batch.padded(batch.qkv).unbind(2))
    if not backward:
        return Variant(without_gradients(function, inputs), lambda out: out.transpose(1, 2)[keep], comparable)
    dout = batch.padded(batch.dout).transpose(1, 2)
    return Variant(
        gradients(function, inputs, dout),
        lambda found: torch.stack([x.transpose(1, 2)[keep] for x in found], dim=1),
        comparable,
    )


def packed_peer(batch: Batch, function: Callable[..., Tensor], backward: bool, comparable: bool) -> Variant:
    """`function(q, k, v)` on (T, N, D)."""
    inputs = tuple(x.contiguous() for x in batch.qkv.unbind(1))
    if not backward:
        return Variant(without_gradients(function, inputs), comparable=comparable)
    return Variant(gradients(function, inputs, batch.dout), lambda found: torch.stack(found, dim=1), comparable)


def _varlen_attn(ends: Tensor, seqlen: int, dropout_p: float, *qkv: Tensor) -> Tensor:
    if dropout_p:
        raise NotImplementedError("varlen_attn has no dropout")
    from torch.nn.attention.varlen import varlen_attn

    out: Tensor = varlen_attn(*qkv, ends, ends, seqlen, seqlen)
    return out


def _flash_varlen(ends: Tensor, seqlen: int, dropout_p: float, *qkv: Tensor) -> Tensor:
    """The operator below varlen_attn, which has dropout."""
    out: Tensor = torch.ops.aten._flash_attention_forward(*qkv, ends, ends, seqlen, seqlen, dropout_p, False, False)[0]
    return out


def peers(batch: Batch, dropout_p: float, backward: bool, compiled: bool) -> dict[str, Variant]:
    """Every peer; with `compiled` also torch.compile over SDPA with the backend left to torch."""
    keep, ends, comparable = batch.keep, batch.cu_seqlens, not dropout_p
    mask = None if len(set(batch.lengths)) == 1 else keep[:, None, None, :]
    functions = {name: partial(_sdpa, backend, mask, dropout_p) for name, backend in BACKENDS.items()}
    if compiled:
        functions["torch.compile"] = torch.compile(partial(eager, mask, dropout_p), dynamic=False)
    found = {name: padded_peer(batch, function, backward, comparable) for name, function in functions.items()}
    for name, function in (("varlen_attn", _varlen_attn), ("flash varlen op", _flash_varlen)):
        run = partial(function, ends, batch.seqlen, dropout_p)
        found[name] = packed_peer(batch, run, backward, comparable)
    return found


def eager(mask: Tensor | None, dropout_p: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention as it is written in eager PyTorch, for torch.compile."""
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return F.dropout(torch.softmax(scores, dim=-1), dropout_p) @ value


def truth(batch: Batch, backward: bool) -> Tensor:
    """Output, or gradient of qkv, in float64, a sequence at a time."""
    found = []
    for qkv, dout in zip(batch.qkv.split(batch.lengths), batch.dout.split(batch.lengths), strict=True):
        leaf = qkv.double().requires_grad_(backward)
        query, key, value = leaf.permute(1, 2, 0, 3)  # (N, S, D) each
        out = eager(None, 0.0, query[None], key[None], value[None])[0].transpose(0, 1)
        found.append(torch.autograd.grad(out, leaf, dout.double())[0] if backward else out)
    return torch.cat(found)
