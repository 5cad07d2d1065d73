"""add_layer_norm beside eager PyTorch and torch.compile, with and without dropout.

On a GPU the activations are bfloat16 and our parameters float32, as in a model under autocast; the peers get the same
values as bfloat16, which costs them fewer bytes.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner.runner import Case, Plan, Setting, Variant, main, passes
from bert_fast.kernels import add_layer_norm

EPS, DROPOUT = 1e-12, 0.1
# x, residual, out; x, residual, dout, dx, dresidual
PASSES = {"forward": 3, "backward": 5, "forward + backward": 8}


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return F.layer_norm(residual + (x + x_bias), weight.shape, weight, bias, EPS)


def eager_dropout(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
    return F.layer_norm(residual + F.dropout(x + x_bias, DROPOUT), weight.shape, weight, bias, EPS)


def case(setting: Setting, rows: int, cols: int, dtype: torch.dtype, which: str, dropout_p: float) -> Case:
    """With dropout the peers' masks are their own: ours is compared with the reference, they are compared in speed."""
    x, residual, dout = (setting.randn(rows, cols, dtype=dtype) for _ in range(3))
    inputs = (x, residual, *(setting.randn(cols, dtype=dtype) for _ in range(3)))
    exact = tuple(part.double() for part in inputs)
    mine = (x, residual, *(part.float() for part in inputs[2:])) if setting.on_gpu else inputs
    state = setting.rng_state() if dropout_p else None

    def ours(impl: str, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor) -> Tensor:
        return add_layer_norm(
            x, residual, weight, bias, x_bias=x_bias, dropout_p=dropout_p, eps=EPS, rng_state=state, impl=impl
        )

    peer = eager_dropout if dropout_p else eager
    truth = passes(partial(ours, "reference"), exact, dout.double(), which)()
    return Case(
        {
            "eager": Variant(passes(peer, inputs, dout, which), comparable=not dropout_p),
            "torch.compile": Variant(
                passes(torch.compile(peer, dynamic=False), inputs, dout, which), comparable=not dropout_p
            ),
            **{
                f"bert_fast {impl}": passes(partial(ours, impl), mine, dout, which)
                for impl in setting.ours("add_layer_norm", dtype)
            },
        },
        truth,
        16 * torch.finfo(dtype).eps,
        traffic=x.nbytes * PASSES[which],
        dtype=dtype,
    )


def plans(setting: Setting) -> list[Plan]:
    if setting.on_gpu:
        sizes = ((16384, 1024), (8192, 768)) if setting.quick else tuple(product((16384, 8192), (1024, 768)))
        dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
        kinds = (("forward", 0.0), ("backward", 0.0), ("forward", DROPOUT), ("backward", DROPOUT))
    else:
        sizes = ((128, 768), (1024, 768), (2048, 1024))
        dtypes = (torch.float32, torch.bfloat16)
        kinds = (("forward", 0.0), ("forward + backward", 0.0), ("forward + backward", DROPOUT))
    return [
        Plan(
            f"({rows}, {cols}) {str(dtype).removeprefix('torch.')} {which}" + ", dropout" * bool(dropout_p),
            partial(case, setting, rows, cols, dtype, which, dropout_p),
        )
        for (rows, cols), dtype, (which, dropout_p) in product(sizes, dtypes, kinds)
    ]


if __name__ == "__main__":
    main("add_layer_norm", plans)
