"""Gather the real tokens of a padded batch and scatter them back, for any 0/1 mask."""

from bert_fast.kernels.padding.api import Unpadded, pad, unpad

__all__ = ["Unpadded", "pad", "unpad"]
