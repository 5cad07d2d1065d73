"""What add_layer_norm is compared with on a GPU: the LayerNorms of other packages, where they are installed.

They normalize alone; the bias, the dropout and the residual before it are PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from bert_fast.kernels._common.benchmarks import Peer

EPS = 1e-12
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def _liger(summed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    out: Tensor = LigerLayerNormFunction.apply(summed, weight, bias, EPS)
    return out


def _apex(summed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    out: Tensor = fused_layer_norm_affine(summed, weight, bias, weight.shape, EPS)
    return out


def _transformer_engine(summed: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from transformer_engine.pytorch import LayerNorm

    module = LayerNorm(weight.shape[0], eps=EPS, device=weight.device)
    out: Tensor = torch.func.functional_call(module, {"weight": weight, "bias": bias}, (summed,))
    return out


NORMS: dict[str, Norm] = {"Liger": _liger, "apex": _apex, "TransformerEngine": _transformer_engine}


def _call(
    norm: Norm, dropout_p: float, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, x_bias: Tensor
) -> Tensor:
    return norm(residual + functional.dropout(x + x_bias, dropout_p), weight, bias)


def peers(dropout_p: float, inputs: tuple[Tensor, ...]) -> dict[str, Peer]:
    """Each package's LayerNorm; the benchmark refuses those that are not installed."""
    return {
        name: Peer(partial(_call, norm, dropout_p), inputs, comparable=not dropout_p) for name, norm in NORMS.items()
    }
