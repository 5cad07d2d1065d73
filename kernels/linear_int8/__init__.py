"""INT8 linear layer for inference: weights quantized by output channel, activations by token or calibrated range."""

from bert_fast.kernels.linear_int8.api import Int8Weight, feed_forward_int8, linear_int8, quantize_weight

__all__ = ["Int8Weight", "feed_forward_int8", "linear_int8", "quantize_weight"]
