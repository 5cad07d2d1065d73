"""Reasons why an encoder model of transformers, or one call of it, runs transformers' own forward."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bert_fast.integrations.flattened import FLATTENED_ARGUMENTS, is_flash, restarts, why_not_flattened
from bert_fast.integrations.layouts import Layout
from bert_fast.kernels._common.checks import is_mapped, values_are_checked
from bert_fast.models.plain import has_hooks, is_plain

_INPUTS = {"input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds"}
_WITHOUT_EFFECT = {"use_cache", "cache_position", "num_items_in_batch", "return_dict", "output_hidden_states"}
_SAME_FORMULA = {None, "eager", "sdpa", "flex_attention"}  # and every flash attention


def is_supported_dropout(module: object) -> bool:
    """Whether `module` is a plain dropout whose probability the kernels support, or an Identity."""
    if is_plain(module, nn.Identity):
        return True
    # The kernels' probabilities are multiples of 1/256; one that rounds to 0 or 1 is not supported.
    return is_plain(module, nn.Dropout) and (module.p == 0.0 or 1 / 512 <= module.p < 511 / 512)


def why_not_fused(model: nn.Module, layout: Layout) -> str | None:
    """Why no call of this model can run on the kernels, or None."""
    if type(model).forward is not layout.model.forward:
        return f"its class {type(model).__name__} overrides forward"
    if "forward" in model.__dict__:
        return "its forward was replaced on the object (by accelerate's hooks, for example)"
    kind = getattr(model.config, "position_embedding_type", None)
    if kind not in (None, "absolute"):
        return f"config.position_embedding_type is {kind!r}; the kernels support only 'absolute'"
    return _decoder(model.config)


def first_position(embeddings: Any) -> int:
    """The position of a sequence's first token: 0, or 1 + the padding token's id in RoBERTa."""
    padding_idx = getattr(embeddings, "padding_idx", None)
    return 0 if padding_idx is None else padding_idx + 1


def why_not_supported(model: Any, layout: Layout, arguments: Mapping[str, Any]) -> str | None:
    """Why this call of `model` can't run on the kernels, or None.

    The checks that read no values come first; those of the mask's values come last.
    """
    return (
        _tracing()
        or _decoder(model.config, arguments)
        or _unknown_arguments(model.config, arguments)
        or _unknown_modules(model, layout)
        or _unknown_shapes(model, arguments)
        or _unknown_mask(model, arguments.get("attention_mask"))
    )


def _tracing() -> str | None:
    # In a graph that torch 2.11 compiles, `torch.compiler.is_exporting()` is True; the flag that it reads is not.
    if torch.compiler._is_exporting_flag or torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "the model is being exported, and an exported graph can't call bert_fast's kernels"
    if torch.nn.modules.module._has_any_global_hook():
        return "there are global module hooks (torch.nn.modules.module.register_module_*_hook)"
    collector = getattr(sys.modules.get("transformers.utils.output_capturing"), "_active_collector", None)
    if collector is not None and not torch.compiler.is_compiling() and collector.get():
        return "the transformers model that contains it records the outputs of its layers"
    return None


def _decoder(config: Any, arguments: Mapping[str, Any] | None = None) -> str | None:
    for name in ("is_decoder", "add_cross_attention", "is_causal"):
        if getattr(config, name, False) or (arguments and arguments.get(name)):
            return f"{name} is True; the kernels are for the encoder"
    return None


def _unknown_arguments(config: Any, arguments: Mapping[str, Any]) -> str | None:
    output_attentions = arguments.get("output_attentions")
    if output_attentions or (output_attentions is None and getattr(config, "output_attentions", False)):
        return "output_attentions is True and the kernels never store the attention probabilities"
    states = arguments.get("output_hidden_states", False)
    if not (states is None or isinstance(states, bool)):
        return f"output_hidden_states is {states!r}; fuse supports True and False"
    for name, value in arguments.items():
        if name not in _INPUTS | _WITHOUT_EFFECT | FLATTENED_ARGUMENTS and value is not None and value is not False:
            return f"the argument {name} was passed"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in _SAME_FORMULA and not is_flash(config):
        return f"the attention implementation is {implementation!r}"
    return None


def _unknown_modules(model: Any, layout: Layout) -> str | None:
    stack = getattr(model, layout.stack)
    if not is_plain(stack, layout.encoder):
        return f"`{layout.stack}` was replaced, or has a hook"
    for index, layer in enumerate(stack.layer):
        if all(is_plain(block, *layout.blocks) for block in layout.blocks_of(layer)):
            parts = layout.parts_of(layer)
            if is_supported_dropout(parts.attention.dropout) and not any(has_hooks(leaf) for leaf in parts.leaves()):
                continue
        return f"a module in `{layout.stack}.layer.{index}` was replaced, or has a hook"
    return None


def _unknown_shapes(model: Any, arguments: Mapping[str, Any]) -> str | None:
    """Wrong shapes are left to transformers, which raises the error."""
    ids, embeds, mask = (arguments.get(name) for name in ("input_ids", "inputs_embeds", "attention_mask"))
    if (ids is None) == (embeds is None):
        return "exactly one of input_ids and inputs_embeds is expected"
    tokens = embeds if ids is None else ids
    if not isinstance(tokens, Tensor) or tokens.dim() != (3 if ids is None else 2) or tokens.device.type == "meta":
        return "input_ids or inputs_embeds is not a tensor (B, S) or (B, S, E) with values"
    shape = (tokens.shape[0], tokens.shape[1])
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != shape):
        return "attention_mask is not a tensor (B, S)"
    longest = model.config.max_position_embeddings - first_position(model.embeddings)
    if arguments.get("cu_seq_lens_q") is not None or restarts(model.config, arguments, shape):
        if arguments.get("cu_seq_lens_q") is None and torch.compiler.is_compiling():
            return "position_ids may separate sequences, and torch.compile can't read them: pass cu_seq_lens_q"
        return why_not_flattened(arguments, shape, longest)
    if shape[1] > longest:
        return "the sequences are longer than config.max_position_embeddings allows"
    return why_not_flattened(arguments, shape, longest)


def _unknown_mask(model: Any, mask: Tensor | None) -> str | None:
    if mask is None or torch.compiler.is_compiling() or is_mapped(mask):  # `unpad` refuses the last
        return None
    if mask.dtype != torch.bool and values_are_checked(mask) and not torch.equal((mask != 0).to(mask.dtype), mask):
        return "attention_mask has values other than 0 and 1"
    if getattr(model, "pooler", None) is not None and mask.numel() and not bool(mask[:, 0].all()):
        return (
            "the first column of attention_mask has zeros, and transformers' pooler reads a padding token there (pad "
            "on the right, or load the model with add_pooling_layer=False if nothing reads pooler_output)"
        )
    return None
