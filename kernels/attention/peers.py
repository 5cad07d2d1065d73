"""What attention is compared with on a GPU: PyTorch's kernels, and those of other packages where they are installed,
each in the layout that suits it best.

The padded peers get Q, K and V as separate projections produce them, (B, S, N, D) viewed as (B, N, S, D), and a key
mask where lengths differ. The peers of variable length get them packed, (T, N, D). A backend without support
for masks or dropout raises, as the import of a package that isn't there does, and the benchmark lists it as refused.

Ours are bitwise deterministic. Peers whose backward pass is not, by default, are there a second time with it (their
name ends in "deterministic"): the difference is what determinism costs them.
"""

from __future__ import annotations

import functools
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


def _cudnn_ragged(ends: Tensor, seqlen: int, dropout_p: float, *qkv: Tensor) -> Tensor:
    """cuDNN's kernel on nested tensors: no padding in memory."""
    offsets = ends.to(torch.int64)
    nested = [
        torch.nested.nested_tensor_from_jagged(x, offsets, min_seqlen=1, max_seqlen=seqlen).transpose(1, 2) for x in qkv
    ]
    out: Tensor = _sdpa(SDPBackend.CUDNN_ATTENTION, None, dropout_p, *nested).transpose(1, 2).values()
    return out


def _flash_attn_4(ends: Tensor, seqlen: int, dropout_p: float, *qkv: Tensor, deterministic: bool = False) -> Tensor:
    if dropout_p:
        raise NotImplementedError("flash-attn 4 has no dropout")
    from flash_attn.cute import flash_attn_varlen_func

    options = {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": seqlen, "max_seqlen_k": seqlen}
    return first(flash_attn_varlen_func(*qkv, **options, deterministic=deterministic))


def _flash_attn_3(ends: Tensor, seqlen: int, dropout_p: float, *qkv: Tensor, deterministic: bool = False) -> Tensor:
    if dropout_p:
        raise NotImplementedError("flash-attn 3 has no dropout")
    from flash_attn_interface import flash_attn_varlen_func

    return first(flash_attn_varlen_func(*qkv, ends, ends, seqlen, seqlen, deterministic=deterministic))


def _flash_attn_2(ends: Tensor, seqlen: int, dropout_p: float, *qkv: Tensor, deterministic: bool = False) -> Tensor:
    from flash_attn import flash_attn_varlen_func

    out = flash_attn_varlen_func(*qkv, ends, ends, seqlen, seqlen, dropout_p=dropout_p, deterministic=deterministic)
    return first(out)


def _xformers(lengths: list[int], dropout_p: float, *qkv: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    mask = BlockDiagonalMask.from_seqlens(lengths, device=qkv[0].device)
    out: Tensor = memory_efficient_attention(*(x.unsqueeze(0) for x in qkv), attn_bias=mask, p=dropout_p)[0]
    return out


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def _flex(ends: Tensor, dropout_p: float, *qkv: Tensor) -> Tensor:
    """torch's FlexAttention, compiled, with a mask of blocks in which each token has the number of its sequence."""
    if dropout_p:
        raise NotImplementedError("FlexAttention has no dropout")
    from torch.nn.attention.flex_attention import create_block_mask

    tokens = len(qkv[0])
    sequence = torch.bucketize(torch.arange(tokens, device=ends.device), ends[1:].long(), right=True)

    def same(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sequence[q] == sequence[k]

    mask = create_block_mask(same, None, None, tokens, tokens, device=str(ends.device))
    out = _compiled_flex()(*(x.transpose(0, 1).unsqueeze(0) for x in qkv), block_mask=mask)
    return out[0].transpose(0, 1)


class _DeterministicBackward(torch.autograd.Function):
    """run(*inputs), whose backward pass is computed under torch.use_deterministic_algorithms."""

    @staticmethod
    def forward(ctx: Any, run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        with torch.enable_grad():
            ctx.leaves = [x.detach().requires_grad_() for x in inputs]
            ctx.out = run(*ctx.leaves)
        return ctx.out.detach()

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)
        try:
            return None, *torch.autograd.grad(ctx.out, ctx.leaves, dout, retain_graph=True)
        finally:
            torch.use_deterministic_algorithms(before)


def _deterministic(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    out: Tensor = _DeterministicBackward.apply(run, *inputs)
    return out


def _packed(batch: Batch, dropout_p: float, backward: bool) -> dict[str, Callable[..., Tensor]]:
    """The peers of variable length, of queries, keys and values (T, N, D)."""
    settings = batch.cu_seqlens, batch.seqlen, dropout_p
    flash_varlen = partial(_flash_varlen, *settings)
    result: dict[str, Callable[..., Tensor]] = {
        "varlen_attn": partial(_varlen_attn, *settings),
        "flash varlen op": flash_varlen,
        "cuDNN ragged": partial(_cudnn_ragged, *settings),
        "xformers": partial(_xformers, batch.lengths, dropout_p),
        "FlexAttention, torch.compile": partial(_flex, batch.cu_seqlens, dropout_p),
    }
    if backward:
        result["flash varlen op, deterministic"] = partial(_deterministic, flash_varlen)
    packages = {"flash-attn 4": _flash_attn_4, "flash-attn 3": _flash_attn_3, "flash-attn 2": _flash_attn_2}
    for name, run in packages.items():
        result[name] = partial(run, *settings)
        if backward:
            result[f"{name}, deterministic"] = partial(run, *settings, deterministic=True)
    return result


def peers(batch: Batch, dropout_p: float, compiled: bool, backward: bool) -> dict[str, Peer]:
    """Every peer; with `compiled` also eager attention through torch.compile, and for a `backward` pass those that are
    deterministic on request."""
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
    for name, run in _packed(batch, dropout_p, backward).items():
        result[name] = Peer(
            run,
            packed,
            batch.dout,
            lambda out: out if isinstance(out, Tensor) else torch.stack(out, dim=1),
            comparable,
        )
    return result
