"""Find transformers' BERT and its family in a module tree and give them our forward, in place."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from torch import nn

from bert_fast.integrations.layouts import layout_of, layouts
from bert_fast.models.family import ARCHITECTURES

M = TypeVar("M", bound=nn.Module)


def fuse(model: M) -> M:
    """Make every transformers `BertModel` inside `model` run its encoder on bert_fast's kernels, in place.

    And every `RobertaModel`, `XLMRobertaModel`, `CamembertModel`, `DistilBertModel` and `ElectraModel`.

    The modules, their Parameters and their names stay what and where they are: only the class of each of these (and of
    their `...ForQuestionAnswering`) objects changes, to a subclass of its own with another forward. So state_dict,
    optimizers, Trainer, save_pretrained, deepcopy and pickle go on as before. The weights are read at every call: they
    may be trained, loaded, moved, cast or wrapped (LoRA) before and after. A call that the kernels don't take
    (attention probabilities asked for, 3-D masks, a decoder, hooks on layers, export ...) runs transformers' own
    forward; a UserWarning says so once a reason.

    What differs from transformers: last_hidden_state and hidden_states are zeros at padding, where transformers has
    values that depend on the padding; so are the gradients of what is computed from them. A question answering head's
    logits at padding are the lowest finite value, and take no part in its loss. In training, dropout draws other
    bits. Under autocast the residual stream is in autocast's dtype between the layers. Under torch.compile, where
    values can't be looked at, the pooler takes the first real token of each sequence even where padding comes first;
    in eager mode such a batch runs transformers' own forward.

    Args:
        model: one of them, a model with a head (`BertFor...`, `RobertaFor...`), or any module with them inside.

    Returns:
        `model`. An encoder that can't be fused (its warning says why) is left as it is, a fused one too.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: there is none of them inside; the message says what there is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {type(model).__name__}; expected a torch.nn.Module")
    kinds: tuple[type[nn.Module], ...] = tuple(layout.model for layout in layouts())
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    if not found:
        names = ", ".join(f"{architecture.prefix}Model" for architecture in ARCHITECTURES.values())
        raise ValueError(f"{described(model)}; expected a module with one of transformers' {names} inside")

    from bert_fast.integrations.bert import fused_class, is_fused, reads_padding
    from bert_fast.integrations.reasons import why_not_fused

    for name, module in found:
        if is_fused(module):
            continue
        layout = layout_of(type(module))
        assert layout is not None
        reason = why_not_fused(module, layout)
        if reason is None:
            module.__class__ = fused_class(type(module))
        else:
            kind = layout.model.__name__
            where = f"the {kind} at {name!r}" if name else f"the {kind}"
            warnings.warn(f"bert_fast.fuse leaves {where} as it is, because {reason}", UserWarning, stacklevel=2)
    for module in model.modules():
        if reads_padding(module):
            module.__class__ = fused_class(type(module))
    return model


def unfuse(model: M) -> M:
    """Give every module that `fuse` changed inside `model` its own class back; returns `model`."""
    if next(layouts(), None) is not None:
        from bert_fast.integrations.bert import is_fused, own_class

        for module in model.modules():
            if is_fused(module):
                module.__class__ = own_class(module)
    return model


def described(model: nn.Module) -> str:
    """What kind of a model `model` is, in an error's words."""
    if type(model).__module__.startswith("bert_fast."):
        return f"{type(model).__name__} is bert_fast's own model and runs on its kernels already"
    configs: list[tuple[nn.Module, Any]] = [(m, getattr(m, "config", None)) for m in model.modules()]
    encoders = [f"{type(m).__name__} (model_type {c.model_type!r})" for m, c in configs if hasattr(c, "model_type")]
    kinds = dict.fromkeys(encoders or [type(m).__name__ for m, _ in configs[:8]])
    return f"found no encoder of the family in {type(model).__name__}, but {', '.join(kinds)}"
