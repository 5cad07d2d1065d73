"""bert_fast inside other libraries' models: `fuse` and `unfuse`."""

from bert_fast.integrations.fuse import fuse, unfuse

__all__ = ["fuse", "unfuse"]
