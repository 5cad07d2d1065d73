"""The ops: their public functions, and which implementations can run here."""

from bert_fast.kernels._common.dispatch import (
    Availability,
    ImplUnavailableError,
    available_impls,
    check_environment,
    use_impl,
)
from bert_fast.kernels._common.third_party import register, unregister
from bert_fast.kernels.add_layer_norm import add_layer_norm
from bert_fast.kernels.attention import attention
from bert_fast.kernels.bias_gelu import bias_gelu
from bert_fast.kernels.embedding_layer_norm import embedding_layer_norm
from bert_fast.kernels.lamb import ClipScale, clip_scale, lamb_step
from bert_fast.kernels.linear import linear
from bert_fast.kernels.linear_int8 import Int8Weight, feed_forward_int8, linear_int8, quantize_weight
from bert_fast.kernels.masked_lm_loss import MaskedLMLoss, masked_lm_loss
from bert_fast.kernels.padding import Unpadded, pad, unpad
from bert_fast.threads import settle_after_fork as _settle_after_fork  # noqa: F401  # importing it prepares forks

__all__ = [
    "Availability",
    "ClipScale",
    "ImplUnavailableError",
    "Int8Weight",
    "MaskedLMLoss",
    "Unpadded",
    "add_layer_norm",
    "attention",
    "available_impls",
    "bias_gelu",
    "clip_scale",
    "embedding_layer_norm",
    "feed_forward_int8",
    "lamb_step",
    "linear",
    "linear_int8",
    "masked_lm_loss",
    "pad",
    "quantize_weight",
    "register",
    "unpad",
    "unregister",
    "use_impl",
]

check_environment()
