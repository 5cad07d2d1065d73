"""Index of the rooms: the public functions, and what can run here."""

from bert_fast.kernels._common.dispatch import Availability, ImplUnavailableError, available_impls, use_impl
from bert_fast.kernels.bias_gelu import bias_gelu
from bert_fast.kernels.lamb import ClipScale, clip_scale, lamb_step
from bert_fast.kernels.masked_lm_loss import MaskedLMLoss, masked_lm_loss

__all__ = [
    "Availability",
    "ClipScale",
    "ImplUnavailableError",
    "MaskedLMLoss",
    "available_impls",
    "bias_gelu",
    "clip_scale",
    "lamb_step",
    "masked_lm_loss",
    "use_impl",
]
