"""bias_gelu in Triton: one pass forward; one pass backward that recomputes GeLU's derivative, then the sum for dbias.

Bytes: forward 2 T F elements, backward 3 T F; dbias adds (parts, F) float32, under 1 % of that at T = 8192.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels._common.triton_gelu import gelu, gelu_derivative
from bert_fast.kernels._common.triton_launch import ceil_div, launch, row_parts, rows_contiguous

# Rows and columns of a tile: 2048 elements on 4 warps are two 16-byte loads of bf16 per thread, enough in flight to
# hide the exponential. Chosen by counting bytes and registers, not measured on a GPU yet.
BLOCK_T, BLOCK_F = 4, 512


@triton.jit
def _sigmoid_2y(u):
    """sigmoid(2 y) = 0.5 (1 + tanh(y)) of the tanh approximation and its derivative in 2 y, without cancellation."""
    z = 1.5957691216057308 * (u + 0.044715 * u * u * u)
    q = tl.exp(-tl.abs(z))
    r = 1.0 / (1.0 + q)
    return tl.where(z >= 0, r, q * r), q * r * r


@triton.jit
def _gelu(u, TANH: tl.constexpr):
    if TANH:
        s, _ = _sigmoid_2y(u)
        return u * s
    return gelu(u)


@triton.jit
def _gelu_derivative(u, TANH: tl.constexpr):
    if TANH:
        s, ds = _sigmoid_2y(u)
        v = tl.minimum(tl.abs(u), 10.0)  # beyond, ds is 0 to 1e-38 and u * u may be infinite
        return s + u * ds * 1.5957691216057308 * (1.0 + 0.134145 * v * v)
    return gelu_derivative(u)


@triton.jit
def _fwd_kernel(x, bias, out, T, F, stride_x, TANH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = (t < T)[:, None] & (f < F)[None, :]
    u = tl.load(x + t[:, None] * stride_x + f[None, :], mask=inside, other=0.0).to(tl.float32)
    u += tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    tl.store(out + t[:, None] * F + f[None, :], _gelu(u, TANH).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _bwd_kernel(
    dout, x, bias, dx, partial, T, F, stride_dout, stride_x, rows,
    TANH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_F columns of `rows` rows and writes the sums of its dx to a row of `partial`."""
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    b = tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
    first = tl.program_id(0).to(tl.int64) * rows
    total = tl.zeros((BLOCK_T, BLOCK_F), tl.float32)
    for start in range(0, rows, BLOCK_T):
        row = start + tl.arange(0, BLOCK_T)
        t = first + row
        inside = ((row < rows) & (t < T))[:, None] & (f < F)[None, :]
        u = tl.load(x + t[:, None] * stride_x + f[None, :], mask=inside, other=0.0).to(tl.float32) + b
        d = tl.load(dout + t[:, None] * stride_dout + f[None, :], mask=inside, other=0.0).to(tl.float32)
        d *= _gelu_derivative(u, TANH)
        tl.store(dx + t[:, None] * F + f[None, :], d.to(dx.dtype.element_ty), mask=inside)
        total += d
    tl.store(partial + tl.program_id(0) * F + f, tl.sum(total, axis=0), mask=f < F)


def bias_gelu_fwd(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    x = rows_contiguous(x)
    out = x.new_empty(x.shape)
    T, F = x.shape
    launch(
        _fwd_kernel, (ceil_div(T, BLOCK_T), ceil_div(F, BLOCK_F)),
        x, bias.contiguous(), out, T, F, x.stride(0), TANH=tanh, BLOCK_T=BLOCK_T, BLOCK_F=BLOCK_F,
    )  # fmt: skip
    return out


def bias_gelu_bwd(dout: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    x, dout = rows_contiguous(x), rows_contiguous(dout)
    T, F = x.shape
    parts, rows = row_parts(T)
    dx, partial = x.new_empty(x.shape), x.new_empty((parts, F), dtype=torch.float32)
    launch(
        _bwd_kernel, (parts, ceil_div(F, BLOCK_F)),
        dout, x, bias.contiguous(), dx, partial, T, F, dout.stride(0), x.stride(0), rows,
        TANH=tanh, BLOCK_T=BLOCK_T, BLOCK_F=BLOCK_F,
    )  # fmt: skip
    return dx, partial.sum(0)
