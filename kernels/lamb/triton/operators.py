"""LAMB in Triton: multi-tensor kernels, three launches for any number of tensors, and one for the global norm.

The first pass updates the moments and sums |w|^2 and |u|^2 of each chunk; a small kernel computes each tensor's step
size from them; the last pass recomputes u and writes w. Bytes for each float32 parameter: 24 and 16; storing u would
move as many and take 4 more bytes of memory. There is no synchronization with the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from bert_fast.kernels._common.triton_launch import launch
from bert_fast.kernels.lamb.memory import dense, same_dense_memory
from bert_fast.kernels.lamb.triton.tables import CHUNK, Tables, groups

# Elements of a step: 8 per thread on 4 warps, two 16-byte loads from each of four float32 tensors. Chosen by counting
# bytes and registers, not measured on a GPU yet.
BLOCK = 1024
# Not specialized: Triton would compile again where they are 1 or a multiple of 16.
_COUNTS = ["tensors", "chunks"]
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _number(x):
    """The value of a scalar argument (in the interpreter a Python float) or of a () tensor."""
    if isinstance(x, tl.tensor) and x.dtype.is_ptr():
        return tl.load(x)
    else:
        return x + tl.zeros((), tl.float32)


@triton.jit
def _chunk(layout, tensors, CHUNK: tl.constexpr):
    """The tensor of the program's chunk, the chunk's first element in it, and its number of elements."""
    program = tl.program_id(0)
    tensor = tl.load(layout + 2 * tensors + program)
    begin = (program - tl.load(layout + tensors + tensor)) * CHUNK
    return tensor, begin, tl.minimum(tl.load(layout + tensor) - begin, CHUNK).to(tl.int32)


@triton.jit
def _memory(pointers, row, tensors, tensor, begin, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the chunk in the tensor whose address is in `row` of `pointers`."""
    address = tl.load(pointers + row * tensors + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address + begin


@triton.jit
def _load(chunk, place, count, FULL: tl.constexpr):
    """A block in float32. A FULL block is loaded without a mask, which would prevent 16-byte loads."""
    if FULL:
        return tl.load(chunk + place).to(tl.float32)
    else:
        return tl.load(chunk + place, mask=place < count, other=0.0).to(tl.float32)


@triton.jit
def _store(chunk, place, count, x, FULL: tl.constexpr):
    if FULL:
        tl.store(chunk + place, x)
    else:
        tl.store(chunk + place, x, mask=place < count)


@triton.jit
def _update(w, m, v, inverse, inverse_sq, eps, weight_decay):
    return m * inverse / (tl.sqrt_rn(v * inverse_sq) + eps) + weight_decay * w


@triton.jit
def _moments_block(
    w_chunk, g_chunk, m_chunk, v_chunk, place, count,
    scale, inverse, inverse_sq, beta1, rest1, beta2, rest2, eps, weight_decay,
    M: tl.constexpr, V: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Updates m and v of a block in place; returns w^2 and u^2."""
    w = _load(w_chunk, place, count, FULL)
    g = _load(g_chunk, place, count, FULL) * scale
    # Rounded as stored, so that the last pass recomputes the u of this norm.
    m = (beta1 * _load(m_chunk, place, count, FULL) + rest1 * g).to(M)
    v = (beta2 * _load(v_chunk, place, count, FULL) + rest2 * g * g).to(V)
    _store(m_chunk, place, count, m, FULL)
    _store(v_chunk, place, count, v, FULL)
    u = _update(w, m.to(tl.float32), v.to(tl.float32), inverse, inverse_sq, eps, weight_decay)
    if not FULL:
        u = tl.where(place < count, u, 0.0)
    return w * w, u * u


@triton.jit(do_not_specialize=_COUNTS)
def _moments_kernel(
    layout, pointers, partial, tensors, chunks,
    grad_scale, correction, correction_sq, beta1, rest1, beta2, rest2, eps, weight_decay,
    W: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Updates m and v of a chunk in place, writes its sums of w^2 and u^2 to `partial` (2, chunks). rest: 1 - beta."""
    tensor, begin, count = _chunk(layout, tensors, CHUNK)
    w_chunk = _memory(pointers, 0, tensors, tensor, begin, W, ALIGNED)
    g_chunk = _memory(pointers, 1, tensors, tensor, begin, G, ALIGNED)
    m_chunk = _memory(pointers, 2, tensors, tensor, begin, M, ALIGNED)
    v_chunk = _memory(pointers, 3, tensors, tensor, begin, V, ALIGNED)
    scale = _number(grad_scale).to(tl.float32)
    inverse = (1.0 / _number(correction)).to(tl.float32)
    inverse_sq = (1.0 / _number(correction_sq)).to(tl.float32)
    w_squares = tl.zeros((BLOCK,), tl.float32)
    u_squares = tl.zeros((BLOCK,), tl.float32)
    place = tl.arange(0, BLOCK)
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        w2, u2 = _moments_block(
            w_chunk, g_chunk, m_chunk, v_chunk, start + place, count,
            scale, inverse, inverse_sq, beta1, rest1, beta2, rest2, eps, weight_decay, M, V, True,
        )  # fmt: skip
        w_squares += w2
        u_squares += u2
    if full < count:
        w2, u2 = _moments_block(
            w_chunk, g_chunk, m_chunk, v_chunk, full + place, count,
            scale, inverse, inverse_sq, beta1, rest1, beta2, rest2, eps, weight_decay, M, V, False,
        )  # fmt: skip
        w_squares += w2
        u_squares += u2
    tl.store(partial + tl.program_id(0), tl.sum(w_squares))
    tl.store(partial + chunks + tl.program_id(0), tl.sum(u_squares))


@triton.jit(do_not_specialize=_COUNTS)
def _ratio_kernel(layout, partial, step_sizes, tensors, chunks, lr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """A program sums the chunks of one tensor, in order: step_sizes[tensor] = lr |w| / |u|."""
    tensor = tl.program_id(0)
    first = tl.load(layout + tensors + tensor)
    count = ((tl.load(layout + tensor) + CHUNK - 1) // CHUNK).to(tl.int32)
    w_squares = tl.zeros((BLOCK,), tl.float32)
    u_squares = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        w_squares += tl.load(partial + first + chunk, mask=chunk < count, other=0.0)
        u_squares += tl.load(partial + chunks + first + chunk, mask=chunk < count, other=0.0)
    w_norm = tl.sqrt_rn(tl.sum(w_squares))
    u_norm = tl.sqrt_rn(tl.sum(u_squares))
    ratio = tl.where((w_norm > 0) & (u_norm > 0), w_norm / u_norm, 1.0)
    tl.store(step_sizes + tensor, ratio * _number(lr).to(tl.float32))


@triton.jit
def _weights_block(
    w_chunk, m_chunk, v_chunk, place, count, step_size, inverse, inverse_sq, eps, weight_decay,
    W: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    w = _load(w_chunk, place, count, FULL)
    m = _load(m_chunk, place, count, FULL)
    v = _load(v_chunk, place, count, FULL)
    w -= step_size * _update(w, m, v, inverse, inverse_sq, eps, weight_decay)
    _store(w_chunk, place, count, w.to(W), FULL)


@triton.jit(do_not_specialize=_COUNTS[:1])
def _weights_kernel(
    layout, pointers, step_sizes, tensors, correction, correction_sq, eps, weight_decay,
    W: tl.constexpr, M: tl.constexpr, V: tl.constexpr,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, begin, count = _chunk(layout, tensors, CHUNK)
    w_chunk = _memory(pointers, 0, tensors, tensor, begin, W, ALIGNED)
    m_chunk = _memory(pointers, 2, tensors, tensor, begin, M, ALIGNED)
    v_chunk = _memory(pointers, 3, tensors, tensor, begin, V, ALIGNED)
    step_size = tl.load(step_sizes + tensor)
    inverse = (1.0 / _number(correction)).to(tl.float32)
    inverse_sq = (1.0 / _number(correction_sq)).to(tl.float32)
    place = tl.arange(0, BLOCK)
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        _weights_block(
            w_chunk, m_chunk, v_chunk, start + place, count,
            step_size, inverse, inverse_sq, eps, weight_decay, W, True,
        )  # fmt: skip
    if full < count:
        _weights_block(
            w_chunk, m_chunk, v_chunk, full + place, count,
            step_size, inverse, inverse_sq, eps, weight_decay, W, False,
        )  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS[:1])
def _squares_kernel(
    layout, pointers, partial, tensors,
    G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of squares of a chunk."""
    tensor, begin, count = _chunk(layout, tensors, CHUNK)
    chunk = _memory(pointers, 0, tensors, tensor, begin, G, ALIGNED)
    squares = tl.zeros((BLOCK,), tl.float32)
    place = tl.arange(0, BLOCK)
    full = count // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = _load(chunk, start + place, count, True)
        squares += x * x
    if full < count:
        x = _load(chunk, full + place, count, False)
        squares += x * x
    tl.store(partial + tl.program_id(0), tl.sum(squares))


@torch.compiler.disable  # reads addresses, which traced tensors don't have
def clip_scale(grads: list[Tensor], max_norm: float) -> tuple[Tensor, Tensor]:
    grads = [grad if same_dense_memory([grad]) else grad.contiguous() for grad in grads]
    partial_sums = [grads[0].new_zeros(1, dtype=torch.float32)]
    for group in groups([grads]):
        layout, pointers, tensors, chunks, aligned = Tables.of(group.lists)
        partial = layout.new_empty(chunks, dtype=torch.float32)
        launch(
            _squares_kernel, (chunks,), layout, pointers, partial, tensors,
            G=_TYPES[group.dtypes[0]], ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK,
        )  # fmt: skip
        partial_sums.append(partial)
    norm = torch.cat(partial_sums).sum().sqrt()
    return norm, max_norm / norm.clamp(min=max_norm)


@torch.compiler.disable
def lamb_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
) -> None:
    device = params[0].device
    steps = step.double() if isinstance(step, Tensor) else float(step)
    # In float32 1 - 0.999 keeps three significant digits, so the bias corrections are computed in float64.
    correction, correction_sq = (_argument(1 - beta**steps, device) for beta in betas)
    rates = [float(x) for beta in betas for x in (beta, 1 - beta)]
    lr, grad_scale = _argument(lr, device), _argument(grad_scale, device)
    lists, copied = dense([params, grads, exp_avgs, exp_avg_sqs])
    for group in groups(lists):
        layout, pointers, tensors, chunks, aligned = Tables.of(group.lists)
        types = dict(zip("WGMV", (_TYPES[dtype] for dtype in group.dtypes), strict=True))
        shape = {"ALIGNED": aligned, "CHUNK": CHUNK, "BLOCK": BLOCK}
        partial = layout.new_empty((2, chunks), dtype=torch.float32)
        step_sizes = layout.new_empty(tensors, dtype=torch.float32)
        launch(
            _moments_kernel, (chunks,), layout, pointers, partial, tensors, chunks,
            grad_scale, correction, correction_sq, *rates, float(eps), float(weight_decay), **types, **shape,
        )  # fmt: skip
        launch(_ratio_kernel, (tensors,), layout, partial, step_sizes, tensors, chunks, lr, CHUNK=CHUNK, BLOCK=BLOCK)
        del types["G"]
        launch(
            _weights_kernel, (chunks,), layout, pointers, step_sizes, tensors, correction, correction_sq,
            float(eps), float(weight_decay), **types, **shape,
        )  # fmt: skip
    for original, copy in copied:
        original.copy_(copy)


def _argument(number: float | Tensor, device: torch.device) -> float | Tensor:
    """A number for the kernels: on the host a scalar argument, on the device a tensor that they read."""
    return number if isinstance(number, Tensor) and number.device == device else float(number)
