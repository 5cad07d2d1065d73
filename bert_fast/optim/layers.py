"""The layers of an encoder by depth: a learning rate for each, freezing, gradual unfreezing."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from bert_fast.optim.params import param_groups

_LAYER = re.compile(r"(?:^|\.)layer\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)embeddings\.")


def depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """The depth of every parameter by name: 0 for the embeddings, layer + 1, and one more for pooler and head.

    Returns:
        The depths, and the largest, that of the head.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = {name: int(match.group(1)) + 1 for name in names if (match := _LAYER.search(name))}
    top = max(layers.values(), default=0) + 1
    found = {name: layers.get(name, 0 if _EMBEDDINGS.search(name) else top) for name in names}
    return found, top


def layered_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """`params.param_groups`, split by depth: each group has `lr_factor` = layer_decay ** (depths below the head)."""
    if layer_decay == 1.0:
        return [{**group, "lr_factor": 1.0} for group in param_groups(model, weight_decay)]
    by_name, top = depths(model)
    by_depth: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        by_depth.setdefault(by_name[name], []).append(parameter)
    groups = []
    for depth, parameters in sorted(by_depth.items()):
        part = nn.ParameterList(parameters)
        factor = layer_decay ** (top - depth)
        groups += [{**group, "lr_factor": factor} for group in param_groups(part, weight_decay) if group["params"]]
    return groups


def freeze(model: nn.Module, *, embeddings: bool, layers: int) -> None:
    """Take the embeddings, or the first `layers` layers and the embeddings, out of the training.

    Raises:
        ValueError: the encoder has fewer layers.
    """
    by_name, top = depths(model)
    if layers > top - 1:
        raise ValueError(f"optimizer.freeze_layers is {layers}; the model has {top - 1} layers")
    lowest = layers + 1 if layers else int(embeddings)
    for name, parameter in model.named_parameters():
        if by_name[name] < lowest:
            parameter.requires_grad_(False)


class Unfreezing:
    """Gradual unfreezing: only what is deepest learns at first, and a layer more each `epochs` epochs.

    Args:
        model: its parameters that are trained now are those that will be in the end.
        epochs: between two layers; 0 for all from the start.
    """

    def __init__(self, model: nn.Module, epochs: float) -> None:
        by_name, self._top = depths(model)
        self._epochs = epochs
        trained = [(by_name[name], x) for name, x in model.named_parameters() if x.requires_grad]
        self._waiting = trained if epochs else []

    def advance(self, epoch: float) -> None:
        """`epoch` epochs are done, a fraction counted: let learn what is due by now."""
        if not self._waiting:
            return
        lowest = self._top - int(epoch / self._epochs + 1e-9)
        for depth, parameter in self._waiting:
            parameter.requires_grad_(depth >= lowest)
        if lowest <= 0:
            self._waiting = []
