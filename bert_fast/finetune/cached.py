"""The gradient of a large micro-batch in the memory of a small one, by a second forward pass.

GradCache (Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021): the outputs of
all examples are computed in parts, without gradients; the loss on all of them gives the gradient of each output; then
each part is computed again, with the same dropout, and backpropagates its share of that gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bert_fast._device import random_state, set_random_state
from bert_fast.tasks.task import Example


def parts_by_tokens(examples: Sequence[Example], most: int) -> list[Sequence[Example]]:
    """Consecutive parts of `examples` of at most `most` tokens each; a longer example is a part by itself."""
    parts: list[list[Example]] = []
    tokens = 0
    for example in examples:
        length = len(example.input_ids)
        if not parts or tokens + length > most:
            parts.append([])
            tokens = 0
        parts[-1].append(example)
        tokens += length
    return list(parts)


def cached_backward(
    forward: Callable[[Sequence[Example]], Tensor],
    loss: Callable[[Tensor], Tensor],
    parts: Sequence[Sequence[Example]],
    device: torch.device,
) -> None:
    """Accumulate the gradients of ``loss(torch.cat([forward(part) for part in parts]))``.

    Args:
        forward: the outputs of a part, along the first dimension; called twice for each.
        loss: a scalar, of the outputs of all parts.
        parts: of the examples.
        device: whose random numbers `forward` uses; those of the CPU are replayed too.
    """
    states, outputs = [], []
    with torch.no_grad():
        for part in parts:
            states.append(random_state(device))
            outputs.append(forward(part))
    last = random_state(device)
    leaf = torch.cat(outputs).requires_grad_()
    loss(leaf).backward()
    assert leaf.grad is not None
    gradients = leaf.grad.split([len(x) for x in outputs])
    for part, state, gradient in zip(parts, states, gradients, strict=True):
        set_random_state(state, device)
        forward(part).backward(gradient)
    set_random_state(last, device)
