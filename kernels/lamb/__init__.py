"""One LAMB step for many tensors, and the factor that clips their gradients' global norm."""

from bert_fast.kernels.lamb.api import ClipScale, clip_scale, lamb_step

__all__ = ["ClipScale", "clip_scale", "lamb_step"]
