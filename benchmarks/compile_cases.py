"""What dispatch can launch: every Triton operator, called at the sizes, dtypes and options that people use.

Each function calls the operators of one room with tensors of the meta device; `compile_report` records the launches.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOKENS = 8192 + 7  # T is no multiple of anything
WIDTHS = (128, 256, 384, 512, 768, 1024)  # E of the BERT family, tiny to large


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def bias_gelu() -> None:
    from bert_fast.kernels.bias_gelu import triton_kernels as ops

    for dtype, tanh in product(DTYPES, (False, True)):
        x, bias = empty(TOKENS, 3072, dtype=dtype), empty(3072)
        ops.bias_gelu_fwd(x, bias, tanh)
        ops.bias_gelu_bwd(x, x, bias, tanh)


CASES: dict[str, Callable[[], Any]] = {"bias_gelu": bias_gelu}
