"""bert_fast in other libraries' models: `fuse`, `unfuse`, `is_fused`, `register`, `quantize`; `freeze`, `unfreeze`."""

from bert_fast.integrations.attention_interface import register
from bert_fast.integrations.freeze import freeze, unfreeze
from bert_fast.integrations.fuse import fuse, is_fused, unfuse
from bert_fast.integrations.quantize import quantize

__all__ = ["freeze", "fuse", "is_fused", "quantize", "register", "unfreeze", "unfuse"]
