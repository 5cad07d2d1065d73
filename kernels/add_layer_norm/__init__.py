"""LayerNorm(residual + dropout(x + x_bias)) in one pass, all of its gradients in another."""

from bert_fast.kernels.add_layer_norm.api import add_layer_norm

__all__ = ["add_layer_norm"]
