"""add_layer_norm beside eager PyTorch and torch.compile, with and without dropout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner import Case, forward_and_backward, main
from bert_fast.kernels import add_layer_norm

EPS = 1e-12


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return F.layer_norm(residual + (x + x_bias), weight.shape, weight, bias, EPS)


def eager_dropout(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return F.layer_norm(residual + F.dropout(x + x_bias, 0.1), weight.shape, weight, bias, EPS)


def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return add_layer_norm(x, residual, weight, bias, x_bias=x_bias, impl="cpu")


def ours_dropout(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return add_layer_norm(x, residual, weight, bias, x_bias=x_bias, dropout_p=0.1, impl="cpu")


def cases() -> list[Case]:
    """Without dropout errors are checked; with it the masks of the peers differ, so only the speed is compared."""
    plain = {"eager": eager, "torch.compile": torch.compile(eager), "bert_fast cpu": ours}
    dropped = {"eager": eager_dropout, "torch.compile": torch.compile(eager_dropout), "bert_fast cpu": ours_dropout}
    found = []
    for rows, cols in ((128, 768), (1024, 768), (2048, 1024)):
        for dtype in (torch.float32, torch.bfloat16):
            x, residual, dout = (torch.randn(rows, cols).to(dtype) for _ in range(3))
            inputs = (x, residual, *(torch.randn(cols).to(dtype) for _ in range(3)))
            exact = tuple(part.double() for part in inputs)
            for what, grad, functions in (
                ("forward", None, plain),
                ("forward + backward", dout, plain),
                ("forward + backward, dropout", dout, dropped),
            ):
                found.append(
                    Case(
                        f"({rows}, {cols}) {str(dtype).removeprefix('torch.')} {what}",
                        {name: forward_and_backward(f, inputs, grad) for name, f in functions.items()},
                        forward_and_backward(eager, exact, None if grad is None else grad.double())(),
                        16 * torch.finfo(dtype).eps if functions is plain else float("inf"),
                        traffic=x.nbytes
                        * (3 if grad is None else 8),  # x, residual, out; x, residual, dout, dx, dresidual
                    )
                )
    return found


if __name__ == "__main__":
    main("add_layer_norm", cases)
