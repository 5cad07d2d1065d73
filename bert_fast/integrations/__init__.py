"""bert_fast inside other libraries' models: `fuse`, `unfuse`, `is_fused` and `quantize`."""

from bert_fast.integrations.fuse import fuse, is_fused, unfuse
from bert_fast.integrations.quantize import quantize

__all__ = ["fuse", "is_fused", "quantize", "unfuse"]
