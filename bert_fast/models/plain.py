"""Whether a kernel may read a module's parameters instead of calling the module.

It may not where calling would run anything else than the formula of the module's class: a hook, a subclass (an adapter,
a parametrization), a forward replaced on the object, or a weight that is a tensor subclass or not dense.
"""

from __future__ import annotations

from typing import TypeGuard, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.module import _has_any_global_hook

M = TypeVar("M", bound=nn.Module)

# Two hooks of transformers leave the output as it is: one that records outputs, and one that sets requires_grad on the
# output of the word embedding (see `requires_input_gradient`).
_RECORDING = "transformers.utils.output_capturing"
_INPUT_GRADIENT = "make_inputs_require_grads"
# Fake tensors stand for ordinary ones while a graph is traced or captured.
_TENSORS = frozenset((torch.Tensor, nn.Parameter, FakeTensor))


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook, of the module or of all modules, sees what goes in or out of `module`."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks or _has_any_global_hook():
        return True
    hooks = module._forward_hooks
    return bool(hooks) and any(
        getattr(hook, "__module__", "") != _RECORDING and getattr(hook, "__name__", "") != _INPUT_GRADIENT
        for hook in hooks.values()
    )


def requires_input_gradient(embedding: nn.Module) -> bool:
    """Whether enable_input_require_grads was called, as transformers and PEFT do for gradient checkpointing."""
    hooks = embedding._forward_hooks
    return bool(hooks) and any(getattr(hook, "__name__", "") == _INPUT_GRADIENT for hook in hooks.values())


def is_plain(module: object, *types: type[M]) -> TypeGuard[M]:
    """Whether calling `module` runs the forward of one of `types` on its own tensors, and nothing else."""
    return (
        type(module) in types
        and "forward" not in module.__dict__
        and not has_hooks(module)  # type: ignore[arg-type]
        and all(map(is_plain_tensor, module._parameters.values()))  # type: ignore[attr-defined]
    )


def is_plain_tensor(x: torch.Tensor | None) -> bool:
    """Whether a kernel can read `x`, a parameter of a module or None."""
    return x is None or (type(x) in _TENSORS and x.layout is torch.strided)


def is_plain_norm(module: object) -> bool:
    """Whether `module` is a plain LayerNorm with weight and bias."""
    return is_plain(module, nn.LayerNorm) and module.bias is not None


def is_plain_embedding(module: object) -> bool:
    """Whether `module` is a plain table that neither rescales its rows nor its gradient."""
    return (
        is_plain(module, nn.Embedding)
        and module.max_norm is None
        and not module.scale_grad_by_freq
        and not module.sparse
    )
