"""Linear layer with an optional GeLU in its epilogue."""

from bert_fast.kernels.linear.api import linear

__all__ = ["linear"]
