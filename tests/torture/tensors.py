"""Changes of tensors and scalars for the attacks on kernels and models: of their layout, or of what they say."""

from __future__ import annotations

import ctypes
import mmap
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(x: Tensor) -> Tensor:
    """A contiguous copy of `x` that ends where a page begins that can't be read: reading past its end is a SIGSEGV."""
    if not x.numel() or x.device.type != "cpu":
        return x
    size = -(-x.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, size + mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _LIBC.mprotect(ctypes.c_void_p(address + size), mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=size - x.nbytes).view(x.shape)
    return copy.copy_(x)


def _strided(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, _poison(x))], -1)[..., 0]


def _offset(x: Tensor) -> Tensor:
    flat = torch.full((x.numel() + 3,), _poison(x), dtype=x.dtype)
    flat[3:] = x.flatten()
    return flat[3:].view(x.shape)


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() else x


def _negated(x: Tensor) -> Tensor:
    """The same values with the negative bit of a view, as `.imag` of a conjugate has it."""
    return torch._neg_view(-x) if x.is_floating_point() else x


def _padded_rows(x: Tensor) -> Tensor:
    """Rows with a gap behind each of them."""
    if not x.dim():
        return x
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), _poison(x), dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def _poison(x: Tensor) -> Any:
    return float("nan") if x.is_floating_point() else 1 if x.dtype == torch.bool else 99


LAYOUTS = {
    "strided": _strided,
    "offset": _offset,
    "transposed": _transposed,
    "negative view": _negated,
    "rows with gaps": _padded_rows,
    "guarded": guarded,
}


def _expanded(x: Tensor, rng: Random) -> Tensor:
    """The first row or element repeated with a stride of 0."""
    return x[:1].expand(x.shape) if x.dim() and x.shape[0] else x


def _resized(x: Tensor, rng: Random) -> Tensor:
    """Another size in one dimension: 0, 1, one less, one more or many."""
    if not x.dim():
        return x.expand(rng.choice([1, 3])).clone()
    dim = rng.randrange(x.dim())
    size = x.shape[dim]
    wanted = rng.choice([0, 1, max(size - 1, 0), size + 1, 3 * size + 2])
    if not size:
        return torch.zeros([wanted if d == dim else s for d, s in enumerate(x.shape)], dtype=x.dtype)
    return x.index_select(dim, torch.arange(wanted) % size)


def _reshaped(x: Tensor, rng: Random) -> Tensor:
    changes = [x.flatten(), x[None], x[..., None]]
    changes += [x[0], x.flatten()[0], x.transpose(0, -1)] if x.numel() and x.dim() else []
    return rng.choice(changes)


def _long_view(x: Tensor, rng: Random) -> Tensor:
    """Many more rows, of which only one is in memory: reading them as if they were contiguous is a SIGSEGV."""
    if not x.dim() or not x[:1].numel():
        return x
    return guarded(x[:1].contiguous()).expand(2**18 // x[0].numel() + 3, *x.shape[1:])


_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8, torch.uint8, torch.int32, torch.int64,
    torch.bool, torch.complex64,
)  # fmt: skip


def _other_dtype(x: Tensor, rng: Random) -> Tensor:
    return x.to(rng.choice(_DTYPES))


def _other_values(x: Tensor, rng: Random) -> Tensor:
    """One or all elements out of range."""
    if not x.numel() or x.dtype == torch.bool:
        return x
    if x.is_floating_point() or x.is_complex():
        big = torch.finfo(x.dtype).max if x.is_floating_point() else 1e30
        values: list[Any] = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, big, -big, 1e-40, 3e4]
    else:
        info = torch.iinfo(x.dtype)
        limits = (-1, 0, info.min, info.max, 2**31 - 1, 2**31, -(2**31), 100, 2**40, 7, -100)
        values = [value for value in limits if info.min <= value <= info.max]
    changed = x.clone()
    value = rng.choice(values)
    if rng.random() < 0.5:
        changed.view(-1)[rng.randrange(changed.numel())] = value
    else:
        changed.fill_(value)
    return changed


def _shuffled(x: Tensor, rng: Random) -> Tensor:
    """The same values in another order: lengths that fall, indices that repeat."""
    return (
        x.flatten()[torch.tensor([rng.randrange(x.numel()) for _ in range(x.numel())])].view(x.shape)
        if x.numel()
        else x
    )


def _foreign(x: Tensor, rng: Random) -> Any:
    """Something that is no dense tensor on the CPU."""
    kinds = ["meta", "None", "list", "ndarray", "str", "number", "sparse", "parameter", "requires_grad", "conjugate"]
    kind = rng.choice(kinds)
    if kind == "meta":
        return x.to("meta")
    if kind == "sparse":
        return x.to_sparse() if x.dim() else x
    if kind == "ndarray":
        return x.float().numpy()
    if kind == "parameter":
        return torch.nn.Parameter(x.clone(), requires_grad=False)
    if kind == "requires_grad":
        return x.clone().requires_grad_() if x.is_floating_point() else x
    if kind == "conjugate":
        return x.to(torch.complex64).conj().imag
    return {"None": None, "list": x.tolist(), "str": "x", "number": 3}[kind]


MEANINGS = {
    "expanded": _expanded,
    "resized": _resized,
    "reshaped": _reshaped,
    "many rows": _long_view,
    "another dtype": _other_dtype,
    "other values": _other_values,
    "shuffled": _shuffled,
    "no tensor": _foreign,
}

NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 2**31 - 1, 2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 0.0, 0.5, -0.5, 1.0, 1e-300, 1e-45, 1e38,
    1e300, float("nan"), float("inf"), -float("inf"), True, False, None, "x", "", b"x", [], (1, 2), np.float32(0.1),
    np.int64(3), torch.tensor(0.1),
)  # fmt: skip


def change(value: Any, rng: Random, *, layout_only: bool = False) -> tuple[str, Any]:
    """(what was changed, the changed value) of a tensor or a scalar."""
    if not isinstance(value, Tensor):
        other = rng.choice(NUMBERS)
        return f"{other!r} for {value!r}", other
    if layout_only or rng.random() < 0.4:
        name = rng.choice(list(LAYOUTS))
        return name, LAYOUTS[name](value)
    name = rng.choice(list(MEANINGS))
    changed = MEANINGS[name](value, rng)
    shape = f" {tuple(changed.shape)} {changed.dtype}" if isinstance(changed, Tensor) else f" {type(changed).__name__}"
    return f"{name}{shape.replace('torch.', '')}", changed


def change_layout(name: str, x: Tensor) -> Tensor:
    """`x` in the layout of that name, or its first row "expanded"."""
    return _expanded(x, Random(0)) if name == "expanded" else LAYOUTS[name](x)


def wrong(ours: Any, eager: Any, truth: Any, dtype: torch.dtype | None = None) -> str:
    """What is wrong with `ours`, compared with the reference in the same dtype and in float64; empty if nothing is.

    The bound is far above rounding, which tests of the ops measure: 16 times the error of eager PyTorch, and 1e-4 (in
    16 bits: 4 units in the last place) of the largest value. Faults of an attack are of the size of the values. Where a
    value is not finite in float64, or overflows in the dtype, ours is not finite either or is what eager PyTorch has.
    """
    if not isinstance(ours, Tensor) or not isinstance(truth, Tensor):
        return "" if isinstance(ours, Tensor) == isinstance(truth, Tensor) else f"{ours!r} for {truth!r}"[:200]
    if ours.shape != truth.shape:
        return f"shape {tuple(ours.shape)}; the reference has {tuple(truth.shape)}"
    if ours.device.type == "meta" or not ours.numel():
        return ""
    if not ours.is_floating_point():
        return "" if torch.equal(ours, truth.to(ours.dtype)) else "integers that differ from the reference"
    x, y, z = (t.detach().to(torch.float64) for t in (ours, eager, truth))
    same = (x == y) | (x.isnan() & y.isnan())
    overflows = z.abs() > 0.5 * torch.finfo(ours.dtype).max  # or not, by how an intermediate result was rounded
    finite = z.isfinite() & y.isfinite() & ~overflows
    strange = ~finite & ~same & x.isfinite() & ~z.isfinite()
    if bool(strange.any()):
        return f"{x[strange][0]:.4g} where the reference is {z[strange][0]:.4g}"
    if not bool(finite.any()):
        return ""
    error = (x - z).abs()[finite].nan_to_num(nan=float("inf"))
    scale = float(z[finite].abs().max())
    eps = torch.finfo(dtype or ours.dtype).eps  # a float32 loss of bfloat16 logits is as exact as they are
    floor = max(1e-4, 4 * eps) if eps > 1e-10 else 1e-10
    eager_error = float((y - z).abs()[finite].max())
    if eager_error > 0.5 * scale:
        return ""  # an intermediate result overflows, in eager PyTorch too
    bound = 16 * eager_error + floor * scale + 1e-30
    worst = float(error.max())
    return (
        ""
        if worst <= bound
        else f"error {worst:.3g} of values up to {scale:.3g} (eager PyTorch's times 16: {bound:.3g})"
    )
