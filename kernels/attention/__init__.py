"""Self-attention in each sequence of a packed batch, softmax(scale Q K^T) V, fused with QKV bias and dropout."""

from bert_fast.kernels.attention.api import attention

__all__ = ["attention"]
