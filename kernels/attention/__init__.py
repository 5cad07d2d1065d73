"""softmax(scale Q K^T) V of every sequence of a packed batch, with the QKV bias and dropout inside."""

from bert_fast.kernels.attention.api import attention

__all__ = ["attention"]
