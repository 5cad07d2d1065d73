"""gelu(x + bias) in one pass, its gradient with dbias in one more."""

from bert_fast.kernels.bias_gelu.api import bias_gelu

__all__ = ["bias_gelu"]
