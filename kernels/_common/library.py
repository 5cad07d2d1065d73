"""Define an operator with torch.library: schema, fake and gradient in Python; the kernels register themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bert_fast.kernels._common import native
from bert_fast.kernels._common.dispatch import AVAILABLE, Availability, Implementation

_LIBRARY = torch.library.Library("bert_fast", "FRAGMENT")
NATIVE_CPU_DTYPES = (torch.float32, torch.bfloat16)


def define(
    name: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Define `bert_fast::name` with `schema` (arguments and returns), its shapes and, where given, its gradient."""
    qualified = f"bert_fast::{name}"
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(qualified, fake, lib=_LIBRARY)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=_LIBRARY)


def implement(name: str, dispatch_key: str, function: Callable[..., Any]) -> None:
    """Register a Python kernel for `bert_fast::name` under `dispatch_key`, for rooms whose hot path is partly GEMMs."""
    _LIBRARY.impl(name, function, dispatch_key)


def native_cpu(call: Callable[..., Any], *operators: str) -> Implementation:
    """The slot of the compiled CPU kernels: available when `bert_fast._C` registered every one of `operators`."""
    missing = [name for name in operators if not native.registered(f"bert_fast::{name}", "CPU")]
    if not missing:
        availability = AVAILABLE
    else:
        reason = native.MISSING or f"the compiled module lacks {', '.join(missing)}: build it again"
        availability = Availability(False, False, reason)
    return Implementation(call, "cpu", NATIVE_CPU_DTYPES, availability)
