"""Keep a model's packed weights between calls, on request."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from bert_fast.integrations.fuse import describe, is_fused_encoder
from bert_fast.kernels._common.weight_cache import freeze_weights, unfreeze_weights
from bert_fast.models.encoder import BertEncoder
from bert_fast.models.int8 import Int8Linear

M = TypeVar("M", bound=nn.Module)


def freeze(model: M) -> M:
    """Pack the weights of a model's linear layers once, for inference on the CPU, instead of at every call.

    The kernels multiply by packed weights. Without `freeze` a call packs every weight that it uses (an INT8 weight is
    packed once and its memory hashed at every call), so it sees any write. With it the packed copy is made at the first
    call and kept: a gain where batches are small (`python -m benchmarks.models.frozen_inference` measures it), for as
    much memory as the weights take.

    Until `unfreeze`, write to the weights only in ways that torch counts: optimizers, `load_state_dict`, `init`,
    in-place operations, a new tensor in `weight.data`, `model.to`. After those the weight is packed again. A write that
    torch doesn't count (an in-place operation on `weight.data`; through a NumPy array, DLPack or another process that
    shares the memory) is not seen: call `freeze` again after it. Results have the same bits as without, where the
    product is ours (float32; README of linear). Calls with gradients, on a GPU or of weights that are not the model's
    own Parameters are as without.

    It belongs to the Parameter objects and this process: copies, pickles and Parameters that are replaced are not
    frozen, and state_dict, `requires_grad` and the training mode don't change.

    Args:
        model: a bert_fast model, or a module that contains a transformers model changed by `fuse`; quantized or not.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a torch.nn.Module, or contains no bert_fast encoder and no fused one.
        ValueError: a weight was made under torch.inference_mode, where torch counts no writes; nothing is frozen then.
    """
    weights = _weights(model)
    for name, weight in weights.items():
        if weight.is_inference():
            raise ValueError(
                f"{name} was made under torch.inference_mode(), where torch counts no writes, so a packed copy could "
                "become wrong unnoticed; expected a model that was made or loaded outside of it"
            )
    freeze_weights(weights.values())
    return model


def unfreeze(model: M) -> M:
    """Undo `freeze`: drop the packed weights and read the weights at every call. Without effect on other models.

    Returns:
        `model`.

    Raises:
        TypeError: as `freeze`.
    """
    unfreeze_weights(_weights(model).values())
    return model


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the linear layers by name, quantized ones too."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if not any(isinstance(module, BertEncoder) or is_fused_encoder(module) for module in model.modules()):
        raise TypeError(
            f"{describe(model)}; expected a bert_fast model, or a module that contains a transformers model changed by "
            "bert_fast.fuse"
        )
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear):
            weights[f"{name}.values"] = module.values
        elif isinstance(module, nn.Linear) and isinstance(module.weight, nn.Parameter):
            weights[f"{name}.weight"] = module.weight
    return weights
