"""gelu(x + bias) in Triton, as an implementation of bias_gelu: `bias_gelu(x, bias, impl="mine_triton")`."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels import register

BLOCK = 4096


@triton.jit
def _cdf(u, TANH: tl.constexpr):
    """Phi(u), or its tanh approximation: 0.5 (1 + tanh(z)) = sigmoid(2 z)."""
    if TANH:
        return tl.sigmoid(1.5957691216057308 * (u + 0.044715 * u * u * u))
    return 0.5 * (1.0 + tl.erf(u * 0.7071067811865476))


@triton.jit
def _forward_kernel(x_ptr, bias_ptr, out_ptr, count, width, TANH: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    u = x + tl.load(bias_ptr + offsets % width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (u * _cdf(u, TANH)).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dout_ptr, x_ptr, bias_ptr, du_ptr, count, width, TANH: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < count
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    u = x + tl.load(bias_ptr + offsets % width, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    cdf = _cdf(u, TANH)
    if TANH:
        slope = cdf * _cdf(-u, TANH) * 1.5957691216057308 * (1.0 + 0.134145 * u * u)  # 1 - cdf would cancel
    else:
        slope = 0.3989422804014327 * tl.exp(-0.5 * u * u)
    tl.store(du_ptr + offsets, dout * (cdf + u * slope), mask=inside)


def forward(x: Tensor, bias: Tensor, *, approximate: str = "none") -> tuple[Tensor, tuple[Tensor, ...]]:
    """out (T, F) in the dtype of x, and what `backward` needs."""
    x, bias = x.contiguous(), bias.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        _forward_kernel[grid](x, bias, out, x.numel(), x.shape[1], TANH=approximate == "tanh", BLOCK=BLOCK)
    return out, (x, bias)


def backward(dout: Tensor, saved: tuple[Tensor, ...], *, approximate: str, **_: Any) -> dict[str, Tensor]:
    """dx and dbias; the sum over rows is torch's."""
    x, bias = saved
    du = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    if x.numel():
        grid = (triton.cdiv(x.numel(), BLOCK),)
        tanh = approximate == "tanh"
        _backward_kernel[grid](dout.contiguous(), x, bias, du, x.numel(), x.shape[1], TANH=tanh, BLOCK=BLOCK)
    return {"x": du.to(x.dtype), "bias": du.sum(0).to(bias.dtype)}


def register_all() -> None:
    device = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    register("bias_gelu", "mine_triton", forward, backward=backward, device=device, dtypes=dtypes)


if __name__ == "bert_fast_third_party_kernels":  # run by --kernels FILE
    register_all()
