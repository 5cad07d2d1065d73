"""What attention is compared with on a GPU: PyTorch's own kernels, each in the layout that suits it best.

The padded peers get Q, K and V as separate projections produce them, (B, S, N, D) viewed as (B, N, S, D), and a key
mask where lengths differ. The peers of variable length get them packed, (T, N, D). A backend without support
for masks or dropout raises, and the benchmark lists it as refused.
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

from bert_fast.kernels._common.benchmarks import Peer, first

BACKENDS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math (eager)": SDPBackend.MATH,
}


@dataclass(frozen=True)
class Batch:
    """Random sequences concatenated along dim 0: qkv (T, 3, N, D) and dout (T, N, D)."""

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
        out = x.new_zeros(len(self.lengths), self.seqlen, *x.shape[1:])
        out[self.keep] = x
        return out


def packed_sdpa(lengths: list[int], heads: int, dim: int) -> Callable[[Tensor, Tensor], Tensor]:
    """SDPA as a padded BERT calls it: packed projections plus bias -> heads, padding and a key mask -> packed."""
    seqlen = max(lengths)
    keep = torch.arange(seqlen) < torch.tensor(lengths)[:, None]
    indices = keep.flatten().nonzero().squeeze(1)
    mask = None if bool(keep.all()) else keep[:, None, None, :]

    def run(qkv: Tensor, bias: Tensor) -> Tensor:
        padded = qkv.new_zeros(len(lengths) * seqlen, 3, heads, dim).index_copy(0, indices, qkv + bias)
        query, key, value = padded.view(len(lengths), seqlen, 3, heads, dim).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).reshape(-1, heads, dim)[indices]

    return run


def _sdpa(
    backend: SDPBackend, mask: Tensor | None, dropout_p: float, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p)


def _eager(mask: Tensor | None, dropout_p: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return F.dropout(torch.softmax(scores, dim=-1), dropout_p) @ value


def _varlen_attn(ends: Tensor, seqlen: int, dropout_p: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    if dropout_p:
        raise NotImplementedError("varlen_attn has no dropout")
    from torch.nn.attention.varlen import varlen_attn

    return first(varlen_attn(query, key, value, ends, ends, seqlen, seqlen))


def _flash_varlen(ends: Tensor, seqlen: int, dropout_p: float, *qkv: Tensor) -> Tensor:
    """The operator below varlen_attn, which has dropout."""
    out: Tensor = torch.ops.aten._flash_attention_forward(*qkv, ends, ends, seqlen, seqlen, dropout_p, False, False)[0]
    return out


def peers(batch: Batch, dropout_p: float, compiled: bool) -> dict[str, Peer]:
    """Every peer; with `compiled` also eager attention through torch.compile."""
    keep, comparable = batch.keep, not dropout_p
    mask = None if len(set(batch.lengths)) == 1 else keep[:, None, None, :]
    functions: dict[str, Callable[..., Tensor]] = {
        name: partial(_sdpa, backend, mask, dropout_p) for name, backend in BACKENDS.items()
    }
    if compiled:
        functions["torch.compile"] = torch.compile(partial(_eager, mask, dropout_p), dynamic=False)
    inputs = [x.contiguous().transpose(1, 2) for x in batch.padded(batch.qkv).unbind(2)]
    dout = batch.padded(batch.dout).transpose(1, 2)

    def unpadded(result: Any) -> Tensor:
        """The output (T, N, D), or the gradient of qkv (T, 3, N, D)."""
        tensors = [x.transpose(1, 2)[keep] for x in ((result,) if isinstance(result, Tensor) else result)]
        return tensors[0] if len(tensors) == 1 else torch.stack(tensors, dim=1)

    result = {name: Peer(run, inputs, dout, unpadded, comparable) for name, run in functions.items()}
    packed = [x.contiguous() for x in batch.qkv.unbind(1)]
    for name, run in (("varlen_attn", _varlen_attn), ("flash varlen op", _flash_varlen)):
        result[name] = Peer(
            partial(run, batch.cu_seqlens, batch.seqlen, dropout_p),
            packed,
            batch.dout,
            lambda out: out if isinstance(out, Tensor) else torch.stack(out, dim=1),
            comparable,
        )
    return result
