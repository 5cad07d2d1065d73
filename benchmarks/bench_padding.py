"""padding beside eager PyTorch: boolean indexing out, index assignment back."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.runner import Case, forward_and_backward, main
from bert_fast.kernels import pad, unpad


def eager(x: Tensor, mask: Tensor) -> Tensor:
    where = mask.flatten().nonzero().squeeze(1)
    return torch.zeros_like(x).flatten(0, 1).index_copy(0, where, x.flatten(0, 1)[where]).view_as(x)


def ours(x: Tensor, mask: Tensor) -> Tensor:
    packed = unpad(x, mask, impl="cpu")
    return pad(packed.x, packed.indices, x.shape[0], x.shape[1], impl="cpu")


def cases() -> list[Case]:
    found = []
    lengths = torch.tensor([4 + round(index * 508 / 7) for index in range(8)])
    mask = torch.arange(512) < lengths[:, None]
    for dtype in (torch.float32, torch.bfloat16):
        x, dout = torch.randn(8, 512, 768).to(dtype), torch.randn(8, 512, 768).to(dtype)
        real = int(lengths.sum()) * 768 * x.element_size()
        for grad in (None, dout):
            found.append(
                Case(
                    f"(8, 512, 768) half filled {str(dtype).removeprefix('torch.')} unpad + pad"
                    + ", forward + backward" * (grad is not None),
                    {
                        "eager": forward_and_backward(eager, (x, mask), grad),
                        "bert_fast cpu": forward_and_backward(ours, (x, mask), grad),
                    },
                    forward_and_backward(eager, (x.double(), mask), None if grad is None else grad.double())(),
                    0.0,
                    traffic=(3 * real + x.nbytes) * (1 if grad is None else 2),  # read real, write, read; write all
                )
            )
    return found


if __name__ == "__main__":
    main("padding", cases)
