"""Why an encoder model of transformers, or one call of it, runs transformers' own forward."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.integrations.layouts import Layout
from bert_fast.kernels._common.checks import values_are_checked

_OWN_HOOKS = "transformers.utils.output_capturing"
_INPUT_GRADIENT = "make_inputs_require_grads"
_TAKEN = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"}
_WITHOUT_EFFECT = {"use_cache", "cache_position", "num_items_in_batch", "return_dict", "output_hidden_states"}
_SAME_MATHEMATICS = {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}


def hooked(module: nn.Module) -> bool:
    """Whether somebody's hook sees what goes in or out of `module`.

    Two that transformers leaves don't count: those that collect outputs, and the one that makes the embeddings ask for
    a gradient (see `wants_input_gradient`).
    """
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return True
    hooks = module._forward_hooks
    return bool(hooks) and any(
        getattr(hook, "__module__", "") != _OWN_HOOKS and getattr(hook, "__name__", "") != _INPUT_GRADIENT
        for hook in hooks.values()
    )


def wants_input_gradient(embeddings: Any) -> bool:
    """Whether enable_input_require_grads was called, as transformers and PEFT do for gradient checkpointing."""
    hooks = embeddings.word_embeddings._forward_hooks
    return bool(hooks) and any(getattr(hook, "__name__", "") == _INPUT_GRADIENT for hook in hooks.values())


def plain(module: object, *kinds: type[nn.Module]) -> bool:
    """Whether calling `module` runs the forward of one of `kinds`, and nothing else."""
    return type(module) in kinds and "forward" not in module.__dict__ and not hooked(module)  # type: ignore[arg-type]


def plain_linear(module: object) -> bool:
    """Whether `module` is x @ weight.T + bias and nothing else."""
    return plain(module, nn.Linear) and module.bias is not None  # type: ignore[attr-defined]


def plain_norm(module: object) -> bool:
    """Whether `module` is a LayerNorm with weight and bias and nothing else."""
    return plain(module, nn.LayerNorm) and module.bias is not None  # type: ignore[attr-defined]


def droppable(module: object) -> bool:
    """Whether `module` is a dropout that a kernel can do, or none at all."""
    if plain(module, nn.Identity):
        return True
    # Kernels drop in steps of 1/256, so a probability may not round to none or all.
    return plain(module, nn.Dropout) and (module.p == 0.0 or 1 / 512 <= module.p < 511 / 512)  # type: ignore[attr-defined]


def why_not_fused(model: nn.Module, layout: Layout) -> str | None:
    """Why no call of this model could be taken, or None."""
    if type(model).forward is not layout.model.forward:
        return f"its class {type(model).__name__} has a forward of its own"
    if "forward" in model.__dict__:
        return "its forward was replaced on the object (by accelerate's hooks, for example)"
    kind = getattr(model.config, "position_embedding_type", None)
    if kind not in (None, "absolute"):
        return f"config.position_embedding_type is {kind!r}; only 'absolute' has kernels"
    return _decoder(model.config)


def first_position(embeddings: Any) -> int:
    """The position of a sequence's first token: 0, or 1 + the padding token's id in RoBERTa."""
    padding_idx = getattr(embeddings, "padding_idx", None)
    return 0 if padding_idx is None else padding_idx + 1


def why_not_taken(model: Any, layout: Layout, given: Mapping[str, Any]) -> str | None:
    """Why this call of `model` with the arguments `given` can't be taken, or None.

    First what is known without looking at values; the masks' values come last.
    """
    return (
        _tracing()
        or _decoder(model.config, given)
        or _unknown_arguments(model.config, given)
        or _unknown_modules(model, layout)
        or _unknown_shapes(model, given)
        or _unknown_mask(model, given.get("attention_mask"))
    )


def _tracing() -> str | None:
    if torch.compiler.is_exporting() or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "the model is being exported, and an exported graph can't call bert_fast's kernels"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are hooks for all modules (torch.nn.modules.module.register_module_*_hook)"
    collector = getattr(sys.modules.get(_OWN_HOOKS), "_active_collector", None)
    if collector is not None and not torch.compiler.is_compiling() and collector.get():
        return "a transformers model around it collects the outputs of its layers"
    return None


def _decoder(config: Any, given: Mapping[str, Any] | None = None) -> str | None:
    for name in ("is_decoder", "add_cross_attention", "is_causal"):
        if getattr(config, name, False) or (given and given.get(name)):
            return f"{name} is True; the kernels are for the encoder"
    return None


def _unknown_arguments(config: Any, given: Mapping[str, Any]) -> str | None:
    wanted = given.get("output_attentions")
    if wanted or (wanted is None and getattr(config, "output_attentions", False)):
        return "output_attentions is True and the kernels never hold the attention probabilities"
    states = given.get("output_hidden_states", False)
    if not (states is None or isinstance(states, bool)):
        return f"output_hidden_states is {states!r}; the kernels' way knows True and False"
    for name, value in given.items():
        if name not in _TAKEN and name not in _WITHOUT_EFFECT and value is not None and value is not False:
            return f"it was given the argument {name}"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in _SAME_MATHEMATICS:
        return f"the attention implementation is {implementation!r}"
    return None


def _unknown_modules(model: Any, layout: Layout) -> str | None:
    stack = getattr(model, layout.stack)
    if not plain(stack, layout.encoder):
        return f"`{layout.stack}` was replaced, or has a hook"
    for index, layer in enumerate(stack.layer):
        if all(plain(block, *layout.blocks) for block in layout.blocks_of(layer)):
            parts = layout.parts_of(layer)
            if droppable(parts.attention.dropout) and not any(hooked(leaf) for leaf in parts.leaves()):
                continue
        return f"a module in `{layout.stack}.layer.{index}` was replaced, or has a hook"
    return None


def _unknown_shapes(model: Any, given: Mapping[str, Any]) -> str | None:
    """What is wrong with the shapes is left to transformers to say."""
    ids, embeds, mask = (given.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    if (ids is None) == (embeds is None):
        return "exactly one of input_ids and inputs_embeds is expected"
    tokens = embeds if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.dim() != (3 if ids is None else 2) or tokens.device.type == "meta":
        return "input_ids or inputs_embeds is not a tensor of (B, S) or (B, S, E) with values"
    shape = tokens.shape[:2]
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
        return "attention_mask is not a tensor of (B, S)"
    if shape[1] > model.config.max_position_embeddings - first_position(model.embeddings):
        return "the sequences are longer than config.max_position_embeddings allows"
    return None


def _unknown_mask(model: Any, mask: Tensor | None) -> str | None:
    if mask is None or torch.compiler.is_compiling():
        return None
    if mask.dtype != torch.bool and values_are_checked(mask) and not torch.equal((mask != 0).to(mask.dtype), mask):
        return "attention_mask has values other than 0 and 1"
    if getattr(model, "pooler", None) is not None and mask.numel() and not bool(mask[:, 0].all()):
        return (
            "the first column of attention_mask has zeros, and transformers' pooler reads a padding token there (pad "
            "on the right, or load the model with add_pooling_layer=False where nothing needs pooler_output)"
        )
    return None
