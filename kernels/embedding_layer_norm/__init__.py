"""BERT's embeddings in one pass: three gathers, LayerNorm, dropout; deterministic gradients of the tables."""

from bert_fast.kernels.embedding_layer_norm.api import embedding_layer_norm

__all__ = ["embedding_layer_norm"]
