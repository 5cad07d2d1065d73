"""Replace the forward of transformers' BERT models and their relatives inside a module, in place."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn

from bert_fast.integrations.layouts import layout_of, layouts
from bert_fast.models.family import ARCHITECTURES
from bert_fast.models.plain import is_plain_tensor

M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """Run the encoder of every transformers `BertModel` inside `model` on bert_fast's kernels, in place.

    Also of every `RobertaModel`, `XLMRobertaModel`, `CamembertModel`, `DistilBertModel` and `ElectraModel`.

    Modules, Parameters and their names do not change: only the class of these objects (and of their
    `...ForQuestionAnswering`) becomes a generated subclass with another forward. state_dict, optimizers, Trainer,
    save_pretrained, deepcopy and pickle work as before. The weights are read at every call: they may be trained,
    loaded, moved, cast or wrapped (LoRA) before and after. A call that the kernels don't support (output_attentions,
    3-D masks, a decoder, hooks on layers, export ...) runs transformers' own forward; a UserWarning names each reason
    once. A module whose parameters are tensor subclasses (a quantized weight) or not dense is called as it is.

    Flattened inputs, as `DataCollatorWithFlattening` and sentence-transformers make them for flash attention, are one
    row (1, T) with cu_seq_lens_q, cu_seq_lens_k, max_length_q and max_length_k, or, where the model's attention is a
    flash attention, with position_ids that restart. The former are followed whatever the model's attention. The pooler
    returns a row for each sequence, and RoBERTa's positions may start at 0 or at 1 + the padding token's id.

    Differences from transformers: last_hidden_state and hidden_states are zeros at padding, where transformers' values
    depend on the padding, and so are the gradients through them. A question answering head's logits at padding are the
    lowest finite value and take no part in its loss. In training, dropout draws other masks. Under autocast the
    residual stream between the layers has autocast's dtype. Under torch.compile, which can't read values, the pooler
    takes the first real token of each sequence even where padding comes first; in eager mode such a batch runs
    transformers' own forward.

    Args:
        model: one of these models, a model with a head (`BertFor...`, `RobertaFor...`), or a module that contains one.

    Returns:
        `model`. An encoder that is fused already, or can't be fused (a warning says why), is not changed.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: it contains none of these models; the message names those that it contains.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    classes: tuple[type[nn.Module], ...] = tuple(layout.model for layout in layouts())
    encoders = [(name, module) for name, module in model.named_modules() if isinstance(module, classes)]
    if not encoders:
        names = ", ".join(f"{architecture.prefix}Model" for architecture in ARCHITECTURES.values())
        raise ValueError(f"{describe(model)}; expected a module that contains one of transformers' {names}")

    from bert_fast.integrations.bert import fused_class, is_fused, reads_padding
    from bert_fast.integrations.reasons import why_not_fused

    for name, module in encoders:
        if is_fused(module):
            continue
        layout = layout_of(type(module))
        assert layout is not None
        reason = why_not_fused(module, layout)
        if reason is None:
            module.__class__ = fused_class(type(module))
            _warn_of_foreign_weights(module)
        else:
            where = f"the {layout.model.__name__} at {name!r}" if name else f"the {layout.model.__name__}"
            warnings.warn(f"bert_fast.fuse does not change {where}, because {reason}", UserWarning, stacklevel=2)
    for module in model.modules():
        if reads_padding(module):
            module.__class__ = fused_class(type(module))
    return model


def _warn_of_foreign_weights(encoder: nn.Module) -> None:
    """Warn of modules that are called instead of computed by a kernel, for the kind of their parameters."""
    foreign = [(name, x) for name, x in encoder.named_parameters() if not is_plain_tensor(x)]
    if foreign:
        name, x = foreign[0]
        kind = type(x).__name__ if type(x) is not nn.Parameter else f"a tensor with the layout {x.layout}"
        warnings.warn(
            f"bert_fast.fuse leaves {len(foreign)} parameters to their modules, because no kernel reads them: "
            f"the first is {name}, {kind}",
            UserWarning,
            stacklevel=3,
        )


def unfuse(model: M) -> M:
    """Undo `fuse`: give every module inside `model` its original class.

    Returns:
        `model`.
    """
    if next(layouts(), None) is not None:
        from bert_fast.integrations.bert import is_fused, original_class

        for module in model.modules():
            if is_fused(module):
                module.__class__ = original_class(module)
    return model


def is_fused(model: nn.Module) -> bool:
    """Whether `model` contains an encoder that `fuse` changed: it then runs on bert_fast's kernels.

    bert_fast's own models run on them by themselves, and are not fused.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    if next(layouts(), None) is None:
        return False
    from bert_fast.integrations.bert import is_fused as changed

    return any(changed(module) for module in model.modules())


def is_fused_encoder(module: Any) -> bool:
    """Whether this is an encoder of transformers that `fuse` changed."""
    if next(layouts(), None) is None:
        return False
    from bert_fast.integrations.bert import is_fused

    return is_fused(module) and isinstance(module, module.layout.model)


def describe(model: nn.Module) -> str:
    """What `model` is, for an error message."""
    if type(model).__module__.startswith("bert_fast."):
        return f"{type(model).__name__} is bert_fast's own model and runs on its kernels already"
    configs: list[tuple[nn.Module, Any]] = [(m, getattr(m, "config", None)) for m in model.modules()]
    encoders = [f"{type(m).__name__} (model_type {c.model_type!r})" for m, c in configs if hasattr(c, "model_type")]
    names = dict.fromkeys(encoders or [type(m).__name__ for m, _ in configs[:8]])
    return f"{type(model).__name__} contains no supported encoder, but {', '.join(names)}"
