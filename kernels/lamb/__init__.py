"""A LAMB step of many tensors, and the factor that clips the global norm of their gradients."""

from bert_fast.kernels.lamb.api import ClipScale, clip_scale, lamb_step

__all__ = ["ClipScale", "clip_scale", "lamb_step"]
