"""gelu(x + bias) in one pass, its gradients in another."""

from bert_fast.kernels.bias_gelu.api import bias_gelu

__all__ = ["bias_gelu"]
