"""The one description of attention for tools: see kernels/_common/cases.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels._common.benchmarks import (
    Benchmark,
    ModelCall,
    Peer,
    Plan,
    autocast_parameters,
    dtype_name,
    evenly_spaced,
    first,
    half_filled,
    normal,
    rng_state,
)
from bert_fast.kernels._common.cases import (
    DROPOUT,
    LENGTHS,
    TOKENS,
    D,
    Lengths,
    Malformed,
    N,
    OpCases,
    Sample,
    launchers,
    malformed_calls,
    meta,
    randn,
    with_dropout,
)
from bert_fast.kernels._common.times import size_of_sequences
from bert_fast.kernels.attention import attention
from bert_fast.kernels.attention.mistakes import MASK_PROBE, MISTAKES
from bert_fast.kernels.attention.peers import Batch, packed_sdpa, peers


def samples(lengths: Lengths = None) -> list[Sample]:
    """D decides which kernels run: on a Hopper those of 64 and 128 are others."""
    result: list[Sample] = []
    for heads, dim, own_lengths in ((N, D, LENGTHS), (1, 64, (150, 3)), (1, 128, (150, 3))):
        sizes = own_lengths if lengths is None else lengths
        cu_seqlens = torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

        def call(qkv: Tensor, bias: Tensor, cu_seqlens: Tensor, longest: int = max(sizes), **options: Any) -> Tensor:
            return attention(qkv, cu_seqlens, longest, bias=bias, **options)

        qkv, bias = randn(sum(sizes), 3, heads, dim), randn(3, heads, dim, scale=0.1)
        inputs = {"qkv": qkv, "bias": bias, "cu_seqlens": cu_seqlens}
        result += with_dropout(Sample("" if dim == D else f", D {dim}", call, inputs, parameters=("bias",)))
    return result


def malformed() -> list[Malformed]:
    """Wrong shapes and dtypes, lengths that don't fit the tokens, numbers out of range."""
    qkv, ends = torch.randn(12, 3, 2, 8), torch.tensor([0, 5, 12], dtype=torch.int32)
    valid = {"qkv": qkv, "cu_seqlens": ends, "max_seqlen": 7}

    def lengths(*values: int) -> dict[str, Tensor]:
        return {"cu_seqlens": torch.tensor(values, dtype=torch.int32)}

    state = torch.zeros(2, dtype=torch.int32)
    return malformed_calls(
        attention,
        valid,
        {
            "qkv of three dimensions": (
                {"qkv": qkv[:, 0]},
                ValueError,
                r"qkv has shape \(12, 2, 8\); expected \(T, 3, N, D\)",
            ),
            "integer qkv": ({"qkv": qkv.long()}, TypeError, r"qkv is torch\.int64; expected a floating-point tensor"),
            "head dimension of 0": ({"qkv": qkv[..., :0]}, ValueError, "head dimension D of at least 1"),
            "flat bias": (
                {"bias": torch.zeros(3, 16)},
                ValueError,
                r"bias has shape \(3, 16\); expected \(3, 2, 8\)",
            ),
            "int64 cu_seqlens": (
                {"cu_seqlens": ends.long()},
                TypeError,
                r"cu_seqlens is torch\.int64; expected torch\.int32",
            ),
            "lengths of fewer tokens": (lengths(0, 5, 11), ValueError, "runs from 0 to 11; expected from 0 to 12"),
            "decreasing cu_seqlens": (lengths(0, 15, 12), ValueError, "falls from 15 to 12 at index 2"),
            "max_seqlen too small": ({"max_seqlen": 6}, ValueError, "of 7 tokens; expected at most max_seqlen = 6"),
            "negative max_seqlen": ({"max_seqlen": -1}, ValueError, "max_seqlen is -1"),
            "everything dropped": ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1\.0"),
            "rng_state of another dtype": (
                {"dropout_p": DROPOUT, "rng_state": state},
                TypeError,
                r"rng_state is torch\.int32; expected torch\.int64",
            ),
            "unknown impl": ({"impl": "fastest"}, ValueError, "impl is 'fastest'"),
        },
    )


def launches() -> None:
    """Every regime and packing at the head dims of BERT (64) and MiniLM (32), others with the dropout of training."""
    triton = launchers("attention")
    heads = 12
    cu_seqlens, state = meta(65, dtype=torch.int32), meta(2, dtype=torch.int64)

    def both(dtype: torch.dtype, dim: int, max_seqlen: int, dropout_p: float) -> None:
        qkv, bias = meta(TOKENS, 3, heads, dim, dtype=dtype), meta(3, heads, dim)
        out = meta(TOKENS, heads, dim, dtype=dtype)
        rest = (cu_seqlens, max_seqlen, 0.125, dropout_p, state)
        triton.attention_fwd(qkv, bias, *rest)
        triton.attention_bwd(out, qkv, bias, out, meta(2, heads, TOKENS), *rest)

    sizes = [(64, 16), (64, 32), (64, 64), (64, 128), (64, 512), (32, 128), (32, 512)]
    for (dim, max_seqlen), dropout_p in product(sizes, (0.0, DROPOUT)):
        both(torch.bfloat16, dim, max_seqlen, dropout_p)
    for dim, max_seqlen in ((128, 64), (128, 512), (256, 512), (40, 512)):
        both(torch.bfloat16, dim, max_seqlen, DROPOUT)
    for max_seqlen in (128, 512):
        both(torch.float16, 64, max_seqlen, DROPOUT)
    both(torch.float32, 64, 512, 0.0)
    for dim in (32, 64, 128, 256):  # one regime for all lengths
        both(torch.float32, dim, 512, DROPOUT)


def hostile(operators: Any, device: str) -> list[Callable[[], Any]]:
    """Wrong cu_seqlens, and a max_seqlen that is shorter or longer than the sequences."""
    T = 67
    packs = [  # with D 64 in 16 bits Hopper has kernels of its own
        (torch.randn(T, 3, 2, dim, device=device, dtype=dtype), torch.randn(T, 2, dim, device=device, dtype=dtype))
        for dim, dtype in ((32, torch.float32), (64, torch.bfloat16))
    ]
    state, stats = rng_state(torch.device(device)), torch.randn(2, 2, T, device=device)

    def both(ends: list[int], max_seqlen: int) -> None:
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        rest = (cu_seqlens, max_seqlen, 0.2, DROPOUT, state)
        for qkv, dout in packs:
            operators.attention_fwd(qkv, None, *rest)
            operators.attention_bwd(dout, qkv, None, dout, stats, *rest)

    past_the_end = [0, 30, 5000, T]
    calls = (
        ([0, 40, 20, T], 64),  # decreases
        (past_the_end, 64),
        ([-7, 20, T], 64),  # starts before the first token
        ([0, T, T + 9], 64),  # ends after the last token
        ([0, 2**31 - 1, -(2**31), T], 64),
        ([0, 50, T], 17),  # a sequence longer than max_seqlen
        (past_the_end, 4096),
    )
    return [partial(both, *call) for call in calls]


def extra(impl: str, device: str) -> None:
    """BF16: sequences of several blocks of keys, and several sequences in one tile."""
    state = rng_state(torch.device(device))
    for ends, dim in product(([0, 150, 150, 193, 202], [0, 9, 9, 25, 30]), (32, 64, 128)):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=device)
        qkv = torch.randn(ends[-1], 3, 1, dim, device=device, dtype=torch.bfloat16, requires_grad=True)
        bias = torch.randn(3, 1, dim, device=device, requires_grad=True)
        longest = int(cu_seqlens.diff().max())
        attention(qkv, cu_seqlens, longest, bias=bias, dropout_p=DROPOUT, rng_state=state, impl=impl).sum().backward()


GPU_TOKENS = 16384
SCORES = 2**27  # of the sequences compared under dropout, in the float64 reference: a gigabyte


def _flops(lengths: list[int], heads: int, dim: int, which: str) -> int:
    """Of real tokens: 4 S^2 D a head forward, 2.5 times that backward."""
    forward = sum(4 * length**2 * dim * heads for length in lengths)
    return forward if which == "forward" else int(3.5 * forward)


def _traffic(qkv: Tensor, which: str) -> int:
    """Bytes of q, k, v and the output, and backward of these, the output's gradient and theirs."""
    return qkv.nbytes * 4 // 3 if which == "forward" else qkv.nbytes * 4


def cpu_benchmark(
    device: torch.device,
    lengths: list[int],
    dtype: torch.dtype,
    which: str,
    heads: int = 12,
    dim: int = 64,
    dropout_p: float = 0.0,
) -> Benchmark:
    tokens = sum(lengths)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    state = rng_state(device) if dropout_p else None

    def call(qkv: Tensor, bias: Tensor, *, impl: str) -> Tensor:
        return attention(qkv, ends, max(lengths), bias=bias, dropout_p=dropout_p, rng_state=state, impl=impl)

    qkv = normal(device, tokens, 3, heads, dim, dtype=dtype)
    return Benchmark(
        call,
        (qkv, *autocast_parameters([normal(device, 3, heads, dim, dtype=dtype)])),
        {} if dropout_p else {"torch sdpa": Peer(packed_sdpa(lengths, heads, dim))},
        32 * torch.finfo(dtype).eps,
        dtype,
        which,
        normal(device, tokens, heads, dim, dtype=dtype),
        flops=_flops(lengths, heads, dim, which),
        traffic=_traffic(qkv, which),
        length=max(lengths),
        size=size_of_sequences(tokens, max(lengths), dim, dropout_p),
    )


def in_model(device: torch.device, call: ModelCall) -> dict[str, Callable[[], Benchmark]]:
    """Self-attention of a packed batch."""
    heads, dim = call.heads, call.hidden // call.heads
    make = partial(cpu_benchmark, device, call.lengths, call.dtype, call.which, heads, dim, call.dropout_p)
    return {"attention": make}


def _exact(batch: Batch, which: str, **options: Any) -> Tensor:
    """The float64 output, or gradient of qkv, of the reference."""
    qkv = batch.qkv.double().requires_grad_(which != "forward")
    out = attention(qkv, batch.cu_seqlens, batch.seqlen, impl="reference", **options)
    return out if which == "forward" else torch.autograd.grad(out, qkv, batch.dout.double())[0]


def _leading(batch: Batch) -> Batch:
    """As many leading sequences as SCORES allows; alone they have the same dropout masks."""
    count, heads = 1, batch.qkv.shape[2]
    while count < len(batch.lengths) and (count + 1) * max(batch.lengths[: count + 1]) ** 2 * heads <= SCORES:
        count += 1
    tokens = sum(batch.lengths[:count])
    return Batch(batch.qkv[:tokens], batch.dout[:tokens], batch.lengths[:count])


def gpu_benchmark(
    device: torch.device, lengths: list[int], dim: int, dtype: torch.dtype, which: str, dropout_p: float, compiled: bool
) -> Benchmark:
    tokens, heads = sum(lengths), 1024 // dim  # BERT-large
    qkv, dout = normal(device, tokens, 3, heads, dim, dtype=dtype), normal(device, tokens, heads, dim, dtype=dtype)
    batch, state = Batch(qkv, dout, lengths), rng_state(device) if dropout_p else None
    compared = _leading(batch) if dropout_p else batch

    def exact() -> Tensor:
        if dropout_p:
            return _exact(compared, which, dropout_p=dropout_p, rng_state=state)
        parts = zip(qkv.split(lengths), dout.split(lengths), lengths, strict=True)
        return torch.cat([_exact(Batch(part, grad, [length]), which) for part, grad, length in parts])

    cu_seqlens = batch.cu_seqlens

    def call(qkv: Tensor, bias: Tensor | None = None, *, impl: str) -> Tensor:
        return attention(qkv, cu_seqlens, batch.seqlen, bias=bias, dropout_p=dropout_p, rng_state=state, impl=impl)

    return Benchmark(
        call,
        (qkv,),  # no bias, as the peers
        peers(batch, dropout_p, compiled, which != "forward"),
        8 * torch.finfo(dtype).eps,  # P and dS are rounded to dtype once each, the result once
        dtype,
        which,
        dout,
        exact,
        flops=_flops(lengths, heads, dim, which),
        traffic=_traffic(qkv, which),
        result=lambda out: first(out)[: len(compared.qkv)],
        length=max(lengths),
        size=size_of_sequences(tokens, batch.seqlen, dim, dropout_p),
        also={", with bias": (qkv, qkv.new_zeros(qkv.shape[1:], dtype=torch.float32))},  # the result is the same
    )


def benchmarks(device: torch.device, quick: bool) -> list[Plan]:
    """At full length and half filled, compared with PyTorch's scaled_dot_product_attention (peers.py)."""
    passes = ("forward", "forward + backward")
    if device.type == "cpu":
        sizes = {
            "8 x 128": [128] * 8,
            "2 x 512": [512] * 2,
            "8 x 512 half filled": evenly_spaced(8, 4, 512),
            "1 x 32": [32],
        }
        return [
            Plan(f"{name} {dtype_name(dtype)} {which}", partial(cpu_benchmark, device, lengths, dtype, which))
            for (name, lengths), dtype, which in product(sizes.items(), (torch.float32, torch.bfloat16), passes)
        ]
    bf16, half = torch.bfloat16, " half filled"
    chosen: list[tuple[int, str, int, torch.dtype, float]] = [  # S, filling, D, dtype, dropout
        (512, "", 64, bf16, 0.0),
        (512, "", 64, bf16, DROPOUT),
        (512, half, 64, bf16, 0.0),
        (512, half, 64, bf16, DROPOUT),
        (128, "", 64, bf16, 0.0),
        (2048, "", 64, bf16, 0.0),
    ]
    if not quick:
        chosen += [
            (128, "", 64, bf16, DROPOUT),
            (128, half, 64, bf16, 0.0),
            (1024, "", 64, bf16, 0.0),
            (2048, "", 64, bf16, DROPOUT),
            (2048, half, 64, bf16, 0.0),
            (4096, "", 64, bf16, 0.0),
            (512, "", 128, bf16, 0.0),
            (512, "", 64, torch.float16, 0.0),
        ]
    plans = []
    for (seqlen, filling, dim, dtype, dropout_p), which in product(chosen, passes):
        count = GPU_TOKENS // seqlen
        lengths = half_filled(2 * count, seqlen) if filling else [seqlen] * count
        # torch.compile takes seconds: only at BERT's usual length, without dropout.
        compiled = seqlen == 512 and dim == 64 and not dropout_p and not (filling and quick)
        name = (
            f"S {seqlen}{filling}{f' D {dim}' * (dim != 64)} {dtype_name(dtype)} {which}{', dropout' * bool(dropout_p)}"
        )
        plans.append(Plan(name, partial(gpu_benchmark, device, lengths, dim, dtype, which, dropout_p, compiled)))
    return plans


CASES = OpCases(
    "attention",
    samples,
    malformed,
    hostile=hostile,
    launches=launches,
    extra=extra,
    mistakes=MISTAKES,
    mask_probe=MASK_PROBE,
    benchmarks=benchmarks,
    in_model=in_model,
)
