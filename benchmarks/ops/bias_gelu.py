"""bias_gelu beside eager PyTorch and torch.compile, forward and backward.

On a GPU x is bfloat16 and our bias float32, as in a model under autocast; the peers get the bias as bfloat16.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.runner.runner import Case, Plan, Setting, main, passes
from bert_fast.kernels import bias_gelu

PASSES = {"forward": 2, "backward": 3, "forward + backward": 5}  # x, out; dout, x, dx


def eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def case(setting: Setting, rows: int, cols: int, dtype: torch.dtype, which: str) -> Case:
    x, bias, dout = (setting.randn(*shape, dtype=dtype) for shape in ((rows, cols), (cols,), (rows, cols)))
    mine = (x, bias.float() if setting.on_gpu else bias)
    return Case(
        {
            "eager": passes(eager, (x, bias), dout, which),
            "torch.compile": passes(torch.compile(eager, dynamic=False), (x, bias), dout, which),
            **{
                f"bert_fast {impl}": passes(partial(bias_gelu, impl=impl), mine, dout, which)
                for impl in setting.ours("bias_gelu", dtype)
            },
        },
        passes(eager, (x.double(), bias.double()), dout.double(), which)(),
        8 * torch.finfo(dtype).eps,
        traffic=x.nbytes * PASSES[which],
        dtype=dtype,
    )


def plans(setting: Setting) -> list[Plan]:
    if setting.on_gpu:
        sizes = ((16384, 4096), (8192, 3072)) if setting.quick else tuple(product((16384, 8192), (4096, 3072)))
        dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
        kinds = ("forward", "backward")
    else:
        sizes = ((128, 3072), (1024, 1024), (1024, 3072))
        dtypes = (torch.float32, torch.bfloat16)
        kinds = ("forward", "forward + backward")
    return [
        Plan(
            f"({rows}, {cols}) {str(dtype).removeprefix('torch.')} {which}",
            partial(case, setting, rows, cols, dtype, which),
        )
        for (rows, cols), dtype, which in product(sizes, dtypes, kinds)
    ]


if __name__ == "__main__":
    main("bias_gelu", plans)
