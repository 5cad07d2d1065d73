"""attention beside torch's scaled_dot_product_attention, at full length and half filled.

The peer gets what it is given in a BERT: the packed projections plus their bias, split into heads, padded, with a mask
where lengths differ. FLOPs count real tokens only: 4 S^2 D a head forward, 2.5 times that again backward.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, forward_and_backward, main
from bert_fast.kernels import attention

HEADS, DIM = 12, 64


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


def cases() -> list[Case]:
    found = []
    half = [4 + round(index * 508 / 7) for index in range(8)]  # evenly spaced from 4 to 512
    for name, lengths in (
        ("8 x 128", [128] * 8),
        ("2 x 512", [512] * 2),
        ("8 x 512 half filled", half),
        ("1 x 32", [32]),
    ):
        ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        tokens, seqlen = int(ends[-1]), max(lengths)

        def ours(qkv: Tensor, bias: Tensor, ends: Tensor = ends, seqlen: int = seqlen) -> Tensor:
            return attention(qkv, ends, seqlen, bias=bias, impl="cpu")

        peer = sdpa(lengths, seqlen)
        work = sum(4 * length**2 * DIM * HEADS for length in lengths)
        for dtype in (torch.float32, torch.bfloat16):
            inputs = (torch.randn(tokens, 3, HEADS, DIM).to(dtype), torch.randn(3, HEADS, DIM).to(dtype))
            exact = tuple(part.double() for part in inputs)
            dout = torch.randn(tokens, HEADS, DIM).to(dtype)
            for grad in (None, dout):
                found.append(
                    Case(
                        f"{name} {str(dtype).removeprefix('torch.')} forward" + " + backward" * (grad is not None),
                        {
                            "torch sdpa": forward_and_backward(peer, inputs, grad),
                            "bert_fast cpu": forward_and_backward(ours, inputs, grad),
                        },
                        forward_and_backward(peer, exact, None if grad is None else grad.double())(),
                        32 * torch.finfo(dtype).eps,
                        flops=work if grad is None else int(3.5 * work),
                    )
                )
    return found


if __name__ == "__main__":
    main("attention", cases)
