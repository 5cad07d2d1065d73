"""Real tokens out of a padded batch, and back: any 0/1 mask, holes and left padding too."""

from bert_fast.kernels.padding.api import Unpadded, pad, unpad

__all__ = ["Unpadded", "pad", "unpad"]
