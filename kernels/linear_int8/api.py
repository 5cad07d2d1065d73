"""Public functions of linear_int8: validate the arguments, dispatch to an implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from bert_fast.kernels._common.activation import check_activation
from bert_fast.kernels._common.checks import (
    check_floating,
    check_int,
    check_integer,
    check_same_device,
    check_shape,
    to_compute_dtype,
)
from bert_fast.kernels.linear_int8 import cpu_backends
from bert_fast.kernels.linear_int8.op import FEED_FORWARD, OP, Int8Weight


def quantize_weight(weight: Tensor, *, limit: int | None = None) -> Int8Weight:
    """Quantize a weight to INT8: values = round(weight / scale), scale[n] = max |weight[n]| / limit.

    Symmetric, with one scale for each output channel (row).

    Args:
        weight: (N, K) floating point.
        limit: the largest magnitude of a value, 1 to 127. None for the largest that this CPU multiplies without
            saturation: 127 with VNNI, else 64 (README.md).

    Returns:
        `Int8Weight`: values (N, K) int8, scale (N,) float32, sums (N,) float32, on the device of `weight`.

    Raises:
        TypeError: `weight` is not floating point.
        ValueError: its shape is not (N, K), it is empty, it has values that are not finite, or `limit` is out of range.

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", 2018; per-channel scales: Krishnamoorthi, "Quantizing deep convolutional networks for efficient
    inference", 2018.
    """
    check_floating("weight", weight, ("N", "K"))
    if weight.device.type == "meta":
        raise ValueError("weight is on meta; expected a tensor with values")
    if not weight.numel() or not bool(weight.isfinite().all()):
        raise ValueError(f"weight (shape {tuple(weight.shape)}) is empty or not finite; expected finite numbers")
    limit = cpu_backends.weight_limit() if limit is None else limit
    check_int("limit", limit, 1, 127, "1 to 127")
    precise = weight.detach().float()
    scale = precise.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / limit
    values = (precise / scale[:, None]).round().clamp(-limit, limit).to(torch.int8)
    return Int8Weight(values, scale, values.sum(1, dtype=torch.int64).float())


def linear_int8(
    x: Tensor,
    weight: Int8Weight,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    input_range: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    impl: str = "auto",
) -> Tensor:
    """Linear layer on INT8 operands, for inference: out = act(x' weight'^T + bias).

    x' = scale u + low with u = round((x - low) / scale) from 0 to 255. By token, low and low + 255 scale are the row's
    smallest and largest value; with `input_range` they are the same for every token. A row with a value that is not
    finite gives NaN.

    Args:
        x: (T, K) float32, bfloat16, float16 or float64, without a gradient.
        weight: of (N, K), from `quantize_weight`.
        bias: (N,) floating point, or None.
        activation: None, "gelu" (erf) or "gelu_tanh", its tanh approximation.
        input_range: (2,) float32, the smallest and the largest value of x, which is clipped to them; None for by token.
        out_dtype: float32 or bfloat16; None for the dtype of `x`, under autocast for autocast's.
        impl: "auto", "reference" or "cpu".

    Returns:
        (T, N) in `out_dtype`.

    Raises:
        TypeError: a tensor has another dtype, or `out_dtype` is another.
        ValueError: a shape or a device does not fit, `activation` or `impl` has another value, x.requires_grad is True
            while gradients are enabled, or the weight was quantized for a CPU with VNNI and this one has none.
        ImplUnavailableError: the requested `impl` can't run here.

    Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
    inference", 2018, section 2.
    """
    _check_input(x, input_range)
    _check_weight(weight, bias, x.shape[1], x)
    check_activation(activation)
    if out_dtype not in (None, torch.float32, torch.bfloat16):
        raise TypeError(f"out_dtype is {out_dtype!r}; expected torch.float32, torch.bfloat16 or None")
    x = to_compute_dtype(x)
    out: Tensor = OP.select(impl, x)(x, tuple(weight), bias, activation, input_range, out_dtype)
    return out


def feed_forward_int8(
    x: Tensor,
    up: Int8Weight,
    up_bias: Tensor | None,
    down: Int8Weight,
    *,
    activation: str = "gelu",
    up_range: Tensor | None = None,
    down_range: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """BERT's feed-forward block on INT8 operands, for inference: out = act(x up^T + up_bias) down^T.

    Two `linear_int8`, the second without its bias (add_layer_norm adds it); the activations between them are quantized
    before they are written to memory.

    Args:
        x: (T, K) float32, bfloat16, float16 or float64, without a gradient.
        up: of (F, K), from `quantize_weight`.
        up_bias: (F,) floating point, or None.
        down: of (N, F), from `quantize_weight`.
        activation: "gelu" (erf) or "gelu_tanh", its tanh approximation.
        up_range: (2,) float32, the range of x, as `input_range` of `linear_int8`; None for by token.
        down_range: (2,) float32, the range of the activations; None for by token.
        impl: "auto", "reference" or "cpu".

    Returns:
        (T, N) in the dtype of `x`, under autocast in autocast's.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: as `linear_int8`, or `activation` is None.
        ImplUnavailableError: the requested `impl` can't run here.

    Source: Devlin et al., "BERT", 2019, section 3, for the block; as `linear_int8` for the quantization.
    """
    _check_input(x, up_range)
    _check_weight(up, up_bias, x.shape[1], x)
    if activation is None:
        raise ValueError("activation is None; expected 'gelu' or 'gelu_tanh'")
    check_activation(activation)
    _check_weight(down, None, up.values.shape[0], x)
    _check_range(down_range, x)
    x = to_compute_dtype(x)
    call = FEED_FORWARD[OP.select(impl, x)]
    out: Tensor = call(x, tuple(up), up_bias, tuple(down), activation, up_range, down_range)
    return out


def _check_input(x: Tensor, input_range: Tensor | None) -> None:
    check_floating("x", x, ("T", "K"))
    _check_range(input_range, x)
    _check_no_gradient("x", x)


def _check_no_gradient(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}.requires_grad is True, and linear_int8 has no gradient; run it under torch.no_grad()")


def _check_weight(weight: Int8Weight, bias: Tensor | None, width: int, x: Tensor) -> None:
    if not isinstance(weight, tuple) or len(weight) != len(Int8Weight._fields):
        raise TypeError(f"weight is {type(weight).__name__}; expected an Int8Weight, from quantize_weight")
    values, scale, sums = weight
    check_integer("weight.values", values, (torch.int8,))
    check_shape("weight.values", values, ("N", width))
    if not width:
        raise ValueError(f"weight.values has shape {tuple(values.shape)}; expected rows of at least one value")
    check_same_device(x, **{"weight.values": values})
    for name, vector in (("weight.scale", scale), ("weight.sums", sums)):
        check_floating(name, vector, values.shape[:1], x)
        _check_no_gradient(name, vector)
    if bias is not None:
        check_floating("bias", bias, weight.values.shape[:1], x)
        _check_no_gradient("bias", bias)


def _check_range(input_range: Tensor | None, x: Tensor) -> None:
    if input_range is not None:
        check_floating("input_range", input_range, (2,), x)
