"""The Triton kernels of lamb; operators.py launches them."""

from bert_fast.kernels.lamb.triton.operators import clip_scale, lamb_step

__all__ = ["clip_scale", "lamb_step"]
