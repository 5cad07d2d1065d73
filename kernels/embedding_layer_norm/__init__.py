"""The embeddings in one pass: three gathers, LayerNorm, dropout; the scatter-add of the gradient is deterministic."""

from bert_fast.kernels.embedding_layer_norm.api import embedding_layer_norm

__all__ = ["embedding_layer_norm"]
