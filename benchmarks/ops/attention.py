"""attention beside torch's scaled_dot_product_attention, at full length and half filled.

FLOPs count real tokens only: 4 S^2 D a head forward, 2.5 times that again backward.

On a CPU the peer gets what it is given in a BERT: the packed projections plus their bias, split into heads, padded,
with a mask where lengths differ. On a GPU the peers are kernels, in the layouts that suit them (`attention_peers.py`),
and ours is timed without a bias, as they are; "with bias" adds the projections' bias and its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.ops.attention_peers import Batch, gradients, peers, truth, without_gradients
from benchmarks.runner.lengths import half_filled
from benchmarks.runner.runner import Case, Plan, Setting, Variant, forward_and_backward, main
from bert_fast.kernels import attention

HEADS, DIM = 12, 64
GPU_TOKENS, GPU_HEADS = 16384, 16  # BERT-large's heads
DROPOUT = 0.1
SCORES = 2**27  # of the sequences that are compared under dropout, with the float64 reference: a gigabyte


def sdpa(lengths: list[int], seqlen: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Padded attention over packed input: scatter, attend with a key mask, gather."""
    keep = torch.arange(seqlen) < torch.tensor(lengths)[:, None]
    where = keep.flatten().nonzero().squeeze(1)
    mask = None if bool(keep.all()) else keep[:, None, None, :]

    def run(qkv: Tensor, bias: Tensor) -> Tensor:
        padded = qkv.new_zeros(len(lengths) * seqlen, 3, HEADS, DIM).index_copy(0, where, qkv + bias)
        query, key, value = padded.view(len(lengths), seqlen, 3, HEADS, DIM).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return out.transpose(1, 2).reshape(-1, HEADS, DIM)[where]

    return run


def work(lengths: list[int], heads: int, dim: int, backward: bool) -> int:
    """FLOPs."""
    forward = sum(4 * length**2 * dim * heads for length in lengths)
    return int(3.5 * forward) if backward else forward


def on_cpu(setting: Setting, lengths: list[int], dtype: torch.dtype, backward: bool) -> Case:
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    tokens, seqlen = sum(lengths), max(lengths)

    def ours(impl: str, qkv: Tensor, bias: Tensor) -> Tensor:
        return attention(qkv, ends, seqlen, bias=bias, impl=impl)

    peer = sdpa(lengths, seqlen)
    inputs = (setting.randn(tokens, 3, HEADS, DIM, dtype=dtype), setting.randn(3, HEADS, DIM, dtype=dtype))
    exact = tuple(part.double() for part in inputs)
    dout = setting.randn(tokens, HEADS, DIM, dtype=dtype) if backward else None
    return Case(
        {
            "torch sdpa": forward_and_backward(peer, inputs, dout),
            **{
                f"bert_fast {impl}": forward_and_backward(partial(ours, impl), inputs, dout)
                for impl in setting.ours("attention", dtype)
            },
        },
        forward_and_backward(peer, exact, None if dout is None else dout.double())(),
        32 * torch.finfo(dtype).eps,
        flops=work(lengths, HEADS, DIM, backward),
        dtype=dtype,
    )


def variants_of_ours(
    setting: Setting, batch: Batch, dropout_p: float, backward: bool, tokens: int
) -> dict[str, Variant]:
    """Our implementations, compared at the first `tokens` tokens."""
    ends, state = batch.cu_seqlens, setting.rng_state() if dropout_p else None

    def ours(impl: str, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        return attention(qkv, ends, batch.seqlen, bias=bias, dropout_p=dropout_p, rng_state=state, impl=impl)

    bias = batch.qkv.new_zeros(batch.qkv.shape[1:], dtype=torch.float32)  # of zeros: the same result
    found = {}
    for impl in setting.ours("attention", batch.qkv.dtype):
        for name, inputs in ((f"bert_fast {impl}", (batch.qkv,)), (f"bert_fast {impl}, with bias", (batch.qkv, bias))):
            if backward:
                run = gradients(partial(ours, impl), inputs, batch.dout)
                found[name] = Variant(run, lambda grads: grads[0][:tokens])
            else:
                found[name] = Variant(without_gradients(partial(ours, impl), inputs), lambda out: out[:tokens])
    return found


def dropout_truth(setting: Setting, batch: Batch) -> tuple[Callable[[bool], Tensor], int]:
    """The float64 reference with dropout, of as many leading sequences as its memory allows; and their tokens.

    A sequence's mask depends on where its tokens are in the pack, so the leading ones alone have the same.
    """
    count, heads = 1, batch.qkv.shape[2]
    while count < len(batch.lengths) and (count + 1) * max(batch.lengths[: count + 1]) ** 2 * heads <= SCORES:
        count += 1
    lengths = batch.lengths[:count]
    tokens, ends = sum(lengths), batch.cu_seqlens[: count + 1]

    def reference(qkv: Tensor) -> Tensor:
        return attention(qkv, ends, max(lengths), dropout_p=DROPOUT, rng_state=setting.rng_state(), impl="reference")

    def compute(backward: bool) -> Tensor:
        dout = batch.dout[:tokens].double() if backward else None
        return forward_and_backward(reference, (batch.qkv[:tokens].double(),), dout)()

    return compute, tokens


def on_gpu(
    setting: Setting, lengths: list[int], heads: int, dim: int, dtype: torch.dtype, dropout_p: float, backward: bool
) -> Case:
    shape = (sum(lengths), heads, dim)
    batch = Batch(setting.randn(shape[0], 3, *shape[1:], dtype=dtype), setting.randn(*shape, dtype=dtype), lengths)
    if dropout_p:
        compute, tokens = dropout_truth(setting, batch)
        exact = compute(backward)
    else:
        exact, tokens = truth(batch, backward), shape[0]
    # A compiled peer costs seconds: at BERT's usual length, without dropout, is where it is asked for.
    uniform = len(set(lengths)) == 1
    compiled = batch.seqlen == 512 and dim == 64 and not dropout_p and (uniform or not setting.quick)
    return Case(
        {
            **peers(batch, dropout_p, backward, compiled),
            **variants_of_ours(setting, batch, dropout_p, backward, tokens),
        },
        exact,
        8 * torch.finfo(dtype).eps,  # P and dS are rounded to dtype once each, the result once
        flops=work(lengths, heads, dim, backward),
        dtype=dtype,
    )


def gpu_plans(setting: Setting) -> list[Plan]:
    bf16 = torch.bfloat16
    full = {seqlen: [seqlen] * (GPU_TOKENS // seqlen) for seqlen in (128, 512, 1024, 2048, 4096)}
    half = {seqlen: half_filled(2 * GPU_TOKENS // seqlen, seqlen) for seqlen in (128, 512, 2048)}
    # (what, lengths, dim, dtype, dropout), what matters most first: a short budget leaves the rest out
    found: list[tuple[str, list[int], int, torch.dtype, float]] = [
        ("S 512", full[512], 64, bf16, 0.0),
        ("S 512", full[512], 64, bf16, DROPOUT),
        ("S 512 half filled", half[512], 64, bf16, 0.0),
        ("S 512 half filled", half[512], 64, bf16, DROPOUT),
        ("S 128", full[128], 64, bf16, 0.0),
        ("S 2048", full[2048], 64, bf16, 0.0),
    ]
    if not setting.quick:
        found += [
            ("S 128", full[128], 64, bf16, DROPOUT),
            ("S 128 half filled", half[128], 64, bf16, 0.0),
            ("S 1024", full[1024], 64, bf16, 0.0),
            ("S 2048", full[2048], 64, bf16, DROPOUT),
            ("S 2048 half filled", half[2048], 64, bf16, 0.0),
            ("S 4096", full[4096], 64, bf16, 0.0),
            ("S 512 D 128", full[512], 128, bf16, 0.0),
            ("S 512", full[512], 64, torch.float16, 0.0),
        ]
    return [
        Plan(
            f"{what} {str(dtype).removeprefix('torch.')} forward"
            + " + backward" * backward
            + ", dropout" * bool(dropout_p),
            partial(on_gpu, setting, lengths, GPU_HEADS * 64 // dim, dim, dtype, dropout_p, backward),
        )
        for (what, lengths, dim, dtype, dropout_p), backward in product(found, (False, True))
    ]


def plans(setting: Setting) -> list[Plan]:
    if setting.on_gpu:
        return gpu_plans(setting)
    half = [4 + round(index * 508 / 7) for index in range(8)]  # evenly spaced from 4 to 512
    sizes = (
        ("8 x 128", [128] * 8),
        ("2 x 512", [512] * 2),
        ("8 x 512 half filled", half),
        ("1 x 32", [32]),
    )
    return [
        Plan(
            f"{name} {str(dtype).removeprefix('torch.')} forward" + " + backward" * backward,
            partial(on_cpu, setting, lengths, dtype, backward),
        )
        for (name, lengths), dtype, backward in product(sizes, (torch.float32, torch.bfloat16), (False, True))
    ]


if __name__ == "__main__":
    main("attention", plans)
