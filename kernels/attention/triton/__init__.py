"""The Triton kernels of attention; operators.py launches them."""

from bert_fast.kernels.attention.triton.operators import attention_bwd, attention_fwd

__all__ = ["attention_bwd", "attention_fwd"]
