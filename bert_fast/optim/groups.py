"""Parameter groups: weight decay, layer-wise learning-rate decay, freezing, gradual unfreezing."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

_LAYER = re.compile(r"(?:^|\.)layer\.(\d+)\.")
_EMBEDDINGS = re.compile(r"(?:^|\.)embeddings\.")


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and embeddings with `weight_decay`, biases and LayerNorm weights without.

    In BERT a one-dimensional parameter is a bias or a LayerNorm weight. Shared parameters appear once; parameters with
    requires_grad False do not appear.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() >= 2 else undecayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]


def depths(model: nn.Module) -> tuple[dict[str, int], int]:
    """The depth of every parameter: 0 for the embeddings, index + 1 for a layer, one more for pooler and head.

    Returns:
        {parameter name: depth}, and the largest depth, that of the head.
    """
    names = [name for name, _ in model.named_parameters()]
    layers = {name: int(match.group(1)) + 1 for name in names if (match := _LAYER.search(name))}
    head = max(layers.values(), default=0) + 1
    return {name: layers.get(name, 0 if _EMBEDDINGS.search(name) else head) for name in names}, head


def layered_groups(model: nn.Module, weight_decay: float, layer_decay: float) -> list[dict[str, Any]]:
    """`param_groups`, split by depth: each group has `lr_factor` = layer_decay ** (depth of the head - its depth)."""
    if layer_decay == 1.0:
        return [{**group, "lr_factor": 1.0} for group in param_groups(model, weight_decay)]
    by_name, head = depths(model)
    by_depth: dict[int, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        by_depth.setdefault(by_name[name], []).append(parameter)
    groups = []
    for depth, parameters in sorted(by_depth.items()):
        factor = layer_decay ** (head - depth)
        for group in param_groups(nn.ParameterList(parameters), weight_decay):
            if group["params"]:
                groups.append({**group, "lr_factor": factor})
    return groups


def freeze(model: nn.Module, *, embeddings: bool, layers: int) -> None:
    """Set requires_grad to False for the embeddings, or for the embeddings and the first `layers` layers.

    Raises:
        ValueError: the encoder has fewer layers.
    """
    by_name, head = depths(model)
    if layers > head - 1:
        raise ValueError(f"optimizer.freeze_layers is {layers}; the model has {head - 1} layers")
    lowest = layers + 1 if layers else int(embeddings)
    for name, parameter in model.named_parameters():
        if by_name[name] < lowest:
            parameter.requires_grad_(False)


class Unfreezing:
    """Gradual unfreezing (Howard and Ruder, 2018): the head is trained first, then one more layer per `epochs` epochs.

    Args:
        model: the parameters whose requires_grad is True now are those trained in the end.
        epochs: between two layers; 0 trains all from the start.
    """

    def __init__(self, model: nn.Module, epochs: float) -> None:
        by_name, self._head = depths(model)
        self._epochs = epochs
        trained = [(by_name[name], x) for name, x in model.named_parameters() if x.requires_grad]
        self._pending = trained if epochs else []

    def advance(self, epoch: float) -> None:
        """Unfreeze the layers due after `epoch` epochs, which may be a fraction."""
        if not self._pending:
            return
        lowest = self._head - int(epoch / self._epochs + 1e-9)
        for depth, parameter in self._pending:
            parameter.requires_grad_(depth >= lowest)
        if lowest <= 0:
            self._pending = []
