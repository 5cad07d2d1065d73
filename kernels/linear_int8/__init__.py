"""A linear layer in 8 bits: weights by output channel, activations by token or in a calibrated range."""

from bert_fast.kernels.linear_int8.api import Int8Weight, feed_forward_int8, linear_int8, quantize_weight

__all__ = ["Int8Weight", "feed_forward_int8", "linear_int8", "quantize_weight"]
