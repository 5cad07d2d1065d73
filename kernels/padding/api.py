"""Public functions of padding: validate the arguments, dispatch to an implementation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bert_fast.kernels._common.checks import (
    check_int,
    check_integer,
    check_same_device,
    check_shape,
    check_tensor,
    values_are_checked,
)
from bert_fast.kernels.padding.op import OP


class Unpadded(NamedTuple):
    """A packed batch, returned by `unpad`.

    x: (T, ...), the real tokens of the sequences, concatenated.
    indices: (T,) int64, the position of each token in the flattened (B, S), for `pad`.
    cu_seqlens: (B+1,) int32; sequence b is the tokens cu_seqlens[b] to cu_seqlens[b+1] - 1.
    max_seqlen: the length of the longest sequence; while torch.compile traces it is S, an upper bound that reads no
        value of the device.
    """

    x: Tensor
    indices: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


def unpad(x: Tensor, attention_mask: Tensor, *, impl: str = "auto") -> Unpadded:
    """Gather the real tokens of a padded batch: out.x = x.flatten(0, 1)[out.indices], where the mask is 1.

    Differentiable in `x`: the gradient of padding is zero. On CUDA it synchronizes, since T is a shape.

    Args:
        x: (B, S, ...) of any dtype, token ids as well as hidden states.
        attention_mask: (B, S) bool, integer or floating, 1 for a real token and 0 for padding, anywhere.
        impl: "auto", "reference", "triton" or "cpu".

    Returns:
        `Unpadded`.

    Raises:
        TypeError: an argument is not a tensor.
        ValueError: the shape or device of the mask differs from that of `x`, `impl` is none of these, or, where values
            are read (CPU tensors; on CUDA under BERT_FAST_CHECK=1), the mask has values other than 0 and 1.
        ImplUnavailableError: the requested `impl` does not exist or can't run here.
    """
    check_tensor("x", x)
    check_tensor("attention_mask", attention_mask)
    if x.dim() < 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, S, ...)")
    check_shape("attention_mask", attention_mask, tuple(x.shape[:2]))
    check_same_device(x, attention_mask=attention_mask)
    functions = OP.select(impl, x)()
    indices, cu_seqlens = functions.unpad_indices(_as_bool(attention_mask))
    packed = functions.gather_rows(x.flatten(0, 1), indices)
    return Unpadded(packed, indices, cu_seqlens, _max_seqlen(cu_seqlens, x.shape[1]))


def pad(x: Tensor, indices: Tensor, batch: int, seqlen: int, *, impl: str = "auto") -> Tensor:
    """Scatter a packed batch back to its padded form: out.flatten(0, 1)[indices] = x, zeros elsewhere.

    Differentiable in `x`.

    Args:
        x: (T, ...) of any dtype.
        indices: (T,) int64, rising: the positions in the flattened (B, S), from `unpad`.
        batch, seqlen: B and S.
        impl: "auto", "reference", "triton" or "cpu".

    Returns:
        (B, S, ...) in the dtype of `x`.

    Raises:
        TypeError: an argument is not a tensor, or indices not int64.
        ValueError: a shape or a device does not fit, `impl` is none of these, or, where values are read (as in
            `unpad`), the indices don't rise strictly or leave the range 0 to B S - 1.
        ImplUnavailableError: the requested `impl` does not exist or can't run here.
    """
    check_tensor("x", x)
    check_integer("indices", indices, (torch.int64,))
    if x.dim() < 1:
        raise ValueError("x has shape (); expected (T, ...)")
    check_shape("indices", indices, (x.shape[0],))
    check_same_device(x, indices=indices)
    for name, size in (("batch", batch), ("seqlen", seqlen)):
        check_int(name, size, -(2**31), 2**31 - 1, "the B and S of the padded batch, at least 0")
    if batch < 0 or seqlen < 0:
        raise ValueError(f"batch is {batch} and seqlen {seqlen}; expected the B and S of the padded batch, at least 0")
    _check_indices(indices, batch, seqlen)
    out: Tensor = OP.select(impl, x)().scatter_rows(x, indices, batch * seqlen)
    return out.view(batch, seqlen, *x.shape[1:])


def _as_bool(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    real = mask != 0
    if values_are_checked(mask) and not torch.equal(real.to(mask.dtype), mask):
        wrong = mask[real & (mask != 1)].unique()[:5].tolist()
        raise ValueError(
            f"attention_mask has the values {', '.join(str(value) for value in wrong)}; expected only 1 (a real token) "
            "and 0 (padding). An additive mask (0 and large negative numbers) has to be made 0/1 first"
        )
    return real


def _check_indices(indices: Tensor, batch: int, seqlen: int) -> None:
    if not values_are_checked(indices) or not indices.numel():
        return
    low, high = int(indices[0]), int(indices[-1])
    if low < 0 or high >= batch * seqlen or not bool((indices[1:] > indices[:-1]).all()):
        raise ValueError(
            f"indices runs from {low} to {high}; expected it to rise strictly within 0 to {batch * seqlen - 1}, "
            f"the positions of batch {batch} x seqlen {seqlen}, as unpad returned it"
        )


def _max_seqlen(cu_seqlens: Tensor, seqlen: int) -> int:
    if torch.compiler.is_compiling():
        return seqlen
    if cu_seqlens.shape[0] < 2:
        return 0
    return int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
