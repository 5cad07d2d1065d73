"""padding beside eager PyTorch: boolean indexing out, index assignment back.

On a GPU `unpad` waits for the device, since the number of tokens is a host number, and so does the peer: these cases
are timed by plain calls. `pad` alone does not wait.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor

from benchmarks.runner.lengths import half_filled
from benchmarks.runner.runner import Case, Plan, Setting, forward_and_backward, main
from bert_fast.kernels import pad, unpad


def eager(x: Tensor, mask: Tensor) -> Tensor:
    where = mask.flatten().nonzero().squeeze(1)
    return torch.zeros_like(x).flatten(0, 1).index_copy(0, where, x.flatten(0, 1)[where]).view_as(x)


def ours(impl: str, x: Tensor, mask: Tensor) -> Tensor:
    packed = unpad(x, mask, impl=impl)
    return pad(packed.x, packed.indices, x.shape[0], x.shape[1], impl=impl)


def unpad_pad(setting: Setting, lengths: list[int], hidden: int, dtype: torch.dtype, backward: bool) -> Case:
    batch, seqlen = len(lengths), 512
    mask = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).to(setting.device)
    x, dout = (setting.randn(batch, seqlen, hidden, dtype=dtype) for _ in range(2))
    grad = dout if backward else None
    real = sum(lengths) * hidden * x.element_size()
    return Case(
        {
            "eager": forward_and_backward(eager, (x, mask), grad),
            **{
                f"bert_fast {impl}": forward_and_backward(partial(ours, impl), (x, mask), grad)
                for impl in setting.ours("padding", dtype)
            },
        },
        forward_and_backward(eager, (x.double(), mask), None if grad is None else grad.double())(),
        0.0,
        traffic=(3 * real + x.nbytes) * (2 if backward else 1),  # read real, write, read; write all
        dtype=dtype,
        graph=False,
    )


def pad_alone(setting: Setting, lengths: list[int], hidden: int, dtype: torch.dtype) -> Case:
    batch, seqlen = len(lengths), 512
    where = (torch.arange(seqlen) < torch.tensor(lengths)[:, None]).flatten().nonzero().squeeze(1).to(setting.device)
    x = setting.randn(sum(lengths), hidden, dtype=dtype)

    def peer(x: Tensor, where: Tensor) -> Tensor:
        return x.new_zeros(batch * seqlen, hidden).index_copy(0, where, x).view(batch, seqlen, hidden)

    def mine(impl: str, x: Tensor, where: Tensor) -> Tensor:
        return pad(x, where, batch, seqlen, impl=impl)

    return Case(
        {
            "eager": forward_and_backward(peer, (x, where), None),
            **{
                f"bert_fast {impl}": forward_and_backward(partial(mine, impl), (x, where), None)
                for impl in setting.ours("padding", dtype)
            },
        },
        peer(x, where),
        0.0,
        traffic=x.nbytes + batch * seqlen * hidden * x.element_size(),
        dtype=dtype,
    )


def plans(setting: Setting) -> list[Plan]:
    if setting.on_gpu:
        widths = (1024,) if setting.quick else (768, 1024)
        sizes = [(half_filled(64, 512), hidden, torch.bfloat16) for hidden in widths]
    else:
        lengths = [4 + round(index * 508 / 7) for index in range(8)]
        sizes = [(lengths, 768, dtype) for dtype in (torch.float32, torch.bfloat16)]
    found = [
        Plan(
            f"({len(lengths)}, 512, {hidden}) half filled {str(dtype).removeprefix('torch.')} unpad + pad"
            + ", forward + backward" * backward,
            partial(unpad_pad, setting, lengths, hidden, dtype, backward),
        )
        for (lengths, hidden, dtype), backward in product(sizes, (False, True))
    ]
    if setting.on_gpu:
        found += [
            Plan(
                f"({len(lengths)}, 512, {hidden}) half filled {str(dtype).removeprefix('torch.')} pad",
                partial(pad_alone, setting, lengths, hidden, dtype),
            )
            for lengths, hidden, dtype in sizes
        ]
    return found


if __name__ == "__main__":
    main("padding", plans)
