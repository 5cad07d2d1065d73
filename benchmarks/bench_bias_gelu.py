"""bias_gelu beside eager PyTorch and torch.compile, forward and forward + backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, forward_and_backward, main
from bert_fast.kernels import bias_gelu


def eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def ours(x: Tensor, bias: Tensor) -> Tensor:
    return bias_gelu(x, bias, impl="cpu")


def cases() -> list[Case]:
    functions = {"eager": eager, "torch.compile": torch.compile(eager), "bert_fast cpu": ours}
    found = []
    for rows, cols in ((128, 3072), (1024, 1024), (1024, 3072)):
        for dtype in (torch.float32, torch.bfloat16):
            x, bias, dout = (torch.randn(shape).to(dtype) for shape in ((rows, cols), (cols,), (rows, cols)))
            for grad in (None, dout):
                found.append(
                    Case(
                        f"({rows}, {cols}) {str(dtype).removeprefix('torch.')} forward"
                        + " + backward" * (grad is not None),
                        {name: forward_and_backward(f, (x, bias), grad) for name, f in functions.items()},
                        forward_and_backward(
                            eager, (x.double(), bias.double()), None if grad is None else grad.double()
                        )(),
                        8 * torch.finfo(dtype).eps,
                        traffic=x.nbytes * (2 if grad is None else 5),  # x, out; and dout, x, dx
                    )
                )
    return found


if __name__ == "__main__":
    main("bias_gelu", cases)
