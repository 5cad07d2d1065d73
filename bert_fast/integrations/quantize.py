"""Replace the linear layers of an encoder by INT8 ones, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bert_fast.integrations.fuse import describe, is_fused_encoder
from bert_fast.models.encoder import BertEncoder
from bert_fast.models.int8 import ENCODER_LINEARS, Int8Linear
from bert_fast.models.plain import is_plain

M = TypeVar("M", bound=nn.Module)


def quantize(model: M, dtype: str = "int8", *, calibration: Iterable[Any] | None = None, limit: int | None = None) -> M:
    """Compute the matrix products of the encoder layers in INT8, in place, for inference on the CPU.

    Weights are quantized by output channel. Activations are quantized by token, within the token's minimum and maximum;
    with `calibration`, within each layer's minimum and maximum over the calibration inputs, which is faster and less
    precise. Embeddings, attention, LayerNorm, pooler and heads are not quantized.

    A quantized model has no float weights in its encoder: its forward in `train()` mode, and `state_dict()`, raise. A
    bert_fast model is saved by `save_pretrained`, and loaded again with the same bits and without a calibration, by
    `from_pretrained`; one of transformers' is not: keep its checkpoint. Pickle and deepcopy work. requires_grad of the
    encoder's other parameters becomes False.

    Args:
        model: a bert_fast model in eval mode, or a module that contains a transformers model changed by `fuse`.
        dtype: "int8".
        calibration: batches of typical inputs: mappings of keyword arguments, tuples of positional ones, or tensors.
        limit: the largest magnitude of a weight's value, 1 to 127. None for the largest that this CPU multiplies
            exactly: 127 with VNNI, else 64. Models with 64 run on every CPU, with the same weights.

    Returns:
        `model`. Layers that are quantized already are not changed.

    Raises:
        TypeError: `model` contains no bert_fast encoder and no fused one, or a linear layer in it was replaced (LoRA).
        ValueError: `dtype` is another, `limit` is out of range, the model is in training mode, or a weight is not
            finite.
    """
    if dtype != "int8":
        raise ValueError(f"dtype is {dtype!r}; expected 'int8'")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first: a quantized model can't be trained")
    groups, encoders = _linears(model)
    if not groups:
        raise TypeError(
            f"{describe(model)}; expected a bert_fast model, or a module that contains a transformers model changed by "
            "bert_fast.fuse"
        )
    float_groups = [group for group in groups if not all(isinstance(dense, Int8Linear) for dense in group)]
    quantized = [_quantized(group, limit) for group in float_groups]  # may raise; nothing is changed before
    for group, int8 in zip(float_groups, quantized, strict=True):
        _replace_group(model, group, int8)
    for encoder in encoders:
        encoder.requires_grad_(False)
    if calibration is not None and quantized:
        _calibrate(model, quantized, calibration)
    return model


def _linears(model: nn.Module) -> tuple[list[tuple[Any, ...]], list[nn.Module]]:
    """The linear layers, grouped by those that read the same input, and the modules that become untrainable."""
    groups: list[tuple[Any, ...]] = []
    encoders: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, BertEncoder):
            groups += [(layer.get_submodule(name),) for layer in module.layer for name in ENCODER_LINEARS]
        if any(isinstance(child, BertEncoder) for child in module.children()):
            encoders.append(module)
        elif is_fused_encoder(module):
            encoders.append(module)
            layout: Any = module.layout
            for layer in layout.layers(module):
                parts = layout.parts_of(layer)
                groups += [parts.qkv, (parts.attention_output.dense,), (parts.intermediate,), (parts.output.dense,)]
    return groups, encoders


def _quantized(group: tuple[Any, ...], limit: int | None) -> Int8Linear:
    for dense in group:
        if not is_plain(dense, nn.Linear) or dense.bias is None:
            raise TypeError(
                f"a linear layer of the encoder is {type(dense).__name__}; expected torch.nn.Linear with a bias and "
                "no hooks (merge adapters such as LoRA first)"
            )
    return Int8Linear.from_linears(group, limit).eval()


def _replace_group(model: nn.Module, group: tuple[Any, ...], int8: Int8Linear) -> None:
    """Replace each layer of the group by its part of `int8`, which computes all of them at once."""
    if len(group) == 1:
        _replace(model, group[0], int8)
        return
    start = 0
    for index, dense in enumerate(group):
        part = int8.slice_outputs(start, start + dense.out_features).eval()
        start += dense.out_features
        if index == 0:
            part.concatenated = int8
        _replace(model, dense, part)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in model.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)


def _calibrate(model: nn.Module, layers: list[Int8Linear], batches: Iterable[Any]) -> None:
    for layer in layers:
        layer.begin_calibration()
    try:
        with torch.no_grad():
            for batch in batches:
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, Tensor):
                    model(batch)
                else:
                    model(*batch)
    finally:
        for layer in layers:
            layer.end_calibration()
