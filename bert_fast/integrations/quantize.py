"""Turn the linear layers of an encoder into 8-bit ones, in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bert_fast.integrations.fuse import described
from bert_fast.integrations.layouts import layouts
from bert_fast.integrations.reasons import plain_linear
from bert_fast.models.encoder import BertEncoder
from bert_fast.models.int8 import Int8Linear

M = TypeVar("M", bound=nn.Module)


def quantize(model: M, dtype: str = "int8", *, calibration: Iterable[Any] | None = None) -> M:
    """Make the encoder layers of `model` compute their matrix products in 8 bits, in place, for inference on the CPU.

    Weights are rounded by output channel. Activations are rounded by token, each within its own smallest and largest
    value; with `calibration`, within the smallest and largest value that each layer saw there, which is faster and
    less precise. Embeddings, attention, LayerNorm, pooler and heads stay what they are.

    A quantized model has no float weights in its encoder: `train()`, `state_dict()` and `save_pretrained` raise.
    Keep the checkpoint, or a copy.deepcopy. Pickle and deepcopy work. The encoder's other parameters ask for no
    gradients any more.

    Args:
        model: one of our models, in eval mode, or a module with a transformers model inside that `fuse` has changed.
        dtype: "int8".
        calibration: batches of typical inputs: mappings of keyword arguments, tuples of positional ones, or tensors.

    Returns:
        `model`. A model that is quantized already is left as it is.

    Raises:
        TypeError: `model` has no encoder of ours and no fused one, or a linear layer in it was replaced (LoRA).
        ValueError: `dtype` is another, the model is in training mode, or a weight is not finite.
    """
    if dtype != "int8":
        raise ValueError(f"dtype is {dtype!r}; expected 'int8'")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if model.training:
        raise ValueError("model is in training mode; call model.eval() first: a quantized model can't be trained")
    layers, encoders = _layers(model)
    if not layers:
        raise TypeError(
            f"{described(model)}; expected a model of bert_fast, or one with a transformers model inside that "
            "bert_fast.fuse has changed"
        )
    made = [(group, _made(group)) for group in layers if not all(isinstance(dense, Int8Linear) for dense in group)]
    for group, whole in made:  # nothing was changed until here, where nothing can fail any more
        _put(model, group, whole)
    for encoder in encoders:
        encoder.requires_grad_(False)
    if calibration is not None and made:
        _calibrate(model, [whole for _, whole in made], calibration)
    return model


def _layers(model: nn.Module) -> tuple[list[tuple[Any, ...]], list[nn.Module]]:
    """The linear layers that read one input, in groups, and the modules whose parameters train no more."""
    groups: list[tuple[Any, ...]] = []
    encoders: list[nn.Module] = []
    for module in model.modules():
        found: Any = module
        if isinstance(module, BertEncoder):
            for layer in found.layer:
                groups += [(layer.attention.self.qkv,), (layer.attention.output.dense,)]
                groups += [(layer.intermediate.dense,), (layer.output.dense,)]
        if any(isinstance(child, BertEncoder) for child in module.children()):
            encoders.append(module)
        elif _is_fused_encoder(module):
            encoders.append(module)
            for layer in getattr(found, found.layout.stack).layer:
                parts = found.layout.parts_of(layer)
                groups += [parts.qkv, (parts.attended.dense,), (parts.up,), (parts.down.dense,)]
    return groups, encoders


def _is_fused_encoder(module: Any) -> bool:
    if next(layouts(), None) is None:
        return False
    from bert_fast.integrations.bert import is_fused

    return is_fused(module) and isinstance(module, module.layout.model)


def _made(group: tuple[Any, ...]) -> Int8Linear:
    for dense in group:
        if not plain_linear(dense):
            raise TypeError(
                f"a linear layer of the encoder is {type(dense).__name__}; expected torch.nn.Linear with a bias and "
                "no hooks (merge adapters such as LoRA first)"
            )
    return Int8Linear.of(group).eval()


def _put(model: nn.Module, group: tuple[Any, ...], whole: Int8Linear) -> None:
    """Put an Int8Linear in the place of each of the group; `whole` computes all of them at once."""
    if len(group) == 1:
        _replace(model, group[0], whole)
        return
    first = 0
    for index, dense in enumerate(group):
        part = whole.part(first, first + dense.out_features).eval()
        first += dense.out_features
        if index == 0:
            part.whole = whole  # where the three are computed at once
        _replace(model, dense, part)


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in model.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)


def _calibrate(model: nn.Module, layers: list[Int8Linear], batches: Iterable[Any]) -> None:
    for layer in layers:
        layer.observe()
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
            layer.calibrated()
