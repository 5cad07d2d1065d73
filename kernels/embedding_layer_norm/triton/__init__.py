"""The Triton kernels of embedding_layer_norm; operators.py launches them."""

from bert_fast.kernels.embedding_layer_norm.triton.operators import embedding_layer_norm_bwd, embedding_layer_norm_fwd

__all__ = ["embedding_layer_norm_bwd", "embedding_layer_norm_fwd"]
