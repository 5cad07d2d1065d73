"""Matrix product with a weight, bias and GeLU, and its gradients."""

from bert_fast.kernels.linear.api import linear

__all__ = ["linear"]
