"""add_layer_norm in C++ behind ctypes, as an implementation: `add_layer_norm(..., impl="mine_cpp")`."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bert_fast.kernels import register

SOURCE = Path(__file__).with_name("add_layer_norm.cpp")


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled source, in a temporary folder."""
    folder = tempfile.TemporaryDirectory()
    path = Path(folder.name) / "add_layer_norm.so"
    compiler = os.environ.get("CXX", "c++")
    subprocess.run([compiler, "-O3", "-std=c++17", "-shared", "-fPIC", str(SOURCE), "-o", str(path)], check=True)
    loaded = ctypes.CDLL(str(path))
    folder.cleanup()  # the loaded library stays
    return loaded


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors]


def forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    x_bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """out (T, E), and what `backward` needs."""
    x, residual, weight, bias = (tensor.contiguous() for tensor in (x, residual, weight, bias))
    x_bias = None if x_bias is None else x_bias.contiguous()
    out, normed, multiplier = (torch.empty_like(x) for _ in range(3))
    rstd = x.new_empty(x.shape[0])
    seed, offset = (0, 0) if rng_state is None else (int(value) % 2**64 for value in rng_state)
    threshold = 0 if rng_state is None else int(256 * dropout_p + 0.5)
    library().forward(
        *_pointers(x, residual, weight, bias, x_bias),
        *(ctypes.c_int64(size) for size in x.shape),
        ctypes.c_float(eps),
        ctypes.c_uint64(seed),
        ctypes.c_uint64(offset),
        ctypes.c_int32(threshold),
        *_pointers(out, normed, rstd, multiplier),
    )
    return out, (weight, normed, rstd, multiplier)


def backward(dout: Tensor, saved: tuple[Tensor, ...], *, x_bias: Tensor | None, **_: Any) -> dict[str, Tensor]:
    """The gradients of the tensors."""
    dout = dout.contiguous()
    dx, dresidual = torch.empty_like(dout), torch.empty_like(dout)
    sums = torch.zeros(3, dout.shape[1], dtype=torch.float64)
    library().backward(
        *_pointers(dout, *saved), *(ctypes.c_int64(size) for size in dout.shape), *_pointers(dx, dresidual, *sums)
    )
    dweight, dbias, dx_bias = sums.float()
    gradients = {"x": dx, "residual": dresidual, "weight": dweight, "bias": dbias}
    return gradients if x_bias is None else {**gradients, "x_bias": dx_bias}


def register_all() -> None:
    register("add_layer_norm", "mine_cpp", forward, backward=backward, device="cpu", dtypes=(torch.float32,))


if __name__ == "bert_fast_third_party_kernels":  # run by --kernels FILE
    register_all()
