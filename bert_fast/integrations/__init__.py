"""bert_fast inside other libraries' models: `fuse`, `unfuse`, `quantize`; and `freeze`, `unfreeze`, of any model."""

from bert_fast.integrations.freeze import freeze, unfreeze
from bert_fast.integrations.fuse import fuse, unfuse
from bert_fast.integrations.quantize import quantize

__all__ = ["freeze", "fuse", "quantize", "unfreeze", "unfuse"]
