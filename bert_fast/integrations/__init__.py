"""bert_fast inside other libraries' models: `fuse`, `unfuse` and `quantize`."""

from bert_fast.integrations.fuse import fuse, unfuse
from bert_fast.integrations.quantize import quantize

__all__ = ["fuse", "quantize", "unfuse"]
