"""The gradient of an operator, as torch.library.register_autograd makes it, at a third of its time on the host.

A training step calls 8 operators a layer, whose kernels on a GPU take less time than torch's general code: that reads
the schema argument by argument at every call, to restore defaults. The operators here have none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def register_gradient(
    qualified: str,
    library: torch.library.Library,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    backward: Callable[..., tuple[Tensor | None, ...]],
) -> None:
    """Register the gradient of the operator `qualified`, namespace::name, in `library`.

    Operators with lists of tensors are registered by torch.library.register_autograd, which flattens them.

    Args:
        setup_context: (ctx, inputs, output) saves what `backward` needs.
        backward: (ctx, *douts) returns a gradient or None for each input.
    """
    namespace, name = qualified.split("::")
    operator = getattr(getattr(torch.ops, namespace), name).default
    schema = operator._schema
    types = [str(x.type) for x in (*schema.arguments, *schema.returns)]
    if any("Tensor" in kind and "List" in kind for kind in types):
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)
        return
    # The dispatcher leaves out arguments that have their default value.
    assert not any(x.has_default_value() or x.kwarg_only for x in schema.arguments), schema
    handle = operator._handle
    below = torch._C._after_autograd_keyset

    def forward(ctx: Any, *inputs: Any) -> Any:
        *inputs, keyset = inputs  # type: ignore[assignment]
        with torch._C._AutoDispatchBelowAutograd():
            output = handle.redispatch_boxed(keyset & below, *inputs)
            setup_context(ctx, inputs, output)
        return output

    def gradient(ctx: Any, *douts: Tensor) -> tuple[Tensor | None, ...]:
        return (*backward(ctx, *douts), None)

    function = type(
        f"GradientOf_{namespace}_{name}",
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(gradient)},
    )
    apply = function.apply  # type: ignore[attr-defined]

    def call(keyset: Any, *inputs: Any) -> Any:
        if torch._C.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return apply(*inputs, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return handle.redispatch_boxed(keyset & below, *inputs)

    library.impl(name, call, "Autograd", with_keyset=True)
